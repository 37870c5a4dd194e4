// The filter: shows the traces and the lines of text that belong to the chosen device, dtype and direction.
(function () {
  "use strict";
  const names = ["device", "dtype", "direction"];
  const selects = names.map((name) => document.getElementById(name));
  const plots = Array.from(document.querySelectorAll(".js-plotly-plot"));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function fits(values, chosen) {
    return values.every((value, i) => value === null || value === "" || value === chosen[i]);
  }

  function update() {
    const chosen = selects.map((select) => select.value);
    document.querySelectorAll("[data-choice]").forEach((element) => {
      element.hidden = !fits(JSON.parse(element.dataset.choice), chosen);
    });
    const text = getComputedStyle(document.body).color;
    plots.forEach((plot) => {
      const visible = plot.data.map((trace) => fits(trace.meta, chosen));
      const shown = plot.data.filter((_, i) => visible[i]);
      const figure = plot.closest("figure");
      figure.querySelector(".empty").hidden = shown.length > 0;
      plot.hidden = shown.length === 0;
      if (shown.length === 0) return;
      const layout = { "font.color": text, "xaxis.autorange": true };
      if (figure.dataset.categories) {
        const rows = new Set(shown.flatMap((trace) => trace.y)).size;
        const bars = shown[0].type === "bar" ? shown.length : 1;
        layout.height = 130 + rows * Math.max(26, 18 * bars + 8);
      }
      if (plot.layout.hovermode) layout["hoverlabel.font.color"] = "#ffffff";
      Plotly.update(plot, { visible: visible }, layout);
    });
    document.body.dataset.chosen = chosen.join(" | ");
  }

  selects.forEach((select) => select.addEventListener("change", update));
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  dark.addEventListener("change", update);
  update();
})();
