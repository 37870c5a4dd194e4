"""Every transform, on a grid and on a photograph, with the code that makes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tri_stn

from .page import ACCENT, MUTED, page
from .photograph import Photo

CODE = {
    "The input": "",
    "Affine": "Affine(tensor([[[0.9, 0.5, 0.1],\n  [-0.3, 1.1, 0.0]]]))",
    "Attention": "Attention(scale=tensor([0.5]),\n  translation=tensor([[-0.3, 0.1]]))",
    "Similarity": "Similarity(scale=tensor([0.8]), angle=\n  tensor([0.5]), translation=zeros(1, 2))",
    "Projective": "Projective(tensor([[[1.0, 0.2, 0.0],\n  [0.0, 1.0, 0.0], [0.1, 0.5, 1.0]]]))",
    "ThinPlateSpline": "ThinPlateSpline(points, points + moves)\n# 5 points: the corners and the middle",
    "FreeForm": "FreeForm(0.15 * randn(1, 6, 6, 2))\n# cubic B-splines between 6 × 6 points",
    "PiecewiseAffine": "PiecewiseAffine(points, triangles,\n  points + moves)  # four triangles",
    "LinearBasis": "LinearBasis(coefficients, basis)\n# basis: x, y, x², y², sin 3x, sin 3y",
    "Displacement": 'Displacement(field, unit="pixel")\n# a wave, one vector for each pixel',
    "Velocity": "Velocity(swirl, steps=7)\n# the flow of a field: never folds",
    "Compose": "Compose(Affine(turn), FreeForm(lattice))\n# two maps, and the input is read once",
}
"""Class → the code below its pictures, which is what runs."""

CELLS = 12
"""Of the pattern, along each axis."""


def draw(photo: Photo, path: Path, width: int = 204) -> None:
    """Three columns of cells; in each a grid, a photograph and their code."""
    size = 2 * width, 2 * width  # drawn at twice the size, then averaged: fine lines stay even
    names = vars(tri_stn) | vars(_numbers(size, photo.pixels.device))
    square = photo.patch(min(photo.size), min(photo.size))
    inputs = [pattern(size).to(square), F.interpolate(square, size, mode="bilinear", antialias=True)]
    gap, margin, head, foot = 8, 28, 34, 62
    cell = 2 * width + gap
    with page(3 * cell + 4 * margin, 4 * (head + width + foot) + 24) as sheet:
        for i, (name, code) in enumerate(CODE.items()):
            x, y = margin + (i % 3) * (cell + margin), 16 + (i // 3) * (head + width + foot)
            sheet.write(x, y, name, size=14, weight="bold", color=ACCENT if code else MUTED)
            transform = eval(code, dict(names)) if code else tri_stn.Affine(torch.eye(2, 3)[None].to(square))
            for k, image in enumerate(inputs):
                output = tri_stn.warp(image, transform, size, fill=1)
                sheet.picture(x + k * (width + gap), y + head, width, width, F.avg_pool2d(output, 2))
            sheet.write(x, y + head + width + 8, code, size=10.5, family="monospace", linespacing=1.35)
            if not code:
                sheet.write(x, y + head + width + 8, "a pattern, and a photograph", size=11, color=MUTED)
        sheet.save(path, colours=160)


def pattern(size: tuple[int, int]) -> Tensor:
    """Lines on a ground of four tints, one for each quarter, so that turns and mirrors show: (1, 3, *size)."""
    tints = torch.tensor([[[0.98, 0.80, 0.74], [0.84, 0.90, 0.96]], [[0.86, 0.94, 0.86], [0.99, 0.94, 0.80]]])
    ground = F.interpolate(tints.permute(2, 0, 1)[None], size, mode="nearest")
    light = torch.ones(size)
    for axis, n in enumerate(size):
        cell, line = n / CELLS, n / 150  # in pixels
        place = torch.arange(n) + 0.5
        away = (place - (place / cell).round() * cell).abs()
        covered = (line / 2 + 0.5 - away).clamp(0, 1)  # how much of a pixel the line covers: no jagged edges
        light = torch.minimum(light, (1 - 0.85 * covered).unsqueeze(1 - axis))
    return ground * light


def _numbers(size: tuple[int, int], device: torch.device) -> Any:
    """The tensors that the code speaks of."""
    height, width = size
    generator = torch.Generator().manual_seed(4)
    y, x = torch.meshgrid(_places(height), _places(width), indexing="ij")
    swirl = torch.stack([-y, x], -1) * (1.6 * torch.exp(-3 * (x * x + y * y)))[..., None]
    wave = torch.stack([width * 0.03 * torch.sin(9 * y), height * 0.03 * torch.sin(9 * x)], -1)
    points = [[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    found = {
        "points": torch.tensor(points),
        "moves": torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.3, -0.35]]]),
        "triangles": torch.tensor([[0, 1, 4], [1, 3, 4], [3, 2, 4], [2, 0, 4]]),
        "basis": torch.stack([x, y, x * x, y * y, torch.sin(3 * x), torch.sin(3 * y)]),
        "coefficients": torch.tensor([[[1.0, 0, 0, 0.25, 0, 0.12], [0, 1.0, -0.25, 0, 0.12, 0]]]),
        "turn": tri_stn.rotation(30, degrees=True),
        "field": wave[None],
        "swirl": swirl[None],
        "lattice": 0.12 * torch.randn(1, 6, 6, 2, generator=generator),
    }
    tensors: dict[str, Any] = {name: value.to(device) for name, value in found.items()}

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, device=device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    return SimpleNamespace(**tensors, randn=randn, tensor=tensor, zeros=zeros)


def _places(n: int) -> Tensor:
    """Middles of n pixels, normalised."""
    return (2 * torch.arange(n) + 1) / n - 1
