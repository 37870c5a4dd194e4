"""The kinds of maps that workloads draw: each with its numbers, the transform that tri_stn takes, and the
sampling grid in plain torch as its users make it.

This is the one place where a workload's transform is built: providers, the fp64 truth and the mask of
kinks all go through it. Axes of a size are in a shape's order, those of a point x first.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tri_stn.transforms import Transform

Range = tuple[float, float]
Kept = tuple[Tensor, ...]
"""What users make once and keep as buffers beside their module."""


@dataclass(frozen=True)
class Maps:
    """How the affine maps of a workload are drawn: uniformly from these ranges, one per output.

    Each axis draws a scale and a translation of its own. A map of scale s looks at the share s of
    the image. Its numbers are theta (d, d + 1).
    """

    scale: Range
    angle: Range = (0.0, 0.0)
    """Degrees; of a volume, about its diagonal, so that all axes mix."""
    shift: Range = (0.0, 0.0)
    """Normalised: 2 is the whole image."""
    kind: str = field(default="affine", init=False)

    @property
    def dense(self) -> bool:
        """Whether it has numbers of its own for each output pixel."""
        return False

    def shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one map's numbers for an output size."""
        return len(size), len(size) + 1

    def draw(self, count: int, size: tuple[int, ...], seed: int) -> Tensor:
        """So many maps' numbers, (count, *shape) in fp32 on the CPU: the same on every device."""
        return self._affine(count, len(size), torch.Generator().manual_seed(seed))

    def _affine(self, count: int, dims: int, generator: torch.Generator) -> Tensor:
        scale, shift = (_uniform(bounds, count, dims, generator=generator) for bounds in (self.scale, self.shift))
        angle = _uniform(self.angle, count, generator=generator) * math.pi / 180
        if dims == 2:
            cos, sin = angle.cos(), angle.sin()
            rotation = torch.stack([cos, -sin, sin, cos], -1).view(count, 2, 2)
        else:
            third = 1 / math.sqrt(3)
            turn = torch.tensor([[0, -third, third], [third, 0, -third], [-third, third, 0]])
            rotation = torch.linalg.matrix_exp(angle[:, None, None] * turn)
        return torch.cat([rotation * scale[:, None], shift[..., None]], -1)

    def transform(self, theta: Tensor) -> Transform:
        """The numbers (*lead, *shape) as tri_stn takes them."""
        import tri_stn

        return tri_stn.Affine(theta)

    def amplification(self, theta: Tensor, size: tuple[int, ...]) -> tuple[float, float]:
        """How much larger than a coordinate the terms are that it is the sum of, and than the gradient of
        a number those that it is the sum of: what rounding leaves is as much larger.
        """
        return 1.0, 1.0

    def kept(self, size: tuple[int, ...], input_size: tuple[int, ...], align_corners: bool, like: Tensor) -> Kept:
        """The buffers of `grid`, on the device and in the dtype of `like`, computed in fp64."""
        return ()

    def grid(self, theta: Tensor, kept: Kept, size: tuple[int, ...], align_corners: bool) -> Tensor:
        """The numbers of m maps (m, *shape) → where each output pixel looks, (m, *size, d), normalised."""
        return F.affine_grid(theta, [len(theta), 1, *size], align_corners=align_corners)


@dataclass(frozen=True)
class Homographies(Maps):
    """Projective maps: affine ones with a tilt, a matrix (d + 1, d + 1)."""

    tilt: Range = (-0.2, 0.2)
    """The last row but its 1; so small that nothing in view is behind infinity."""
    kind: str = field(default="projective", init=False)

    def shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return len(size) + 1, len(size) + 1

    def draw(self, count: int, size: tuple[int, ...], seed: int) -> Tensor:
        generator, dims = torch.Generator().manual_seed(seed), len(size)
        theta = self._affine(count, dims, generator)
        tilt = _uniform(self.tilt, count, 1, dims, generator=generator)
        return torch.cat([theta, torch.cat([tilt, torch.ones(count, 1, 1)], -1)], -2)

    def transform(self, theta: Tensor) -> Transform:
        import tri_stn

        return tri_stn.Projective(theta)

    def kept(self, size: tuple[int, ...], input_size: tuple[int, ...], align_corners: bool, like: Tensor) -> Kept:
        points = _identity(size, align_corners, like).flatten(0, -2)
        return (torch.cat([points, torch.ones_like(points[:, :1])], -1).to(like.dtype),)

    def grid(self, theta: Tensor, kept: Kept, size: tuple[int, ...], align_corners: bool) -> Tensor:
        moved = kept[0] @ theta.transpose(-1, -2)
        return (moved[..., :-1] / moved[..., -1:]).view(len(theta), *size, len(size))


