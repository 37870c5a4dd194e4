"""The samplers that an experiment can learn with: `tri_stn.warp`, and torch's with a stored grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import tri_stn
from tri_stn import points
from tri_stn.transforms import Displacement, Transform


def torch_warp(
    input: Tensor, transform: Transform, size: Sequence[int] | None = None, *, mode: str = "bilinear",
    padding_mode: str = "zeros", align_corners: bool = False,
) -> Tensor:  # fmt: skip
    """`tri_stn.warp` the usual way: a grid, a copy of the image for each of several maps, and `F.grid_sample`."""
    size = tuple(size or transform.size or input.shape[2:])
    batch = (input.shape[0], *transform.batch[1:])
    grid = sampling_grid(transform, size, input, align_corners).expand(*batch, *size, len(size))
    if len(batch) == 2:
        input = input.unsqueeze(1).expand(*batch, *input.shape[1:]).flatten(0, 1)
        grid = grid.flatten(0, 1)
    output = F.grid_sample(input, grid.to(input.dtype), mode, padding_mode, align_corners)
    return output.view(*batch, *output.shape[1:])


def sampling_grid(transform: Transform, size: tuple[int, ...], input: Tensor, align_corners: bool) -> Tensor:
    """Where each output pixel looks, (N, [K,] *size, d), in plain torch."""
    batch = transform.batch
    if transform.kind == "affine":
        theta = transform.parameters.flatten(0, -3)
        return F.affine_grid(theta, [len(theta), 1, *size], align_corners=align_corners).unflatten(0, batch)
    if isinstance(transform, Displacement):
        identity = torch.eye(len(size), len(size) + 1, device=input.device).unsqueeze(0)
        moved = transform.field
        if transform.unit == "pixel":
            units = [points.pixels_per_unit(n, align_corners) for n in reversed(input.shape[2:])]
            moved = moved / torch.tensor(units, device=input.device)
        return F.affine_grid(identity, [1, 1, *size], align_corners=align_corners) + moved
    numbers, field = transform._numbers, transform._field
    if len(batch) == 1:
        numbers, field = numbers.unsqueeze(1), None if field is None else field.unsqueeze(1)
    grid = points.grid(transform.kind, numbers, field, size, input.shape[2:], align_corners, torch.float32)
    return grid if len(batch) == 2 else grid.squeeze(1)


SAMPLERS: dict[str, Callable[..., Tensor]] = {"tri_stn": tri_stn.warp, "torch": torch_warp}
