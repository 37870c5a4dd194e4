"""What -1 and 1 mean under both values of align_corners, on an image of 4 × 3 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .page import ACCENT, INK, MUTED, PALE, page
from .photograph import Photo

WIDTH, HEIGHT = 4, 3


def draw(photo: Photo, path: Path) -> None:
    """Two panels; no photograph in them."""
    with page(1210, 490) as sheet:
        for place, align_corners in enumerate((False, True)):
            _panel(sheet.panel(20 + 590 * place, 80, 580, 400), align_corners)
        sheet.save(path, colours=64)


def _panel(axes: Any, align_corners: bool) -> None:
    from matplotlib.patches import Rectangle

    for row in range(HEIGHT):
        for column in range(WIDTH):
            ground = "#f5f7fa" if (row + column) % 2 else "white"
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=ground, edgecolor=PALE))
            axes.plot(column, row, "o", color=MUTED, markersize=4)
            axes.text(column + 0.06, row + 0.1, f"[{row}, {column}]", va="top", color=MUTED, size=9)
    edge = 0.0 if align_corners else 0.5
    left, right, top, bottom = -edge, WIDTH - 1 + edge, -edge, HEIGHT - 1 + edge
    axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=ACCENT, linewidth=2.2)
    for x, y, text, horizontal in ((left, top, "(-1, -1)", "right"), (right, bottom, "(1, 1)", "left")):
        axes.plot(x, y, "o", color=ACCENT, markersize=7)
        side = -0.12 if horizontal == "right" else 0.12
        axes.text(x + side, y - 0.13, text, ha=horizontal, va="center", color=ACCENT, weight="bold")
    middle = ((WIDTH - 1) / 2, (HEIGHT - 1) / 2)
    axes.plot(*middle, "+", color=ACCENT, markersize=12, markeredgewidth=2.2)
    axes.text(middle[0], middle[1] - 0.16, "(0, 0)", ha="center", va="bottom", color=ACCENT, weight="bold")
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3}
    axes.annotate("", (1.4, -0.95), (-0.5, -0.95), arrowprops=arrow)
    axes.text(1.5, -0.95, "x, along the width", va="center")
    axes.annotate("", (-1.2, 1.2), (-1.2, -0.5), arrowprops=arrow)
    axes.text(-1.2, 1.3, "y", ha="center", va="top")
    meaning = "the centres of the outermost pixels" if align_corners else "the outer edges of the image (default)"
    axes.set_title(f"align_corners={align_corners}\n±1 are {meaning}", size=12, pad=14)
    axes.set(xlim=(-1.7, WIDTH + 0.4), ylim=(HEIGHT - 0.2, -1.25), aspect="equal")
    axes.axis("off")
