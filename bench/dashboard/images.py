"""The same series as PNG files, by matplotlib, for places that show no page."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..records import Results
from ..results import write_whole
from . import series
from .figures import colour
from .series import Choice, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("speedup.png", "roofline.png", "memory.png", "history.png")
MARKERS = "oDs^X*Pv"


def write_images(files: Sequence[Results], choice: Choice, folder: Path) -> list[Path]:
    """speedup.png, roofline.png, memory.png and history.png of one choice; none for what was not measured."""
    file = series.newest(files)[choice.device]
    mine = [f for f in files if f.device == choice.device]
    draws = _speedup, _roofline, _memory, _history
    series_of = series.speedups(file), series.rooflines(file), series.memory(file), series.history(mine)
    written = []
    for name, draw, found in zip(FILES, draws, series_of, strict=True):
        shown = [s for s in found if s.choice == choice]
        if not shown:
            continue
        figure = draw(shown)
        direction = "forward + backward" if choice.direction == "both" else choice.direction
        figure.suptitle(f"{series.device_label(file)}, {choice.dtype}, {direction}", x=0.01, ha="left", fontsize=10)
        command = textwrap.fill(f"commit {file.commit}: {file.command}", 110)
        figure.text(0.01, 0.005, command, fontsize=7, color="#5a6775", va="bottom")
        written.append(folder / name)
        _save(figure, written[-1])
    return written


def _save(figure: Figure, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    write_whole(path, data.getvalue())


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # A figure without pyplot: no window, and nothing that other figures share.
    room = 0.4 / height  # for the command, two lines below
    layout = ConstrainedLayoutEngine(rect=(0, room, 1, 1 - room))
    figure = Figure(figsize=(8, height), layout=layout, facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d5dbe1", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _bars(shown: Sequence[Series], form: str, spread: bool) -> tuple[Figure, Axes]:
    rows = list(dict.fromkeys(str(y) for s in shown for y in s.y))
    thick = 0.8 / len(shown)
    figure, axes = _figure(1.4 + len(rows) * max(0.3, 0.17 * len(shown)))
    for i, s in enumerate(shown):
        x = [float(value) for value in s.x]
        y = [rows.index(str(value)) - 0.4 + thick * (i + 0.5) for value in s.y]
        error = (
            [
                [max(0, m - b) for m, b in zip(x, s.low, strict=True)],
                [max(0, h - m) for m, h in zip(x, s.high, strict=True)],
            ]
            if spread
            else None
        )
        drawn = axes.barh(
            y, x, thick, label=s.name, color=colour(s.name), xerr=error, error_kw={"lw": 0.8, "ecolor": "#333333"}
        )
        axes.bar_label(drawn, ["none" if v == 0 else form.format(v) for v in x], padding=4, fontsize=7)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    _legend(axes)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=8, borderaxespad=0.2)


def _speedup(shown: Sequence[Series]) -> Figure:
    figure, axes = _bars(shown, "{:.3g}×", spread=True)
    axes.axvline(1, color="#7b8794", linestyle=":", linewidth=1.2)
    axes.set_xlabel("times as long as tri_stn")
    return figure


def _memory(shown: Sequence[Series]) -> Figure:
    figure, axes = _bars(shown, "{:.3g}", spread=False)
    axes.set_xlabel("MiB beyond input, output and gradients")
    return figure


def _roofline(shown: Sequence[Series]) -> Figure:
    figure, axes = _figure(4.2)
    for i, s in enumerate(shown):
        error = [
            [float(m) - b for m, b in zip(s.y, s.low, strict=True)],
            [h - float(m) for m, h in zip(s.y, s.high, strict=True)],
        ]
        axes.errorbar(
            [float(x) for x in s.x], [float(y) for y in s.y], [[max(0, e) for e in side] for side in error],
            fmt=MARKERS[i % len(MARKERS)], color=colour(s.name), label=s.name, markersize=5, elinewidth=0.8,
        )  # fmt: skip
    axes.axhline(100, color="#7b8794", linestyle=":", linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="time of a copy of as many bytes, ms", ylabel="% of a copy's bandwidth")
    _legend(axes)
    return figure


def _history(shown: Sequence[Series]) -> Figure:
    figure, axes = _figure(4.2)
    order = sorted({str(x) for s in shown for x in s.x}, key=lambda x: x.partition("<br>")[2])
    for s in shown:
        x, y = [order.index(str(value)) for value in s.x], [float(value) for value in s.y]
        axes.plot(x, y, marker=".", linewidth=1)
        worse = [i for i, marked in enumerate(s.marked) if marked]
        axes.plot([x[i] for i in worse], [y[i] for i in worse], "X", color="#d11f2f", markersize=9)
        for i in worse:
            axes.annotate(s.name, (x[i], y[i]), xytext=(8, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set_xticks(range(len(order)), [x.replace("<br>", "\n") for x in order], fontsize=7)
    axes.set_ylabel("tri_stn's time, first commit = 1")
    axes.margins(x=0.15)
    return figure
