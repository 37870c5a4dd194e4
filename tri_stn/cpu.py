"""The common cases on the CPU, by torch's own sampler: the twin of `reference` for speed.

A part of the output at a time gets its grid, in as few passes over memory as there can be, and ATen's
`grid_sampler` reads the image through it. For maps of matrices, with columns along x and rows along the other axes,

    grid[row, column] = (θ_x · x[column] + θ_1) + (θ_y · y[row] + θ_z · z[row])

is one addition for each number, and θ's gradient is one product of matrices with the grid's.

`warp` and `warp_backward` answer None where they do not serve, and the reference does: lines, bicubic volumes, chains,
fills, masks, several samples per pixel, tangents, batches that are not equal, and by the numbers of a map

- coordinates that are not finite or far away: ATen's CPU sampler makes NaN of them;
- homographies that reach infinity within the output, or come near it;
- many samples exactly on pixels (between them, for nearest), such as the identity's: which side they fall on is the
  convention's to say, and a normalised coordinate has lost that to rounding.

Shape notes: M images, K maps per image, B maps, R rows and W columns of an output, d dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .points import pixels_per_unit
from .reference import compute_dtype

CHUNK_BYTES = 2**22
"""Working memory: the grid of a whole output up to this size; of a part of it, with what is read there."""
FAR = 1e4
"""Numbers of a map beyond this are left to the reference: ATen's CPU sampler takes 32-bit pixels."""

_MODES = {"bilinear": 0, "nearest": 1, "bicubic": 2}
_PADDINGS = {"zeros": 0, "border": 1, "reflection": 2}
_P = ParamSpec("_P")
_T = TypeVar("_T")
_KINDS = ("affine", "projective", "grid", "displacement", "pixel_displacement")


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
    kind: str, mode: str, padding_mode: str, align_corners: bool,
) -> Tensor | None:  # fmt: skip
    """Input (M, C, *input_size) read through parameters (M, K, …): a new (M * K, C, *size) in a layout; or None."""
    maps = _Maps.of(parameters, input.shape, size, compute_dtype(input.dtype), kind, mode, align_corners)
    if maps is None:
        return None
    sample = torch.grid_sampler_2d if maps.dims == 2 else torch.grid_sampler_3d
    options = _MODES[mode], _PADDINGS[padding_mode], align_corners
    copied = layout != torch.contiguous_format or input.dtype != maps.dtype
    parts = maps.parts(1, input.shape[1] * math.prod(size) * maps.dtype.itemsize, copied)
    output = None
    for image, first, last, start, stop in parts:
        source, grid = input[image].to(maps.dtype), maps.grid(first, last, start, stop)
        if len(source) == 1:
            source = source.expand(last - first, *source.shape[1:])
        together = (last - first) // len(source)
        if together > 1:  # the maps of an image, one below the other
            grid = grid.reshape(len(source), -1, *grid.shape[2:])
        part = sample(source, grid, *options)
        if together > 1:
            part = part.unflatten(2, (together, -1)).transpose(1, 2).flatten(0, 1)
        if len(parts) == 1:
            return part.to(input.dtype, memory_format=layout)
        if output is None:
            output = torch.empty((maps.count, input.shape[1], *size), dtype=input.dtype, memory_format=layout)
        output[first:last, :, start:stop] = part
        del grid, part  # before the next ones are made
    return output


