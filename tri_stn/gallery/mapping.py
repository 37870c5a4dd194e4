"""Why samplers look backwards: a turn as a forward mapping, with its holes and overlaps, and as a reverse one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tri_stn

from .page import ACCENT, INK, MUTED, SECOND, Page, page
from .photograph import Photo

SIDE = 28
"""Pixels along a side of the input and of the outputs."""
ANGLE, ZOOM = 33.0, 1.1


def draw(photo: Photo, path: Path, side: int = SIDE) -> None:
    """The input between both mappings, and the forward one once more, with the weights that bilinear reading has."""
    image = photo.patch(side, side, shrink=max(1, min(photo.size) // 32))
    size = image.shape[-2:]
    forward = content_map(ANGLE, ZOOM, size).inverse()
    landed = landings(forward, size, size)
    inside = coverage(forward, size, size) > 0.5
    holes, overlaps = (landed == 0) & inside, landed > 1
    rounded = tri_stn.splat(image, forward, size, mode="nearest", normalize=True)
    spread, weight = (tri_stn.splat(x, forward, size, normalize=n) for x, n in ((image, True), (image * 0 + 1, False)))
    read = tri_stn.warp(image, forward.inverse(), size, fill=1)
    cell, gap, top = 300, 32, 132
    with page(4 * cell + 5 * gap, top + cell + 92) as sheet:
        columns = [gap + i * (cell + gap) for i in range(4)]
        titles = {
            "Forward mapping": "each input pixel is put\non the nearest output pixel",
            "Input": f"to be turned by {ANGLE:.0f}°\nand enlarged by {ZOOM:g}",
            "Reverse mapping: warp": "each output pixel reads where it\ncomes from, between four pixels",
            "Forward, spread: splat": "each input pixel is shared\nby four output pixels",
        }
        panels = []
        for x, (title, text), picture in zip(
            columns, titles.items(), (_on_white(rounded, landed > 0), image, read, _on_white(spread, weight > 0)),
            strict=True,
        ):  # fmt: skip
            sheet.write(x, 22, title, size=14, weight="bold")
            sheet.write(x, 54, text, color=MUTED, size=12)
            panels.append(sheet.picture(x, top, cell, cell, picture))
        first, source, second, _ = panels
        _mark(first, holes, ACCENT)
        _mark(first, overlaps, SECOND)
        y = top + cell + 14
        _count(sheet, columns[0], y, ACCENT, f"{int(holes.sum())} holes: nothing lands there")
        _count(sheet, columns[0], y + 28, SECOND, f"{int(overlaps.sum())} overlaps: two land there")
        sheet.write(columns[2], y, "every pixel has exactly one value:\nno holes, no overlaps", size=12)
        left = int(((weight[0, 0] == 0) & inside).sum())
        text = f"every pixel is a mean of shares:\n{left or 'no'} holes, but blurred"
        sheet.write(columns[3], y, text, size=12)
        pixel = round(size[0] * 0.3), round(size[1] * 0.55)
        _arrow(sheet, source, first, *_pairs(forward, size, *pixel, rounded=True))
        pixel = round(size[0] * 0.7), round(size[1] * 0.45)
        _arrow(sheet, second, source, *_pairs(forward.inverse(), size, *pixel, rounded=False))
        sheet.save(path)


def content_map(angle: float, zoom: float, size: torch.Size | tuple[int, int]) -> tri_stn.Affine:
    """What turns the content by an angle in degrees and enlarges it, for `tri_stn.warp`."""
    turn = tri_stn.rotation(angle, degrees=True, size=size)
    return tri_stn.Affine(tri_stn.compose(turn, tri_stn.scaling(zoom)))


def landings(
    forward: tri_stn.Affine, size: tuple[int, int] | torch.Size, output_size: tuple[int, int] | torch.Size
) -> Tensor:
    """How many pixels of an input (H, W) the forward mapping rounds to each pixel of the output: integers, (H, W)."""
    ones = torch.ones(1, 1, *size, device=forward.theta.device)
    return tri_stn.splat(ones, forward, output_size, mode="nearest")[0, 0].round().long()


def coverage(
    forward: tri_stn.Affine, size: tuple[int, int] | torch.Size, output_size: tuple[int, int] | torch.Size
) -> Tensor:
    """1 where a pixel of the output has its middle on the moved input, 0 elsewhere: (H, W)."""
    ones = torch.ones(1, 1, *size, device=forward.theta.device)
    return tri_stn.warp(ones, forward.inverse(), output_size, mode="nearest")[0, 0]


def _on_white(image: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, image, 1.0)


def _mark(axes: Any, where: Tensor, colour: str) -> None:
    from matplotlib.patches import Rectangle

    for row, column in where.nonzero().tolist():
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.4))


def _count(sheet: Page, x: float, y: float, colour: str, text: str) -> None:
    from matplotlib.patches import Rectangle

    axes = sheet.panel(x, y + 1, 15, 15)
    axes.add_patch(Rectangle((0, 0), 1, 1, color=colour))
    axes.axis("off")
    sheet.write(x + 24, y, text, size=12)


def _pairs(
    transform: tri_stn.Affine, size: torch.Size, row: int, column: int, rounded: bool
) -> tuple[tuple[float, float], tuple[float, float]]:
    """A pixel (x, y) and where the map sends it, in pixels of images of the same size."""
    scale = torch.tensor([size[1] / 2, size[0] / 2])
    point = (torch.tensor([column, row]) + 0.5) / scale - 1
    theta = transform.theta[0].cpu()
    x, y = (((theta[:, :2] @ point + theta[:, 2]) + 1) * scale - 0.5).tolist()
    return (column, row), (round(x), round(y)) if rounded else (x, y)


def _arrow(sheet: Page, a: Any, b: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From a pixel of one panel to a place in another."""
    from matplotlib.patches import ConnectionPatch, Rectangle
    from matplotlib.patheffects import withStroke

    seam = [withStroke(linewidth=4.5, foreground="white")]  # to be seen on any photograph
    for axes, (x, y) in ((a, start), (b, end)):
        corner = x - 0.5, y - 0.5
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=1.8, zorder=3, path_effects=seam))
    sheet.figure.add_artist(
        ConnectionPatch(
            start, end, "data", "data", axesA=a, axesB=b, arrowstyle="-|>", color=INK, linewidth=1.8, mutation_scale=16,
            connectionstyle="arc3,rad=0.15", shrinkA=7, shrinkB=7, path_effects=seam,
        )
    )  # fmt: skip
