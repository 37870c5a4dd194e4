"""Where the output's pixels lie in the input (Jaderberg et al. 2015, figure 3), and what they read there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tri_stn

from .page import ACCENT, MUTED, page
from .photograph import Photo

POINTS = (11, 15)
"""Rows and columns of the points that are shown."""
REACH = 8
"""How far beyond the image, in normalised coordinates, a point is still found."""


def draw(photo: Photo, path: Path, points: tuple[int, int] = POINTS) -> None:
    """The input with the points of one map above, and the output with the same points below; a column for each map."""
    cell, gap, top, middle, margin = 312, 16, 78, 58, 0.04
    height = round(cell * photo.size[0] / photo.size[1])
    device = photo.pixels.device
    with page(4 * cell + 5 * gap, top + 2 * height + middle + 52) as sheet:
        for i, (title, (text, transform)) in enumerate(_maps(photo.size, device).items()):
            x = gap + i * (cell + gap)
            sheet.write(x, 16, title, size=14, weight="bold")
            sheet.write(x, 48, text, size=11, color=MUTED)
            above = sheet.picture(x, top, cell, height, photo.pixels)
            output = tri_stn.warp(photo.pixels, transform, (2 * height, 2 * cell), fill=1, mode="bicubic")
            below = sheet.picture(x, top + height + middle, cell, height, output)
            found, edge = looked_at(transform, points), outline(transform)
            regular = looked_at(tri_stn.Affine(torch.eye(2, 3, device=device)[None]), points)
            square = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
            for axes, dots, line, size in (
                (above, found, edge, photo.size), (below, regular, square, (2 * height, 2 * cell))
            ):  # fmt: skip
                _dots(axes, dots, line, size)
            # A margin, for points that lie outside the photograph.
            rows, columns = photo.size
            above.set(xlim=(-margin * columns, (1 + margin) * columns), ylim=((1 + margin) * rows, -margin * rows))
            above.spines[:].set_visible(False)
        notes = "input: where each pixel of the output looks", "output: the same pixels, with what they found there"
        for y, note in zip((top + height, top + 2 * height + middle), notes, strict=True):
            sheet.write(gap, y + 12, note, size=12)
        sheet.save(path, colours=256)


def looked_at(transform: Any, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """The points of the input, normalised, (rows × columns, 2), that an output of this size looks at.

    They are what one more warp reads in a picture of coordinates, which is itself made larger by `REACH`.
    """
    device = transform.parameters.device
    line = torch.tensor([-1.0, 1.0], device=device) * REACH
    picture = torch.stack(torch.meshgrid(line, line, indexing="xy"))[None]
    middle = 1 if align_corners else 0.5  # of the picture's pixels, which are two along each axis
    shrink = torch.eye(2, 3, device=device)[None] * (middle / REACH)
    read = tri_stn.warp(picture, tri_stn.Compose(transform, tri_stn.Affine(shrink)), size, align_corners=align_corners)
    return read[0].flatten(1).T.cpu()


def outline(transform: Any, steps: int = 64) -> Tensor:
    """The edge of the output as it lies in the input, (4 × steps, 2), for a transform that is not dense."""
    grid = looked_at(transform, (steps, steps), align_corners=True).view(steps, steps, 2)
    sides = grid[0], grid[:, -1], grid[-1].flip(0), grid[:, 0].flip(0)
    return torch.cat(sides)


def _maps(size: tuple[int, int], device: torch.device) -> dict[str, tuple[str, Any]]:
    places = torch.tensor([[x, y] for y in (-1.0, 0.0, 1.0) for x in (-1.0, 0.0, 1.0)])
    moved = places * 0.72
    moved[1::3, 1] += 0.2  # the middle column sags
    moved[:, 0] -= 0.2
    identity, turn = torch.eye(2, 3)[None], tri_stn.rotation(25, degrees=True, size=size)
    window = tri_stn.compose(turn, tri_stn.scaling(1.8), tri_stn.translation((0.3, -0.1)))
    matrix = torch.tensor([[[0.55, 0.05, -0.1], [0.02, 0.55, 0.12], [0.02, 0.3, 1.0]]])
    return {
        "Identity": ("each pixel looks at its own place", tri_stn.Affine(identity.to(device))),
        "Affine": ("a window, moved and turned", tri_stn.Affine(window.to(device))),
        "Projective": ("as from another point of view", tri_stn.Projective(matrix.to(device))),
        "ThinPlateSpline": (
            "bent by nine points", tri_stn.ThinPlateSpline(places.to(device), moved[None].to(device))
        ),
    }  # fmt: skip


def _dots(axes: Any, points: Tensor, edge: Tensor, size: tuple[int, int]) -> None:
    """Normalised points and a closed line, in pixels of an image of this size."""
    from matplotlib.patches import Polygon

    scale = torch.tensor([size[1] / 2, size[0] / 2])
    places, line = ((p + 1) * scale - 0.5 for p in (points, edge))
    axes.add_patch(Polygon(line.tolist(), fill=False, edgecolor=ACCENT, linewidth=2.2, clip_on=False, zorder=4))
    axes.plot(
        *places.T.tolist(), "o", color=ACCENT, markersize=3.6, markeredgecolor="white", markeredgewidth=0.6,
        clip_on=False,
    )  # fmt: skip
