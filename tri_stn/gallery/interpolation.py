"""What lies between the pixels: nearest, bilinear and bicubic, on a patch of a photograph and along a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tri_stn

from .page import ACCENT, INK, MUTED, PALE, page
from .photograph import Photo

MODES = {
    "nearest": "the value of the nearest pixel",
    "bilinear": "straight between pixels (2 × 2)",
    "bicubic": "smooth, may overshoot (4 × 4)",
}
PATCH = (16, 16)
SAMPLES = (0.30, 0.34, 0.28, 0.85, 0.88, 0.55, 0.12, 0.20)
"""Heights of the line's samples: a flat part, a step and a slope."""


def draw(photo: Photo, path: Path, patch: tuple[int, int] = PATCH) -> None:
    """The photograph and its samples on the left, and a column for each mode."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    cell, gap, top, below = 300, 24, 84, 210
    height, width = (min(n, m) for n, m in zip(patch, photo.size, strict=True))
    image = photo.patch(height, width)
    with page(4 * cell + 5 * gap, top + cell + 28 + below + 52) as sheet:
        columns = [gap + i * (cell + gap) for i in range(4)]
        lower = top + cell + 28
        rows, across = photo.size
        part = photo.patch(min(rows, across), min(rows, across))  # a square, as the patches are
        whole = sheet.picture(columns[0], top, cell, cell, part)
        offset, corner = photo.corner(*part.shape[-2:]), photo.corner(height, width)
        whole.add_patch(
            Rectangle(
                (corner[1] - offset[1] - 0.5, corner[0] - offset[0] - 0.5), width, height, fill=False,
                edgecolor=ACCENT, path_effects=[withStroke(linewidth=4, foreground="white")], linewidth=2,
            )
        )  # fmt: skip
        _head(sheet, columns[0], "Between the pixels", f"the {width} × {height} pixels in the frame")
        dots = _axes(sheet, columns[0], lower, cell, below, "samples along a line")
        dots.vlines(range(len(SAMPLES)), 0, SAMPLES, color=PALE, linewidth=2, zorder=1)
        for x, (mode, text) in zip(columns[1:], MODES.items(), strict=True):
            _head(sheet, x, f'mode="{mode}"', text)
            axes = sheet.picture(x, top, cell, cell, zoomed(image, mode, (cell, cell)))
            axes.spines[:].set(color=ACCENT, linewidth=1.5)
            curve = _axes(sheet, x, lower, cell, below, "read everywhere between")
            places, values = between(SAMPLES, mode)
            curve.plot(places.numpy(), values.numpy(), color=ACCENT, linewidth=2.2, zorder=2)
        sheet.save(path)  # in all its colours: few would be bands where it should be smooth


def zoomed(image: Tensor, mode: str, size: tuple[int, int]) -> Tensor:
    """The whole image (1, C, H, W) read at more places than it has pixels."""
    identity = torch.eye(2, 3, device=image.device)[None]
    return tri_stn.warp(image, tri_stn.Affine(identity), size, mode=mode, padding_mode="border")


def between(samples: tuple[float, ...], mode: str, steps: int = 600) -> tuple[Tensor, Tensor]:
    """Places in pixels, from the first sample to the last, and what a 1-D warp reads there."""
    line = torch.tensor(samples)[None, None]
    identity = torch.eye(1, 2)[None]
    values = tri_stn.warp(
        line, tri_stn.Affine(identity), (steps,), mode=mode, padding_mode="border", align_corners=True
    )
    return torch.linspace(0, len(samples) - 1, steps), values[0, 0]


def _head(sheet: Any, x: float, title: str, text: str) -> None:
    sheet.write(x, 18, title, size=14, weight="bold")
    sheet.write(x, 50, text, color=MUTED, size=11)


def _axes(sheet: Any, x: float, y: float, width: float, height: float, label: str) -> Any:
    axes = sheet.panel(x, y, width, height)
    axes.plot(range(len(SAMPLES)), SAMPLES, "o", color=INK, markersize=7, zorder=3)
    axes.set(xlim=(-0.5, len(SAMPLES) - 0.5), ylim=(0, 1.08))
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set(color=MUTED)
    axes.set_xlabel(label, size=12, labelpad=8)
    return axes
