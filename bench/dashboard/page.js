// Draws the plots, and shows the traces and the lines of text that belong to the chosen device, dtype and direction.
(function () {
  "use strict";
  const selects = ["device", "dtype", "direction"].map((name) => document.getElementById(name));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  const plots = Array.from(document.querySelectorAll(".plot")).map((place) => {
    const figure = JSON.parse(place.nextElementSibling.textContent);
    return { place: place, data: figure.data, layout: figure.layout };
  });

  function fits(values, chosen) {
    return values.every((value, i) => value === null || value === chosen[i]);
  }

  function draw(plot, chosen, colour) {
    const around = plot.place.closest("figure");
    const shown = plot.data.filter((trace) => fits(trace.meta, chosen));
    around.querySelector(".empty").hidden = shown.length > 0;
    plot.place.hidden = shown.length === 0;
    let height = 400;
    if (around.dataset.categories) {
      const rows = new Set(shown.flatMap((trace) => trace.y)).size;
      const bars = shown.length && shown[0].type === "bar" ? shown.length : 1;
      height = 120 + rows * Math.max(38, 18 * bars + 10);
    }
    plot.place.style.height = height + "px";
    const layout = Object.assign({}, plot.layout, { height: height, font: Object.assign({}, plot.layout.font, { color: colour }) });
    if (shown.length) return Plotly.react(plot.place, structuredClone(shown), structuredClone(layout), options);
  }

  function update() {
    const chosen = selects.map((select) => select.value);
    document.querySelectorAll("[data-choice]").forEach((element) => {
      element.hidden = !fits(JSON.parse(element.dataset.choice), chosen);
    });
    const colour = getComputedStyle(document.body).color;
    Promise.all(plots.map((plot) => draw(plot, chosen, colour))).then(() => {
      document.body.dataset.drawn = chosen.join(" | ");
    });
  }

  selects.forEach((select) => select.addEventListener("change", update));
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  dark.addEventListener("change", update);
  update();
})();
