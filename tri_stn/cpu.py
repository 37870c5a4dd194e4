"""The common cases on the CPU, by torch's own sampler or by rows of pixels: the twin of `reference` for speed.

A part of the output at a time gets its grid, from `cpu_maps`. ATen's `grid_sampler` reads the image through it; or
`cpu_rows`, where many channels lie together, or would be worth a copy in which they do.

`warp` and `warp_backward` answer None where they do not serve, and the reference does: lines, bicubic volumes, chains,
fills, masks, several samples per pixel, tangents, batches that are not equal, and by the numbers of a map

- coordinates that are not finite or far away: ATen's CPU sampler makes NaN of them;
- homographies that reach infinity within the output, or come near it;
- splines whose maps have target points of their own;
- many samples exactly on pixels for bilinear, between them for nearest, where shears, fields or straight splines put
  them, or reflection folds them: which side they fall on is the convention's to say, and a normalised coordinate has
  lost that to rounding. Where each axis of the input follows one axis of the output, as under the identity, flips,
  crops and a field of zeros, `cpu_maps` puts bilinear right; bicubic is smooth there.

What looks at pixels alone is read as nearest: so the identity is exact. In a batch with other maps, and for the
gradient of an image beside that of the map, it is rounded as torch's.

Both ways take one road, so that the backward reads what the forward read; but for several gradients of outputs of
several images, as under `torch.func.jacrev`, where the backward is the reference's: there a sample may be rounded to
another side.

ATen gives each image of a batch to one thread. Where there is one, bands of its samples stand for images.

Shape notes: M images, K maps per image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from . import cpu_rows
from .cpu_maps import Maps
from .reference import compute_dtype

_MODES = {"bilinear": 0, "nearest": 1, "bicubic": 2}
_PADDINGS = {"zeros": 0, "border": 1, "reflection": 2}
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _without_autocast(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Autocast would make products of matrices, and so the grid, in 16 bits."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@_without_autocast
def warp(
    input: Tensor, parameters: Tensor, size: Sequence[int], layout: torch.memory_format,
    kind: str, mode: str, padding_mode: str, align_corners: bool, scattered: bool = False,
) -> Tensor | None:  # fmt: skip
    """Input (M, C, *input_size) read through parameters (M, K, …): a new (M * K, C, *size) in a layout; or None.

    `scattered` says that the places are in no order, and many.
    """
    images = max(len(input), len(parameters))
    input, parameters = _for_all(input, images), _for_all(parameters, images)
    if _is_long_row(kind, size):
        rows, scattered = (_ROWS, size[1] // _ROWS), _are_many(parameters, input.shape[2:])
        found = warp(input, _wrapped(parameters), rows, layout, kind, mode, padding_mode, align_corners, scattered)
        if found is not None:
            row = found.flatten(2).unsqueeze(2)
            found.as_strided_(row.shape, row.stride())  # itself: autograd lets nobody edit a view
        return found
    maps = Maps.of(parameters, input.shape, size, compute_dtype(input.dtype), kind, mode, padding_mode, align_corners)
    if maps is None:
        return None
    if _goes_by_rows(input, layout, mode, scattered):
        return cpu_rows.warp(input, maps, layout, mode)
    sample = torch.grid_sampler_2d if maps.dims == 2 else torch.grid_sampler_3d
    options = _MODES["nearest" if maps.are_on_pixels else mode], _PADDINGS[padding_mode], align_corners
    copied = layout != torch.contiguous_format or input.dtype != maps.dtype or maps.per_image > 1 or _is_alone(input)
    parts = maps.parts(input.shape[1], True, copied)
    output = None
    for part in parts:
        source, grid = input[part.images].to(maps.dtype), maps.grid(part)
        whole = part.together if part.together > 1 else math.prod(grid.shape[1:-1])  # maps, or samples
        bands = _bands(grid, whole) if len(source) == 1 else 1
        if len(source) == 1:
            source = source.expand(len(grid) * bands, *source.shape[1:])
        found = sample(source, _in_bands(grid, bands), *options)
        if len(parts) == 1 and bands == part.together == 1:
            return found.to(input.dtype, memory_format=layout)
        if output is None:
            output = torch.empty((maps.count, input.shape[1], *size), dtype=input.dtype, memory_format=layout)
        target = output[part.first : part.last, :, part.start : part.stop]
        if part.together > 1:
            target = target.unflatten(0, (len(found), -1)).transpose(1, 2)
        elif bands > 1:
            target = target[0].view(len(target[0]), bands, -1).transpose(0, 1)
        target.copy_(found.view(target.shape))
        del grid, found  # before the next ones are made
    return output


@_without_autocast
def warp_backward(
    grad_output: Tensor, input: Tensor | None, parameters: Tensor,
    input_size: Sequence[int], layout: torch.memory_format,
    need_input: bool, need_parameters: bool, kind: str, mode: str, padding_mode: str, align_corners: bool,
    scattered: bool = False,
) -> tuple[Tensor | None, Tensor | None] | None:  # fmt: skip
    """The gradients of input and parameters that are wanted, the former in a layout; or None."""
    outputs = len(grad_output) // max(1, parameters.shape[1])
    parameters = _for_all(parameters, outputs)  # of which there may be several gradients
    if _is_long_row(kind, grad_output.shape[2:]):
        row = grad_output.unflatten(3, (_ROWS, -1)).flatten(2, 3), input, _wrapped(parameters), input_size, layout
        scattered = _are_many(parameters, input_size)
        gradients = warp_backward(*row, need_input, need_parameters, kind, mode, padding_mode, align_corners, scattered)
        if gradients is None or gradients[1] is None:
            return gradients
        return gradients[0], gradients[1].view(parameters.shape)
    dtype, shape = compute_dtype(grad_output.dtype), (len(parameters), grad_output.shape[1], *input_size)
    if input is None and not need_parameters:
        input = grad_output.new_zeros(1).expand(shape)  # ATen reads it for the grid's gradient, which nobody takes
    if input is not None:
        input = _for_all(input, len(parameters))
    if input is None or input.shape != shape or len(grad_output) != len(parameters) * parameters.shape[1]:
        return None
    maps = Maps.of(parameters, shape, grad_output.shape[2:], dtype, kind, mode, padding_mode, align_corners)
    if maps is None:
        return None
    if _goes_by_rows(grad_output, layout, mode, scattered):
        needs = need_input, need_parameters
        grad_image, change = cpu_rows.warp_backward(grad_output, input, maps, layout, *needs, mode)
        return grad_image, None if change is None else change.view(parameters.shape).to(parameters.dtype)
    back = torch.ops.aten.grid_sampler_2d_backward if maps.dims == 2 else torch.ops.aten.grid_sampler_3d_backward
    mode = "nearest" if maps.are_on_pixels and not need_parameters else mode
    options = _MODES[mode], _PADDINGS[padding_mode], align_corners, [need_input, need_parameters]

    grad_input: Tensor | None = None
    grad_parameters: Tensor | None = None
    copied = need_input and (layout != torch.contiguous_format or grad_output.dtype != dtype)
    images = 1 + torch.get_num_threads()
    small = maps.count == 1 and images * input.numel() <= 2 * maps.dims * math.prod(maps.size)
    parts = maps.parts(shape[1], False, copied, rows=small or not need_input)
    for part in parts:
        source, grid, grad = input[part.images].to(dtype), maps.grid(part), grad_output[part.first : part.last]
        grad = grad[:, :, part.start : part.stop].to(dtype)
        # Each band, as each part, has an image of its own, which is added: not where images outweigh grids.
        alone = len(source) == 1 and (small or not need_input)
        bands = _bands(grid, math.prod(grid.shape[1:-1]), 1 if need_input else 8) if alone else 1
        if part.together > 1:
            grad = grad.unflatten(0, (-1, part.together)).transpose(1, 2).flatten(2, 3)
        if bands > 1:
            grad = grad[0].flatten(1).unflatten(1, (bands, *[1] * (maps.dims - 1), -1)).transpose(0, 1)
        if len(source) == 1:
            source = source.expand(len(grid) * bands, *source.shape[1:])
        grad_image, grad_grid = back(grad, source, _in_bands(grid, bands), *options)
        if bands > 1 and need_input:
            grad_image = grad_image.sum(0, keepdim=True)
        if need_parameters:
            change = maps.grid_vjp(grad_grid.view(grid.shape), grid, part)
            grad_parameters = change if len(parts) == 1 else maps.add_part(grad_parameters, change, part)
        if len(parts) == 1:
            grad_input = grad_image
        elif need_input:
            if grad_input is None:  # sums over the maps or parts of an image in 16 bits would lose
                sums = grad_output.dtype if parameters.shape[1] == 1 and not small else dtype
                grad_input = torch.empty(shape, dtype=sums, memory_format=layout)
            if part.first % parameters.shape[1] == 0 and part.start == 0:
                grad_input[part.images] = grad_image
            else:
                grad_input[part.images] += grad_image
        del grid, grad_grid, grad_image  # before the next ones are made
    return (
        grad_input.to(grad_output.dtype, memory_format=layout) if need_input and grad_input is not None else None,
        grad_parameters.view(parameters.shape).to(parameters.dtype) if grad_parameters is not None else None,
    )


def _for_all(tensor: Tensor, count: int) -> Tensor:
    """What serves a batch of so many, as many times."""
    return tensor.expand(count, *tensor.shape[1:]) if len(tensor) == 1 < count else tensor


def _goes_by_rows(like: Tensor, layout: torch.memory_format, mode: str, scattered: bool) -> bool:
    """The same of an image and of its output's gradient, which have the same channels."""
    return mode != "bicubic" and cpu_rows.suits(like, scattered or layout != torch.contiguous_format)


