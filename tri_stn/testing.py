"""What tests and benchmarks share: fp64 truth, inputs, the error criterion and its boundary band.

Truth is `torch.nn.functional` in fp64. A sampler is discontinuous in places (nearest at half
pixels; the slope of bilinear at whole pixels), and there a rounding of the coordinate may rightly
choose either side. Output pixels that look within a narrow band of such a place are left out, as a
mask: everywhere else the criterion is strict.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .transforms import Affine, Displacement, Grid, Projective, Transform

ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every_other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "channel_slice": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "channels_last_slice": lambda x: torch.cat([x, x], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, : x.shape[1]],
}
"""The same or like numbers in other places of memory; axis 1 is the channels (or the maps, of a gradient)."""


@dataclass(frozen=True)
class Case:
    """A call of `warp` on random data: everything that decides the result, seed included."""

    images: int = 1
    maps: int | None = None
    """K maps per image; None for one map without the axis."""
    channels: int = 2
    input_size: tuple[int, ...] = (13, 9)
    size: tuple[int, ...] = (11, 14)
    mode: str = "bilinear"
    padding_mode: str = "zeros"
    align_corners: bool = False
    dtype: torch.dtype = torch.float32
    theta_dtype: torch.dtype = torch.float32
    arrangement: str = "contiguous"
    """How the image and the output's gradient lie in memory: a key of ARRANGEMENTS."""
    theta: tuple[tuple[float, ...], ...] | None = None
    """One matrix for all maps; random near the identity if None."""
    kind: str = "affine"
    """Or "projective", random and mild; or "grid", "displacement" or "pixel_displacement", random fields
    that reach beyond the image.
    """
    seed: int = 0

    @property
    def options(self) -> dict[str, object]:
        return {"mode": self.mode, "padding_mode": self.padding_mode, "align_corners": self.align_corners}

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)  # type: ignore[arg-type]

    def tensors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Input, the transform's parameters and a gradient of the output, the same on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        dims = len(self.size)
        image = torch.rand(self.images, self.channels, *self.input_size, generator=generator) * 2 - 1
        image = ARRANGEMENTS[self.arrangement](image.to(device, self.dtype))
        batch = (self.images,) if self.maps is None else (self.images, self.maps)
        if self.kind == "projective":
            noise = torch.randn(*batch, dims + 1, dims + 1, generator=generator)
            parameters = torch.eye(dims + 1) + torch.tensor([0.3] * dims + [0.15])[:, None] * noise
        elif self.kind != "affine":
            reach = {"grid": 1.3, "displacement": 0.4, "pixel_displacement": 2.0}[self.kind]
            parameters = reach * (2 * torch.rand(*batch, *self.size, dims, generator=generator) - 1)
        elif self.theta is None:
            parameters = torch.eye(dims, dims + 1) + 0.4 * torch.randn(*batch, dims, dims + 1, generator=generator)
        else:
            parameters = torch.tensor(self.theta).expand(*batch, dims, dims + 1)
        grad = torch.rand(*batch, self.channels, *self.size, generator=generator) * 2 - 1
        grad = ARRANGEMENTS[self.arrangement](grad.to(device, self.dtype))
        return image, parameters.to(device, self.theta_dtype).contiguous(), grad

    def transform(self, parameters: Tensor) -> Transform:
        """The transform that the parameters are for."""
        if self.kind == "pixel_displacement":
            return Displacement(parameters, unit="pixel")
        kinds = {"affine": Affine, "projective": Projective, "grid": Grid, "displacement": Displacement}
        return kinds[self.kind](parameters)  # type: ignore[abstract]


def truth_grid(case: Case, parameters: Tensor) -> Tensor:
    """Where a case's output pixels look, (maps, *size, d) in fp64, differentiable in the parameters."""
    dims = len(case.size)
    matrix = case.kind in ("affine", "projective")
    maps = parameters.flatten(0, -3 if matrix else -dims - 2).double()
    if case.kind == "grid":
        return maps
    theta = maps if case.kind == "affine" else torch.eye(dims, dims + 1, device=maps.device).double()[None]
    if dims == 1:  # which torch does not have
        x = torch.arange(case.size[0], device=maps.device).double() - (case.size[0] - 1) / 2
        x = x / max((case.size[0] - case.align_corners) / 2, 0.5)
        grid = theta[:, :, 0] * x + theta[:, :, 1]
        grid = grid[..., None]
    else:
        grid = F.affine_grid(theta, [len(theta), 1, *case.size], align_corners=case.align_corners)
    if case.kind == "projective":
        points = torch.cat([grid, torch.ones_like(grid[..., :1])], -1).flatten(1, -2)  # (1, P, d+1)
        *rows, divisor = (points @ maps.mT).unbind(-1)
        ahead = divisor > 0
        safe = torch.where(ahead, divisor, 1)
        grid = torch.stack([torch.where(ahead, row / safe, -1e6) for row in rows], -1)
        return grid.unflatten(1, case.size)
    if case.kind == "pixel_displacement":
        maps = maps / torch.tensor(
            [(n - case.align_corners) / 2 for n in reversed(case.input_size)], device=maps.device
        )
    return grid if case.kind == "affine" else grid + maps