@dataclass(frozen=True)
class Splines:
    """Thin-plate splines that read a bent strip straight; the numbers are the source points (points, 2).

    The target points lie along the upper and the lower edge of the output, as in rectifiers of text.
    """

    points: int
    scale: float
    """Of the strip, as a share of the image."""
    bend: float
    """How far the strip is bent at most, normalised: half a wave up and down, of another phase in each map."""
    noise: float = 0.02
    """How far each point is moved besides, at most."""
    kind: str = field(default="thin_plate", init=False)
    dense: bool = field(default=False, init=False)

    def shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return self.points, 2

    def draw(self, count: int, size: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        targets = _targets(self.points, torch.device("cpu"))
        height = _uniform((-self.bend, self.bend), count, 1, generator=generator)
        phase = _uniform((0, 2 * math.pi), count, 1, generator=generator)
        wave = height * (math.pi / 2 * targets[:, 0] + phase).sin()
        moved = _uniform((-self.noise, self.noise), count, self.points, 2, generator=generator)
        return targets * self.scale + torch.stack([torch.zeros_like(wave), wave], -1) + moved

    def transform(self, theta: Tensor) -> Transform:
        import tri_stn

        return tri_stn.ThinPlateSpline(self.targets(theta.device), theta)

    def targets(self, device: torch.device) -> Tensor:
        """The target points (points, 2): one tensor, as tri_stn keeps the solved system by it."""
        return _targets(self.points, device)

    def kept(self, size: tuple[int, ...], input_size: tuple[int, ...], align_corners: bool, like: Tensor) -> Kept:
        """The matrix from source points to the grid: the solved system and every pixel's distances in one."""
        terms, solution = self._system(size, align_corners, like)
        return ((terms @ solution).to(like.dtype),)

    def _system(self, size: tuple[int, ...], align_corners: bool, like: Tensor) -> tuple[Tensor, Tensor]:
        """Every pixel's terms (P, points + 3), and the matrix from source points to their weights, in fp64."""
        targets = _targets(self.points, like.device).double()

        def terms(points: Tensor) -> Tensor:
            square = (points.unsqueeze(1) - targets).square().sum(-1)
            bent = square * torch.where(square > 0, square, 1).log()
            return torch.cat([bent, torch.ones_like(points[:, :1]), points], 1)

        above = terms(targets)
        below = torch.cat([above[:, self.points :].T, above.new_zeros(3, 3)], 1)
        solution = torch.linalg.inv(torch.cat([above, below]))[:, : self.points]
        return terms(_identity(size, align_corners, like).flatten(0, -2)), solution

    def amplification(self, theta: Tensor, size: tuple[int, ...]) -> tuple[float, float]:
        """Weights of both signs make the bend; in the gradient the solved system stands alone."""
        terms, solution = self._system(size, False, theta)
        weights = solution @ theta.detach().double().flatten(0, -3)
        coordinates, gradients = ((terms.abs() @ w.abs()).max().item() for w in (weights, solution))
        return max(1.0, coordinates), gradients

    def grid(self, theta: Tensor, kept: Kept, size: tuple[int, ...], align_corners: bool) -> Tensor:
        return (kept[0] @ theta).view(len(theta), *size, 2)


@dataclass(frozen=True)
class Fields:
    """Smooth displacement fields in pixels (*size, d), in the memory of a network's output (d, *size)."""

    amplitude: float
    """Standard deviation, in pixels."""
    cells: int = 8
    """Independent displacements along each axis, between which it is linear."""
    kind: str = field(default="displacement", init=False)
    dense: bool = field(default=True, init=False)

    def shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return *size, len(size)

    def draw(self, count: int, size: tuple[int, ...], seed: int) -> Tensor:
        dims = len(size)
        coarse = torch.randn(count, dims, *(self.cells,) * dims, generator=torch.Generator().manual_seed(seed))
        mode = "bilinear" if dims == 2 else "trilinear"
        return F.interpolate(coarse * self.amplitude, size, mode=mode, align_corners=True).movedim(1, -1)

    def transform(self, theta: Tensor) -> Transform:
        import tri_stn

        return tri_stn.Displacement(theta, unit="pixel")

    def amplification(self, theta: Tensor, size: tuple[int, ...]) -> tuple[float, float]:
        return 1.0, 1.0

    def kept(self, size: tuple[int, ...], input_size: tuple[int, ...], align_corners: bool, like: Tensor) -> Kept:
        """The identity, and how much of a normalised unit each pixel of the input is."""
        units = [2 / (n - 1 if align_corners else n) for n in reversed(input_size)]
        return _identity(size, align_corners, like).to(like.dtype), like.new_tensor(units)

    def grid(self, theta: Tensor, kept: Kept, size: tuple[int, ...], align_corners: bool) -> Tensor:
        return torch.addcmul(kept[0], theta, kept[1])


@dataclass(frozen=True)
class Points:
    """Points anywhere, uniformly: an explicit grid (*size, d), each far from its neighbours."""

    reach: float = 1.0
    """They lie in [-reach, reach]."""
    kind: str = field(default="grid", init=False)
    dense: bool = field(default=True, init=False)

    def shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return *size, len(size)

    def draw(self, count: int, size: tuple[int, ...], seed: int) -> Tensor:
        bounds = (-self.reach, self.reach)
        return _uniform(bounds, count, *size, len(size), generator=torch.Generator().manual_seed(seed))

    def transform(self, theta: Tensor) -> Transform:
        import tri_stn

        return tri_stn.Grid(theta)

    def amplification(self, theta: Tensor, size: tuple[int, ...]) -> tuple[float, float]:
        return 1.0, 1.0

    def kept(self, size: tuple[int, ...], input_size: tuple[int, ...], align_corners: bool, like: Tensor) -> Kept:
        return ()

    def grid(self, theta: Tensor, kept: Kept, size: tuple[int, ...], align_corners: bool) -> Tensor:
        return theta


AnyMaps = Maps | Splines | Fields | Points


def _uniform(bounds: Range, *shape: int, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator)


def _identity(size: tuple[int, ...], align_corners: bool, like: Tensor) -> Tensor:
    """Every output pixel's own place, (*size, d) in fp64."""
    theta = torch.eye(len(size), len(size) + 1, dtype=torch.float64, device=like.device)
    return F.affine_grid(theta[None], [1, 1, *size], align_corners=align_corners)[0]


@functools.cache
def _targets(points: int, device: torch.device) -> Tensor:
    x = torch.linspace(-0.95, 0.95, points // 2)
    rows = [torch.stack([x, torch.full_like(x, y)], -1) for y in (-0.9, 0.9)]
    return torch.cat(rows).to(device)
