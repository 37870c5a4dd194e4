"""A photograph shrunk to a sixth: read once per pixel, averaged inside the kernel, and by Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tri_stn

from .page import ACCENT, page
from .photograph import Photo

SHRINK = 6
DETAIL = (34, 51)
"""Rows and columns of the shrunk picture that are shown enlarged."""


def draw(photo: Photo, path: Path, shrink: int = SHRINK) -> None:
    """Four ways in four columns; above the whole picture, below the detail in its frame."""
    from matplotlib.patches import Rectangle

    columns = shrunk(photo, shrink)
    rows, across = next(iter(columns.values())).shape[-2:]
    detail = min(DETAIL[0], rows), min(DETAIL[1], across)
    width, gap = 316, 10
    tops, heights = (60, 70 + width * rows // across), (width * rows // across, width * detail[0] // detail[1])
    with page(4 * width + 5 * gap, tops[1] + heights[1] + gap) as sheet:
        for i, (label, picture) in enumerate(columns.items()):
            x = gap + i * (width + gap)
            sheet.write(x + width / 2, 14, label, size=12, ha="center")
            top, left = photo.corner(*detail, picture)
            whole = sheet.picture(x, tops[0], width, heights[0], picture)
            whole.add_patch(
                Rectangle((left - 0.5, top - 0.5), detail[1], detail[0], fill=False, edgecolor=ACCENT, linewidth=1.5)
            )
            part = picture[..., top : top + detail[0], left : left + detail[1]]
            sheet.picture(x, tops[1], width, heights[1], part)
        sheet.save(path)


def shrunk(photo: Photo, shrink: int) -> dict[str, Tensor]:
    """What each column is called, and its picture (1, 3, H // shrink, W // shrink)."""
    from PIL import Image

    height, width = (n // shrink for n in photo.size)
    pixels = photo.pixels[..., : height * shrink, : width * shrink]
    theta = torch.eye(2, 3, device=pixels.device)[None]
    bytes = pixels[0].movedim(0, -1).mul(255).round().byte().cpu().numpy()

    def warped(**options: Any) -> Tensor:
        return tri_stn.warp(pixels, tri_stn.Affine(theta), (height, width), padding_mode="border", **options)

    def pillow(filter: Image.Resampling) -> Tensor:
        small = Image.fromarray(bytes).resize((width, height), filter)
        return (
            torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(1, height, width, 3).movedim(-1, 1)
            / 255
        )

    return {
        "warp(…)\none sample per pixel": warped(),
        f"warp(…, antialias=True)\n{shrink} × {shrink} samples, in the kernel": warped(antialias=True),
        "Pillow, BILINEAR\n": pillow(Image.Resampling.BILINEAR),
        "Pillow, LANCZOS\n": pillow(Image.Resampling.LANCZOS),
    }
