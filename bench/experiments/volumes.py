"""Heads to register: a skull around grey matter, white matter and ventricles, all about ellipsoids.

Every subject is the same anatomy behind a smooth map of its own: an affine one (rotation, scales, shear, shift) plus a
few sine waves. Volumes are computed from the anatomy's formula at the mapped places, so that nothing is interpolated,
with brightness that varies slowly, and noise. Labels come from the same formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LABELS = ("skull", "grey matter", "white matter", "ventricles")
"""Of the label maps, from 1; 0 is all else."""

RADII = torch.tensor([0.72, 0.80, 0.64])
"""Of the head, (z, y, x), where a volume reaches from -1 to 1."""
VENTRICLES = torch.tensor([0.20, 0.32, 0.10])

ROTATION, SCALE, SHEAR, SHIFT = 0.2, 0.1, 0.06, 0.08
"""The largest of each: radians about each axis, share, slope, and of a half-width."""
WAVES, AMPLITUDE, FREQUENCY = 6, 0.035, 4.0
"""Sine waves of each component: how many, how high (a half-width), and the largest of their radians per half-width."""
NOISE, SHADING, CONTRAST = 0.03, 0.15, 0.1


@dataclass(frozen=True)
class Heads:
    """Subjects: volumes (S, 1, D, H, W) in fp32, about 0 to 1, and their labels (S, 1, D, H, W) in uint8."""

    volumes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: Tensor) -> Heads:
        return Heads(self.volumes[index], self.labels[index])

    def to(self, device: torch.device) -> Heads:
        return Heads(self.volumes.to(device), self.labels.to(device))


def heads(count: int, side: int, seed: int) -> Heads:
    """So many subjects as cubes of ``side`` voxels; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    axis = (torch.arange(side) * 2 + 1) / side - 1
    places = torch.cartesian_prod(axis, axis, axis)  # (V, 3), (z, y, x)
    volumes, labels = zip(*(_head(places, side, generator) for _ in range(count)), strict=True)
    return Heads(*(torch.stack(parts).view(count, 1, side, side, side) for parts in (volumes, labels)))


def _head(places: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One subject's brightness (V,) and labels (V,)."""
    levels = _levels(
        places @ _linear(generator).mT + SHIFT * _either(3, generator=generator) + _waves(places, generator)
    )
    bone, fluid, grey, white = torch.tensor([0.9, 0.15, 0.55, 0.85]) + CONTRAST * _either(4, generator=generator) / 2
    brightness = torch.zeros(len(places))
    # From the outside in; edges are as soft as half a voxel.
    for level, inside in zip(levels, (bone, fluid, grey, white, fluid), strict=True):
        brightness = torch.lerp(brightness, inside, torch.sigmoid(level * side))
    shade = 1 + SHADING * torch.sin(
        places @ _either(3, generator=generator) * 1.5 + 3 * _either(1, generator=generator)
    )
    noise = NOISE * torch.randn(len(places), generator=generator)
    head, skull, brain, core, ventricle = (level > 0 for level in levels)
    labels = torch.zeros(len(places), dtype=torch.uint8)
    for value, where in enumerate((head & ~skull, brain & ~core, core & ~ventricle, ventricle), 1):
        labels[where] = value
    return brightness * shade + noise, labels


def _levels(q: Tensor) -> list[Tensor]:
    """How deep, about, places (V, 3) lie inside the surfaces of head, inner skull, brain, white matter, ventricles."""
    depth = [RADII.mean() * (share - (q / RADII).norm(dim=1)) for share in (1.0, 0.85, 0.79)]
    folds = torch.sin(9 * q[:, 0] + 1) * torch.sin(8 * q[:, 1]) + torch.sin(7 * q[:, 2]) * torch.sin(8 * q[:, 0] + 2)
    white = depth[2] - 0.13 + 0.06 * folds
    aside = q - torch.tensor([0.05, 0.0, 0.0])
    aside = torch.stack([aside[:, 0], aside[:, 1], aside[:, 2].abs() - 0.13], 1)
    return [*depth, white, VENTRICLES.mean() * (1 - (aside / VENTRICLES).norm(dim=1))]


def _linear(generator: torch.Generator) -> Tensor:
    """(3, 3): turned about each axis, sheared and scaled."""
    linear = torch.eye(3)
    for axis, angle in enumerate((ROTATION * _either(3, generator=generator)).tolist()):
        turn, (a, b) = torch.eye(3), [i for i in range(3) if i != axis]
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        linear = linear @ turn
    shear = torch.eye(3) + SHEAR * _either(3, 3, generator=generator).triu(1)
    return linear @ shear * (1 + SCALE * _either(3, generator=generator))


def _waves(places: Tensor, generator: torch.Generator) -> Tensor:
    """(V, 3): smooth displacements; their slopes stay far below one, so that nothing folds."""
    height = AMPLITUDE * _either(WAVES, 3, generator=generator)
    frequency = FREQUENCY * _either(3, WAVES, generator=generator) / 3**0.5
    return torch.sin(places @ frequency + math.pi * _either(WAVES, generator=generator)) @ height


def _either(*shape: int, generator: torch.Generator) -> Tensor:
    """Uniform from -1 to 1."""
    return 2 * torch.rand(*shape, generator=generator) - 1
