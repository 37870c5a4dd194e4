"""The README's figures: coordinates, and shrinking against aliasing. Run `python -m bench.figures [--out DIR]`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 4, 3
INK, ACCENT, MUTED, PALE = "#1f2933", "#e4572e", "#7b8794", "#e4e7eb"


def coordinates(path: Path) -> None:
    """What -1 and 1 mean under both values of align_corners, on an image of 4 × 3 pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 11, "text.color": INK}):
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), facecolor="white")
        for axes, align_corners in zip(panels, (False, True), strict=True):
            _panel(axes, align_corners)
        figure.subplots_adjust(left=0.02, right=0.98, top=0.84, bottom=0.05, wspace=0.02)
        temporary = path.with_name(f".{path.name}.tmp")
        figure.savefig(temporary, format="png", dpi=110)
        os.replace(temporary, path)
        plt.close(figure)


def _panel(axes: Any, align_corners: bool) -> None:
    for row in range(HEIGHT):
        for column in range(WIDTH):
            axes.add_patch(_square(column, row))
            axes.plot(column, row, "o", color=MUTED, markersize=4)
            axes.text(column + 0.07, row + 0.1, f"[{row}, {column}]", va="top", color=MUTED, size=9)
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
    axes.set(xlim=(-1.7, WIDTH + 0.4), ylim=(HEIGHT - 0.05, -1.25), aspect="equal")
    axes.axis("off")


def _square(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="white" if (x + y) % 2 else "#f5f7fa", edgecolor=PALE)


SHRINK = 6


def antialias(path: Path) -> None:
    """A photograph shrunk to a sixth: read once per pixel, averaged inside the kernel, and by Pillow."""
    import matplotlib
    import numpy as np
    import torch
    from PIL import Image
    from sklearn.datasets import load_sample_image

    import tri_stn

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    photo = load_sample_image("china.jpg")
    height, width = (n // SHRINK for n in photo.shape[:2])
    photo = np.ascontiguousarray(photo[: height * SHRINK, : width * SHRINK])
    image, theta = torch.from_numpy(photo).permute(2, 0, 1)[None].float(), torch.eye(2, 3)[None]

    def warped(**options: Any) -> Any:
        output = tri_stn.warp(image, tri_stn.Affine(theta), (height, width), padding_mode="border", **options)
        return output[0].permute(1, 2, 0).round().byte().numpy()

    def pillow(filter: Any) -> Any:
        return np.asarray(Image.fromarray(photo).resize((width, height), filter))

    columns = {
        "warp(…)\none sample per pixel": warped(),
        "warp(…, antialias=True)\n6 × 6 samples, in the kernel": warped(antialias=True),
        "Pillow, BILINEAR\n": pillow(Image.Resampling.BILINEAR),
        "Pillow, LANCZOS\n": pillow(Image.Resampling.LANCZOS),
    }
    with plt.rc_context({"font.size": 11, "text.color": INK}):
        figure, panels = plt.subplots(2, len(columns), figsize=(12, 4.75), facecolor="white")
        for (label, picture), (whole, part) in zip(columns.items(), panels.T, strict=True):
            whole.imshow(picture, interpolation="nearest")
            whole.set_title(label, size=12)
            part.imshow(picture[ZOOM], interpolation="nearest")
            rows, across = ZOOM
            frame = (across.start - 0.5, rows.start - 0.5), across.stop - across.start, rows.stop - rows.start
            whole.add_patch(_frame(*frame))
            for axes in (whole, part):
                axes.set(xticks=[], yticks=[])
        figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.01, wspace=0.03, hspace=0.03)
        temporary = path.with_name(f".{path.name}.tmp")
        figure.savefig(temporary, format="png", dpi=110)
        os.replace(temporary, path)
        plt.close(figure)


ZOOM = (slice(27, 61), slice(12, 63))  # rows and columns of the shrunk picture


def _frame(corner: tuple[float, float], width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, fill=False, edgecolor=ACCENT, linewidth=1.5)


def main() -> None:
    """Draw every figure."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    out = parser.parse_args().out
    coordinates(out / "coordinates.png")
    antialias(out / "antialias.png")


if __name__ == "__main__":
    main()
