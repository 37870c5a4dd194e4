"""The photograph that the pictures are made from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tri_stn

from . import GalleryError

LARGEST, SMALLEST = 640, 48
"""Pixels: the longer side of a given photograph, to which it is shrunk; and the least that a shorter side may have."""


@dataclass(frozen=True)
class Photo:
    """Pixels (1, 3, H, W), fp32 from 0 to 1, and the place worth looking at closely: (x, y), fractions of the size."""

    pixels: Tensor
    focus: tuple[float, float] = (0.5, 0.5)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def to(self, device: torch.device | str) -> Photo:
        return replace(self, pixels=self.pixels.to(device))

    def resized(self, size: tuple[int, int]) -> Tensor:
        """(1, 3, *size): the whole photograph, averaged where it shrinks."""
        return _whole(self.pixels, size)

    def patch(self, height: int, width: int, shrink: int = 1) -> Tensor:
        """(1, 3, height, width) about the focus, of the photograph shrunk by an integer; less where there is less."""
        rows, columns = self.size
        pixels = self.resized((max(1, rows // shrink), max(1, columns // shrink)))
        top, left = self.corner(height, width, pixels)
        return pixels[..., top : top + height, left : left + width]

    def corner(self, height: int, width: int, pixels: Tensor | None = None) -> tuple[int, int]:
        """(row, column) of the upper left pixel of the patch (height, width) about the focus."""
        rows, columns = self.size if pixels is None else pixels.shape[-2:]
        top, left = round(self.focus[1] * rows - height / 2), round(self.focus[0] * columns - width / 2)
        return min(max(top, 0), max(rows - height, 0)), min(max(left, 0), max(columns - width, 0))


def bundled() -> Photo:
    """scikit-learn's photograph of a pagoda, 427 × 640 pixels."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    return Photo(pixels, focus=(0.34, 0.61))


def prepare(pixels: Tensor) -> Photo:
    """A photograph (1, C, H, W) from 0 to 1 of 1 to 4 channels, as the pictures take it: RGB, and not large."""
    if min(pixels.shape[-2:]) < SMALLEST:
        height, width = pixels.shape[-2:]
        raise GalleryError(
            f"The photograph needs at least {SMALLEST} pixels along each side; this one is {width} × {height}."
        )
    if pixels.shape[1] in (2, 4):  # on white paper
        pixels = pixels[:, :-1] * pixels[:, -1:] + 1 - pixels[:, -1:]
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
    height, width = pixels.shape[-2:]
    if max(height, width) > LARGEST:
        shrink = LARGEST / max(height, width)
        pixels = _whole(pixels, (max(SMALLEST, round(height * shrink)), max(SMALLEST, round(width * shrink))))
    return Photo(pixels.float().contiguous())


def _whole(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    identity = torch.eye(2, 3, device=pixels.device)[None]
    return tri_stn.warp(pixels, tri_stn.Affine(identity), size, padding_mode="border", antialias=True)