def warp_truth(case: Case, input: Tensor, parameters: Tensor) -> Tensor:
    """A case's output by torch in fp64, differentiable in both tensors."""
    grid, images = truth_grid(case, parameters), input.double()
    if len(grid) != len(images):
        images = images.repeat_interleave(len(grid) // len(images), 0)
    if len(case.size) == 1:  # a line is an image of height one, read at its middle
        images, grid = images.unsqueeze(2), torch.stack([grid, torch.zeros_like(grid)], -1).squeeze(2).unsqueeze(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unit size")
        sample = _tricubic if images.dim() == 5 and case.mode == "bicubic" else F.grid_sample
        output = sample(images, grid, **case.options)  # type: ignore[arg-type, operator]
    output = output.squeeze(2) if len(case.size) == 1 else output
    return output if case.maps is None else output.unflatten(0, (-1, case.maps))


def _tricubic(volumes: Tensor, grid: Tensor, **options: object) -> Tensor:
    """What torch lacks: every slice read bicubically, and the slices as a column of pixels of its own."""
    channels, depth, size = *volumes.shape[1:3], grid.shape[1:-1]
    in_plane = grid[..., :2].flatten(1, 3).unsqueeze(1)  # (N, 1, P, 2)
    slices = F.grid_sample(volumes.flatten(1, 2), in_plane, **options)  # type: ignore[arg-type]
    columns = slices.view(-1, channels, depth, in_plane.shape[2]).permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(3)
    z = grid[..., 2].reshape(-1, 1, 1, 1)
    output = F.grid_sample(columns, torch.cat([torch.zeros_like(z), z], 3), **options)  # type: ignore[arg-type]
    return output.view(len(volumes), -1, channels).mT.unflatten(2, size)


def near_discontinuity(case: Case, parameters: Tensor, band: float = 1e-5) -> Tensor:
    """Output pixels, (N, [K,] *size), where rounding may choose the other pixel, or the other slope.

    Within ``band`` times the coordinate's magnitude, in pixels, of a half pixel (nearest) or of a
    whole one (bilinear and, for its slope at the edges, bicubic). Folding moves none of these places.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unit size")
        grid = truth_grid(case, parameters)
    near = torch.zeros(grid.shape[:-1], dtype=torch.bool, device=parameters.device)
    for axis, pixels in enumerate(reversed(case.input_size)):
        x = (pixels - 1) / 2 + grid[..., axis] * ((pixels - 1) / 2 if case.align_corners else pixels / 2)
        distance = (x - x.floor() - 0.5).abs() if case.mode == "nearest" else (x - x.round()).abs()
        near |= ~(distance > band * (pixels + x.abs()))  # NaN counts as near
    return near if case.maps is None else near.unflatten(0, (-1, case.maps))


def assert_accurate(
    actual: Tensor, truth: Tensor, *, image_dtype: torch.dtype, magnitude: Tensor | float = 1.0, what: str = "result"
) -> None:
    """Fail unless actual is the fp64 truth, computed in fp32 (fp64 for fp64 images) and rounded once.

    ``magnitude`` is the sum of the magnitudes of the terms of each result, where that is not of
    order one; the error allowed for computing in fp32 is 1e-5 of it (in fp64, 1e-10).
    """
    computed = 1e-10 if image_dtype == torch.float64 else 1e-5
    format = torch.finfo(actual.dtype)
    rounded = format.eps / 2 * truth.abs().clamp(min=format.smallest_normal)  # below it, steps stay as they are
    allowed = computed * torch.as_tensor(magnitude).clamp(min=1) + 1.01 * rounded
    error = (actual.double() - truth).abs()
    wrong = ~(error <= allowed)  # NaN is wrong
    if wrong.any():
        worst = int((error - allowed).nan_to_num(nan=math.inf).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; the worst is {actual.flatten()[worst]} "
            f"where the fp64 truth is {truth.flatten()[worst]}, "
            f"error {error.flatten()[worst]:.3g}, allowed {allowed.expand_as(error).flatten()[worst]:.3g}"
        )