# --- a list of points is one long row, and parts are of rows -----------------------------------------

_ROWS = 64


def _is_long_row(kind: str, size: Sequence[int]) -> bool:
    """Whether an explicit grid, in which no place has a meaning, is wrapped into many rows."""
    return kind == "grid" and len(size) == 2 and size[0] == 1 and size[1] >= 2**10 and size[1] % _ROWS == 0


def _are_many(points: Tensor, input_size: Sequence[int]) -> bool:
    """Whether points (M, K, …, d) are worth a copy of their image with its channels together: in each channel that lies
    apart a point reads cache lines of its own.
    """
    return math.prod(points.shape[1:-1]) >= math.prod(input_size)


def _wrapped(grid: Tensor) -> Tensor:
    """(M, K, 1, W, 2) → (M, K, rows, W / rows, 2), a view."""
    return grid.unflatten(3, (_ROWS, -1)).flatten(2, 3)


# --- threads: ATen gives each image of a batch to one ------------------------------------------------


def _is_alone(images: Tensor) -> bool:
    return len(images) == 1 and torch.get_num_threads() > 1


def _bands(grid: Tensor, count: int, most: int = 8) -> int:
    """Into how many bands of as many maps or samples the one grid of an image falls, so that each thread has one, or
    `most` of them.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(grid) > 1 or grid.numel() < 2**13:
        return 1
    return next((bands for bands in range(threads, most * threads + 1) if count % bands == 0), 1)


def _in_bands(grid: Tensor, bands: int) -> Tensor:
    """(1, *size, d) → (bands, 1, …, samples, d)."""
    return grid.reshape(bands, *[1] * (grid.dim() - 3), -1, grid.shape[-1]) if bands > 1 else grid