@_without_autocast
def warp_backward(
    grad_output: Tensor, input: Tensor | None, parameters: Tensor,
    input_size: Sequence[int], layout: torch.memory_format,
    need_input: bool, need_parameters: bool, kind: str, mode: str, padding_mode: str, align_corners: bool,
) -> tuple[Tensor | None, Tensor | None] | None:  # fmt: skip
    """The gradients of input and parameters that are wanted, the former in a layout; or None."""
    dtype, shape = compute_dtype(grad_output.dtype), (len(parameters), grad_output.shape[1], *input_size)
    if input is None and not need_parameters:
        input = grad_output.new_zeros(1).expand(shape)  # ATen reads it for the grid's gradient, which nobody takes
    if input is None or input.shape != shape or len(grad_output) != len(parameters) * parameters.shape[1]:
        return None
    maps = _Maps.of(parameters, shape, grad_output.shape[2:], dtype, kind, mode, align_corners)
    if maps is None:
        return None
    back = torch.ops.aten.grid_sampler_2d_backward if maps.dims == 2 else torch.ops.aten.grid_sampler_3d_backward
    options = _MODES[mode], _PADDINGS[padding_mode], align_corners, [need_input, need_parameters]

    grad_input: Tensor | None = None
    grad_parameters: Tensor | None = None
    copied = need_input and (layout != torch.contiguous_format or grad_output.dtype != dtype)
    parts = maps.parts(2, math.prod(shape[1:]) * dtype.itemsize, copied, rows=not need_input)
    for image, first, last, start, stop in parts:
        source, grid, grad = input[image].to(dtype), maps.grid(first, last, start, stop), grad_output[first:last]
        grad = grad[:, :, start:stop].to(dtype)
        if len(source) == 1 and not need_input:
            source = source.expand(last - first, *source.shape[1:])
        together = (last - first) // len(source)
        if together > 1:
            grid = grid.reshape(len(source), -1, *grid.shape[2:])
            grad = grad.unflatten(0, (-1, together)).transpose(1, 2).flatten(2, 3)
        grad_image, grad_grid = back(grad, source, grid, *options)
        if need_parameters:
            shape_of_maps = last - first, stop - start, *grid.shape[2:]
            change = maps.grid_vjp(grad_grid.view(shape_of_maps), grid.reshape(shape_of_maps), first, start, stop)
            if len(parts) == 1:
                grad_parameters = change
            else:
                grad_parameters = maps.add_part(grad_parameters, change, first, start, stop)
        if len(parts) == 1:
            grad_input = grad_image
        elif need_input:
            if grad_input is None:  # sums over an image's maps in 16 bits would lose
                sums = grad_output.dtype if parameters.shape[1] == 1 else dtype
                grad_input = torch.empty(shape, dtype=sums, memory_format=layout)
            if first % parameters.shape[1] == 0:
                grad_input[image] = grad_image
            else:
                grad_input[image] += grad_image
        del grid, grad_grid, grad_image  # before the next ones are made
    return (
        grad_input.to(grad_output.dtype, memory_format=layout) if need_input and grad_input is not None else None,
        grad_parameters.view(parameters.shape).to(parameters.dtype) if grad_parameters is not None else None,
    )


# --- the maps: which of them are served, their grids, and back ---------------------------------------

_Part = tuple[slice, int, int, int, int]
"""Images, and of their maps the first and the one after the last, and so for positions along the first axis."""


