"""What tests and benchmarks share: fp64 truth, inputs, the error criterion and its boundary band.

Truth is `torch.nn.functional` in fp64. A sampler is discontinuous in places (nearest at half
pixels; the slope of bilinear at whole pixels), and there a rounding of the coordinate may rightly
choose either side. Output pixels that look within a narrow band of such a place are left out, as a
mask: everywhere else the criterion is strict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A call of `warp` on random data: everything that decides the result, seed included."""

    images: int = 2
    maps: int | None = None
    """K maps per image; None for one map without the axis."""
    channels: int = 3
    input_size: tuple[int, ...] = (13, 9)
    size: tuple[int, ...] = (11, 14)
    mode: str = "bilinear"
    padding_mode: str = "zeros"
    align_corners: bool = False
    dtype: torch.dtype = torch.float32
    theta_dtype: torch.dtype = torch.float32
    channels_last: bool = False
    theta: tuple[tuple[float, ...], ...] | None = None
    """One matrix for all maps; random near the identity if None."""
    seed: int = 0

    @property
    def options(self) -> dict[str, object]:
        return {"mode": self.mode, "padding_mode": self.padding_mode, "align_corners": self.align_corners}

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)  # type: ignore[arg-type]

    def tensors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Input, theta and a gradient of the output, the same values on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        dims = len(self.size)
        image = torch.rand(self.images, self.channels, *self.input_size, generator=generator) * 2 - 1
        image = image.to(device, self.dtype)
        batch = (self.images,) if self.maps is None else (self.images, self.maps)
        if self.theta is None:
            theta = torch.eye(dims, dims + 1) + 0.4 * torch.randn(*batch, dims, dims + 1, generator=generator)
        else:
            theta = torch.tensor(self.theta).expand(*batch, dims, dims + 1)
        grad = torch.rand(*batch, self.channels, *self.size, generator=generator) * 2 - 1
        grad = grad.to(device, self.dtype)
        if self.channels_last:
            formats = {2: torch.channels_last, 3: torch.channels_last_3d}
            image = image.contiguous(memory_format=formats[dims])
        return image, theta.to(device, self.theta_dtype).contiguous(), grad


def warp_truth(
    input: Tensor, theta: Tensor, size: Sequence[int], *, mode: str, padding_mode: str, align_corners: bool
) -> Tensor:
    """`warp(input, Affine(theta), size)` by torch in fp64, differentiable in both tensors."""
    maps = theta.flatten(0, -3).double()
    images = input.double()
    if len(maps) != len(images):
        images = images.repeat_interleave(len(maps) // len(images), 0)
    grid = F.affine_grid(maps, [len(maps), images.shape[1], *size], align_corners=align_corners)
    output = F.grid_sample(images, grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners)
    return output.unflatten(0, theta.shape[:-2])


def near_discontinuity(
    theta: Tensor, input_size: Sequence[int], size: Sequence[int], *, mode: str, align_corners: bool, band: float = 1e-5
) -> Tensor:
    """Output pixels, (…, *size), where rounding may choose the other pixel, or the other slope.

    Within ``band`` times the coordinate's magnitude, in pixels, of a half pixel (nearest) or of a
    whole one (bilinear). Folding a coordinate back into the image moves none of these places.
    """
    maps = theta.flatten(0, -3).double()
    grid = F.affine_grid(maps, [len(maps), 1, *size], align_corners=align_corners)
    near = torch.zeros(grid.shape[:-1], dtype=torch.bool, device=theta.device)
    for axis, pixels in enumerate(reversed(input_size)):
        x = (pixels - 1) / 2 + grid[..., axis] * ((pixels - 1) / 2 if align_corners else pixels / 2)
        distance = (x - x.round()).abs() if mode == "bilinear" else (x - x.floor() - 0.5).abs()
        near |= ~(distance > band * (pixels + x.abs()))  # NaN counts as near
    return near.unflatten(0, theta.shape[:-2])


def assert_accurate(
    actual: Tensor, truth: Tensor, *, image_dtype: torch.dtype, magnitude: Tensor | float = 1.0, what: str = "result"
) -> None:
    """Fail unless actual is the fp64 truth, computed in fp32 (fp64 for fp64 images) and rounded once.

    ``magnitude`` is the sum of the magnitudes of the terms of each result, where that is not of
    order one; the error allowed for computing in fp32 is 1e-5 of it (in fp64, 1e-10).
    """
    computed = 1e-10 if image_dtype == torch.float64 else 1e-5
    rounded = torch.finfo(actual.dtype).eps / 2
    allowed = computed * torch.as_tensor(magnitude).clamp(min=1) + 1.01 * rounded * truth.abs()
    error = (actual.double() - truth).abs()
    wrong = ~(error <= allowed)  # NaN is wrong
    if wrong.any():
        worst = int((error - allowed).nan_to_num(nan=math.inf).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; the worst is {actual.flatten()[worst]} "
            f"where the fp64 truth is {truth.flatten()[worst]}, "
            f"error {error.flatten()[worst]:.3g}, allowed {allowed.expand_as(error).flatten()[worst]:.3g}"
        )