@dataclass(frozen=True)
class _Maps:
    """B = M * K maps of one size."""

    parameters: Tensor
    """(B, …), matrices in the dtype of the computation, fields in their own."""
    per_image: int
    kind: str
    input_size: tuple[int, ...]
    size: tuple[int, ...]
    align_corners: bool
    dtype: torch.dtype

    @staticmethod
    def of(
        parameters: Tensor, shape: Sequence[int], size: Sequence[int], dtype: torch.dtype,
        kind: str, mode: str, align_corners: bool,
    ) -> _Maps | None:  # fmt: skip
        """The maps, where they are served for images (M, C, *input_size) of a shape."""
        dims = len(size)
        if kind not in _KINDS or dims not in (2, 3) or (dims == 3 and mode == "bicubic"):
            return None
        if len(parameters) != shape[0] or 0 in (*shape, *size, parameters.shape[1]):
            return None
        flat = parameters.flatten(0, 1) if parameters.shape[1] > 1 else parameters[:, 0]
        maps = _Maps(
            flat.to(dtype) if kind in ("affine", "projective") else flat,
            parameters.shape[1], kind, tuple(shape[2:]), tuple(size), align_corners, dtype,
        )  # fmt: skip
        return maps if maps._is_served(mode) else None

    @property
    def dims(self) -> int:
        return len(self.size)

    @property
    def count(self) -> int:
        return len(self.parameters)

    def parts(self, grids: int, beside: int, copied: bool, rows: bool = True) -> list[_Part]:
        """The whole where so many grids, one or with its gradient two, are small; else parts for which they are, with
        what a map or image needs `beside`, which counts for the whole too if it is `copied`. A part is some images
        with all their maps, some maps of an image, or, if wanted, rows of one.
        """
        limit, height, k = grids * CHUNK_BYTES, self.size[0], self.per_image
        if self.kind == "grid" and self.parameters.dtype == self.dtype:
            grids = 0  # there is one, and its gradient is a result
        elif self.kind not in ("affine", "projective"):
            grids = 1
        each = grids * self.dims * math.prod(self.size) * self.dtype.itemsize
        if (each + copied * beside) * self.count <= limit:
            return [(slice(None), 0, self.count, 0, height)]
        each += beside
        step = limit // each
        if step >= k:
            starts = range(0, self.count, step // k * k)
            ends = [min(start + starts.step, self.count) for start in starts]
            return [(slice(a // k, b // k), a, b, 0, height) for a, b in zip(starts, ends, strict=True)]
        step = max(1, step)
        band = height if step > 1 or not rows else max(1, limit * height // each)
        return [
            (slice(image, image + 1), first, min(first + step, (image + 1) * k), start, min(start + band, height))
            for image in range(self.count // k)
            for first in range(image * k, (image + 1) * k, step)
            for start in range(0, height, band)
        ]

    def grid(self, first: int, last: int, start: int, stop: int) -> Tensor:
        """Where maps look from positions start to stop of the first axis: normalised, (B, stop - start, …, d)."""
        part = self.parameters if last - first == self.count else self.parameters[first:last]
        if self.kind == "affine":
            return self._outer_sum(part, start, stop)
        if self.kind != "projective":
            return self._field(part[:, start:stop], start, stop)
        grid, inverse = self._outer_sum(part[:, : self.dims], start, stop), self._inverse(part, start, stop)
        for axis in range(self.dims):
            grid[..., axis].mul_(inverse)
        return grid

    def grid_vjp(self, grad: Tensor, grid: Tensor, first: int, start: int, stop: int) -> Tensor:
        """The gradient of a grid → that of the maps that made it, from the first one on, or of their part."""
        if self.kind == "affine":
            return self._outer_sum_vjp(grad, start, stop)
        if self.kind == "pixel_displacement":
            return (grad.flatten(-2) * self._per_pixel()).view(grad.shape)
        if self.kind != "projective":
            return grad
        inverse = self._inverse(self.parameters[first : first + len(grad)], start, stop)
        rows = [grad[..., axis] * inverse for axis in range(self.dims)]
        last = rows[0] * grid[..., 0]
        for axis in range(1, self.dims):
            last.addcmul_(rows[axis], grid[..., axis])
        return self._outer_sum_vjp(torch.stack([*rows, last.neg_()], -1), start, stop)

    def add_part(self, total: Tensor | None, change: Tensor, first: int, start: int, stop: int) -> Tensor:
        if total is None:
            total = torch.zeros(self.parameters.shape, dtype=self.dtype)
        maps = total[first : first + len(change)]
        if self.kind in ("affine", "projective"):
            maps += change
        else:
            maps[:, start:stop] = change
        return total

    def _outer_sum(self, theta: Tensor, start: int, stop: int) -> Tensor:
        """(B, rows, d+1) times (x, y, 1) of each output pixel: (B, stop - start, …, rows)."""
        width, rows = self.size[-1], theta.shape[1]
        basis = _basis(self.size, self.align_corners, self.dtype)
        # Made whole for every part, so that the backward, whose parts are others, looks at the same places to the bit.
        along, across = torch.bmm(basis.expand(len(theta), -1, -1), theta.mT).split([width, len(basis) - width], 1)
        if stop - start < self.size[0]:
            row = math.prod(self.size[1:-1])
            across = across[:, start * row : stop * row]
        shape = len(theta), stop - start, *self.size[1:], rows
        if rows == 1:
            return (along.mT + across).view(shape)
        if rows == 2:  # a pair is one number for the loop over memory
            pairs = torch.view_as_complex(along).unsqueeze(1) + torch.view_as_complex(across).unsqueeze(2)
            return torch.view_as_real(pairs).view(shape)
        repeat = _repeated_identity(rows, width, self.dtype).expand(len(theta), -1, -1)
        return torch.baddbmm(along.reshape(len(theta), 1, -1), across, repeat).view(shape)

    def _outer_sum_vjp(self, grad: Tensor, start: int, stop: int) -> Tensor:
        width, rows, row = self.size[-1], grad.shape[-1], math.prod(self.size[1:-1])
        across, columns, chosen = _sums(self.size, rows, self.align_corners, self.dtype)
        if stop - start < self.size[0]:
            across = across[:, start * row : stop * row]
        sums = torch.bmm(
            across.expand(len(grad), -1, -1), grad.reshape(len(grad), -1, width * rows)
        )  # (B, d, W * rows)
        sums = sums.view(-1, width * rows) @ columns
        return sums.view(len(grad), -1).index_select(1, chosen).view(len(grad), rows, -1)

    def _inverse(self, matrices: Tensor, start: int, stop: int) -> Tensor:
        """A homography's divisor, inverted: (B, stop - start, …)."""
        return self._outer_sum(matrices[:, self.dims :], start, stop).squeeze(-1).reciprocal_()

    def _field(self, field: Tensor, start: int, stop: int) -> Tensor:
        field = field.to(self.dtype)
        if self.kind == "grid":
            return field
        identity = self._outer_sum(torch.eye(self.dims, self.dims + 1, dtype=self.dtype)[None], start, stop)
        if self.kind == "displacement":
            return identity + field
        return torch.addcmul(identity.flatten(-2), field.flatten(-2), self._per_pixel()).view(field.shape)

    def _per_pixel(self) -> Tensor:
        """What a pixel of the input is in normalised units, for a row of a field: (W * d,)."""
        units = [pixels_per_unit(n, self.align_corners) for n in reversed(self.input_size)]
        return torch.tensor([1 / unit if unit else 0.0 for unit in units], dtype=self.dtype).repeat(self.size[-1])

    # What is served, by the numbers of the maps.

    def _is_served(self, mode: str) -> bool:
        if self.kind in ("affine", "projective"):
            largest = torch.linalg.vector_norm(self.parameters, math.inf).item()
        elif self._is_small():
            largest = 0.0
        else:
            low, high = torch.aminmax(self.parameters)
            largest = max(-low.item(), high.item()) if low.item() == low.item() else math.nan
        if not largest < FAR:  # nor NaN
            return False
        if self.kind == "grid":
            return True
        if self.kind in ("displacement", "pixel_displacement"):
            return not self._field_has_ties()
        matrices = self.parameters
        if self.kind == "projective":
            *slopes, middle = matrices[:, -1].unbind(-1)
            nearest = middle - sum((slope.abs() for slope in slopes), torch.zeros(()))
            if not float(nearest.amin()) > 1e-3 * largest:
                return False
            matrices = matrices[:, :-1] / middle[:, None, None]
        return not self._has_ties(matrices, mode)

    def _is_small(self) -> bool:
        """Whether the sum of squares shows that a field's numbers are finite and near: the fastest pass there is."""
        field = self.parameters
        if not field.is_contiguous() or field.dtype != self.dtype:
            return False
        return torch.dot(field.view(-1), field.view(-1)).item() < FAR**2 / 2  # False for NaN

    def _field_has_ties(self) -> bool:
        """Whether much of a field moves nothing, or moves by whole pixels: some of its numbers tell."""
        some = self.parameters.flatten(1, -2)
        some = some[:, :: some.shape[1] * len(some) // 1024 + 1]
        still = some == (some.round() if self.kind == "pixel_displacement" else 0)
        return int(still.count_nonzero()) * 32 > still.numel()

    def _has_ties(self, matrices: Tensor, mode: str) -> bool:
        """Whether a map (B, d, d+1) may send many output pixels to a place where convention picks the side.

        That takes steps of halves of a pixel, or of nothing along all axes but one.
        """
        halves = matrices[:, :, :-1] * _half_steps(self.input_size, self.size, self.align_corners, self.dtype)
        away = halves - halves.round()
        if torch.linalg.vector_norm(away, -math.inf).item() > 2.0**-20:  # the least: so it is for nearly all maps
            return False
        steps = halves / 2
        suspect = away.abs() <= 2.0**-20
        still = steps.abs() <= 2.0**-20
        along_one = still.sum(-1) >= self.dims - 1
        if bool((suspect & ~still & ~along_one[:, :, None]).any()):
            return True
        # One row of pixels tells: all others look at the same places.
        for axis, n in enumerate(reversed(self.input_size)):
            unit = pixels_per_unit(n, self.align_corners)
            middle = matrices[:, axis, -1:] * unit + (n - 1) / 2 + (0.5 if mode == "nearest" else 0.0)
            for other, m in enumerate(reversed(self.size)):
                u = torch.arange(m, dtype=self.dtype) - (m - 1) / 2
                x = torch.addcmul(middle, steps[:, axis, other, None], u)
                tied = ((x - x.round()).abs() <= 2.0**-22 * n).sum(-1)
                if bool((along_one[:, axis] & ~still[:, axis, other] & (tied > 1 + m // 32)).any()):
                    return True
        return False


@functools.lru_cache(16)
def _basis(size: tuple[int, ...], align_corners: bool, dtype: torch.dtype) -> Tensor:
    """(x, 0, 0, 1) for each column and (0, y, z, 0) for each row of an output, normalised: (W + R, d+1)."""
    columns, *others = (_ramp(n, align_corners, dtype) for n in reversed(size))
    basis = torch.zeros(len(columns) + math.prod(size[:-1]), len(size) + 1, dtype=dtype, device="cpu")
    basis[: len(columns), 0], basis[: len(columns), -1] = columns, 1
    rows = basis[len(columns) :].view(*size[:-1], -1)
    for axis, along in enumerate(others, start=1):
        rows[..., axis] = along.view(-1, *[1] * (axis - 1))
    return basis


@functools.lru_cache(16)
def _sums(size: tuple[int, ...], rows: int, align_corners: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices for sums over an output's rows, times y, z and 1, (d, R), and then over its columns, times x and 1, for
    each row of θ, (W * rows, rows * 2); and which of the results, (d, rows, 2), are θ's: (rows * (d+1),).
    """
    width, dims = size[-1], len(size)
    across = _basis(size, align_corners, dtype)[width:, 1:].mT.clone()
    across[-1] = 1
    columns = _ramp(width, align_corners, dtype)
    columns = torch.stack([columns, torch.ones_like(columns)], -1)[:, None, None]
    columns = torch.eye(rows, dtype=dtype, device="cpu")[:, :, None] * columns  # (W, rows, rows, 2)
    place = torch.arange(dims * rows * 2, device="cpu").view(dims, rows, 2)
    chosen = torch.cat([place[-1, :, :1], place[:, :, 1].mT], -1)
    return across, columns.reshape(-1, rows * 2), chosen.flatten()


def _ramp(size: int, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """Normalised positions of output pixels along an axis."""
    unit = pixels_per_unit(size, align_corners)
    return (torch.arange(size, dtype=dtype, device="cpu") - (size - 1) / 2) * (1 / unit if unit else 0.0)


@functools.lru_cache(64)
def _half_steps(input_size: tuple[int, ...], size: tuple[int, ...], align_corners: bool, dtype: torch.dtype) -> Tensor:
    """Half pixels of the input for a pixel of the output, (d, d) x first, where the matrix says 1."""
    source = [pixels_per_unit(n, align_corners) for n in reversed(input_size)]
    target = [pixels_per_unit(n, align_corners) for n in reversed(size)]
    return torch.tensor([[2 * s / t if t else 0.0 for t in target] for s in source], dtype=dtype, device="cpu")


@functools.lru_cache(64)
def _repeated_identity(size: int, times: int, dtype: torch.dtype) -> Tensor:
    return torch.eye(size, dtype=dtype, device="cpu").repeat(1, times)
