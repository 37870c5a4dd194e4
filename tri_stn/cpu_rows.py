"""Images of many channels on the CPU, in channels_last or in a copy: each pixel is a row of a table, an embedding's.

What a sample reads is a weighted sum of a few rows, for which torch has a vectorised loop over channels. What a pixel
gets back is one as well, of the rows of the samples that touch it: their taps are sorted by pixel. Torch's own sampler
is made for channels that lie apart, and answers so.

`warp` and `warp_backward` do what `cpu`'s do, of the same grids. `gather` and `adjoint` are the reference's, for what
those do not serve: its taps, but read by rows.

Shape notes: M images, K maps per image, C channels; S samples of a part, each with T taps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .cpu_maps import Maps, Part
from .points import pixels_per_unit
from .reference import PLAIN, Access, Tap

FEWEST_CHANNELS = 24
"""With fewer, the coordinates cost more than the channels save."""
INDEX_LIMIT = 2**31
"""Of as many rows, or taps, indices have 64 bits."""


def suits(like: Tensor, channels_last: bool) -> bool:
    """Whether an image with the channels, dtype and device of a tensor, in that layout or not, is read by rows."""
    held = like.dtype in (torch.float32, torch.float64)  # a dtype that can hold sums
    return channels_last and held and like.shape[1] >= FEWEST_CHANNELS and like.device.type == "cpu"


# --- tables -----------------------------------------------------------------------------------------


def _is_table(image: Tensor) -> bool:
    """Whether its rows follow each other, which those of a part of an image may not."""
    return image.movedim(1, -1).is_contiguous()


def _rows(samples: Tensor) -> Tensor:
    """(M, C, …) → (S, C): the same memory if that is a table; a copy of a part of an image, or of channels apart."""
    return samples.movedim(1, -1).flatten(0, -2).contiguous()


def _image(table: Tensor, batch: int, size: Sequence[int]) -> Tensor:
    """A table that is nobody else's as an image (batch, C, *size): itself, as autograd lets nobody edit a view."""
    image = table.view(batch, *size, -1).movedim(-1, 1)
    return table.as_strided_(image.shape, image.stride())


def _sums(table: Tensor, index: Tensor, start: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows, each of those that `index` names from its start to the next."""
    return torch._embedding_bag_forward_only(table, index, start, False, 0, False, weights)[0]


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=counts.dtype) - counts


@dataclass(frozen=True)
class _Taps:
    """The rows of a table that S samples touch."""

    index: Tensor
    """(S, T); some row for a tap outside."""
    weights: Tensor
    """(S, T)"""
    lost: Tensor
    """Samples that have taps outside, (lost,)."""
    inside: Tensor
    """Which of theirs lie inside, (lost, T)."""

    def read(self, table: Tensor) -> Tensor:
        """(S, C)"""
        rows = _sums(table, self.index.flatten(), self._start, self.weights.flatten())
        if len(self.lost):  # once more without the rows outside: no product with zero hides what is not finite
            index, weights = (of_all.index_select(0, self.lost)[self.inside] for of_all in (self.index, self.weights))
            start = _starts(self.inside.sum(1, dtype=index.dtype))
            rows.index_copy_(0, self.lost, _sums(table, index, start, weights))
        return rows

    def dots(self, table: Tensor, rows: Tensor) -> Tensor:
        """Each tap's row times its sample's, which is one of (S, C): (S, T), zeros outside."""
        samples, taps = self.index.shape
        sample = torch.arange(samples, dtype=self.index.dtype).repeat_interleave(taps)
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows, table, self.index.flatten(), self._start, sample, 0
        ).view(samples, taps)
        if len(self.lost):
            dots.index_copy_(0, self.lost, torch.where(self.inside, dots.index_select(0, self.lost), 0))
        return dots

    def back(self, rows: Tensor, pixels: int) -> Tensor:
        """What each row of a table of so many pixels gets of its samples', (S, C)."""
        index, order = self._sorted(pixels)
        return self._sums_of(rows, order, torch.bincount(index, minlength=pixels))

    def add_to(self, table: Tensor, rows: Tensor) -> None:
        """The same, added to a table of which these samples may touch a part."""
        index, order = self._sorted(len(table))
        if not len(index):
            return
        first, last = int(index[0]), int(index[-1])
        if last - first < len(index):  # a part in one piece
            table[first : last + 1] += self._sums_of(rows, order, torch.bincount(index - first))
        else:
            touched, counts = torch.unique_consecutive(index, return_counts=True)
            table.index_add_(0, touched, self._sums_of(rows, order, counts))

    def _sorted(self, pixels: int) -> tuple[Tensor, Tensor]:
        """The taps inside by the rows that they touch: those rows, and which taps they are."""
        index, outside = self.index, int((~self.inside).sum())
        if outside:  # they come last, and are left out
            of_lost = torch.where(self.inside, index.index_select(0, self.lost), pixels)
            index = index.index_copy(0, self.lost, of_lost)
        index, order = index.flatten().sort(stable=True)
        return index[: len(index) - outside], order[: len(order) - outside]

    def _sums_of(self, rows: Tensor, order: Tensor, counts: Tensor) -> Tensor:
        taps = self.index.shape[1]  # a power of two
        weights = self.weights.flatten().index_select(0, order)
        return _sums(rows, order >> taps.bit_length() - 1, _starts(counts), weights)

    @property
    def _start(self) -> Tensor:
        """Of each sample's taps."""
        return torch.arange(0, self.index.numel(), self.index.shape[1], dtype=self.index.dtype)


# --- the fast road: the taps of a grid ---------------------------------------------------------------


def warp(input: Tensor, maps: Maps, layout: torch.memory_format, mode: str) -> Tensor:
    """`cpu.warp`: a new (M * K, C, *size) in a layout."""
    mode = "nearest" if maps.are_on_pixels else mode
    one = input.stride(0) == 0  # image for all
    table, parts = _rows(input[:1] if one else input), _parts(maps, input.shape[1])
    per_image = maps.count if one else maps.per_image
    shape = maps.count, input.shape[1], *maps.size
    output = torch.empty(shape, dtype=input.dtype, memory_format=layout) if len(parts) > 1 else None
    for part in parts:
        rows = _taps(maps, part, _axes(maps, maps.grid(part), mode), per_image).read(table)
        if output is None:
            return _image(rows, maps.count, maps.size).contiguous(memory_format=layout)
        target = output.movedim(1, -1)[part.first : part.last, part.start : part.stop]
        target.copy_(rows.view(target.shape))
    assert output is not None
    return output


def warp_backward(
    grad_output: Tensor, input: Tensor, maps: Maps, layout: torch.memory_format,
    need_input: bool, need_parameters: bool, mode: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """`cpu.warp_backward`: the gradient of the image, in a layout, and that of the maps' numbers."""
    mode = "nearest" if maps.are_on_pixels and not need_parameters else mode
    images, channels, *size = input.shape
    pixels, parts = images * math.prod(size), _parts(maps, channels)
    one = input.stride(0) == 0  # image for all, of which each map has a gradient
    table = _rows(input[:1] if one else input) if need_parameters else None
    grad_table = grad_output.new_zeros(pixels, channels) if need_input and len(parts) > 1 else None
    grad_parameters: Tensor | None = None
    for part in parts:
        rows = _rows(grad_output[part.first : part.last, :, part.start : part.stop])
        grid = maps.grid(part)
        axes = _axes(maps, grid, mode)
        taps = _taps(maps, part, axes, maps.per_image)
        if need_input:
            if len(parts) == 1:
                grad_table = taps.back(rows, pixels)
            else:
                assert grad_table is not None
                taps.add_to(grad_table, rows)
        if table is not None:
            read = dataclasses.replace(taps, index=taps.index % len(table)) if one else taps
            change = maps.grid_vjp(_grid_vjp(axes, read.dots(table, rows), grid), grid, part)
            grad_parameters = change if len(parts) == 1 else maps.add_part(grad_parameters, change, part)
    if grad_table is None:
        return None, grad_parameters
    del table  # before the gradient's copy is made
    return _image(grad_table, images, size).contiguous(memory_format=layout), grad_parameters


def _parts(maps: Maps, channels: int) -> list[Part]:
    return maps.equal_parts(16 * 2**maps.dims, channels * maps.dtype.itemsize)  # a tap: 8 bytes, and what leads there


@dataclass(frozen=True)
class _Axis:
    """Where S samples look along an axis of the input."""

    size: int
    stride: int
    """Rows of the table from a pixel to the next."""
    taps: int
    unit: float
    """Pixels of a normalised unit."""
    first: Tensor
    """The pixel of the first tap, as a float."""
    fraction: Tensor
    """How far a sample is from it."""
    slope: Tensor | None
    """What padding makes of a step."""


def _axes(maps: Maps, grid: Tensor, mode: str) -> list[_Axis]:
    """Along x first, by the formulas of torch's vectorised sampler."""
    axes: list[_Axis] = []
    interpolation = reference.INTERPOLATIONS[mode]
    for along, n in enumerate(reversed(maps.input_size)):
        unit = pixels_per_unit(n, maps.align_corners)
        edge = torch.tensor(0.0 if maps.align_corners else -0.5, dtype=grid.dtype)
        x = torch.add(edge, torch.add(grid[..., along], 1).flatten(), alpha=unit)  # fused, as ATen's
        slope = None
        if maps.padding_mode != "zeros":
            fold = _reflection if maps.padding_mode == "reflection" else reference.border
            x, slope = fold(x, n, maps.align_corners)
        first = interpolation.first(x)
        stride = math.prod(axis.size for axis in axes)
        axes.append(_Axis(n, stride, interpolation.taps, unit, first, x.sub_(first), slope))
    return axes


def _reflection(x: Tensor, n: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """By the steps of torch's sampler, from which the reference's differ by a rounding."""
    low, span = (0.0, n - 1) if align_corners else (-0.5, n)
    x = x.sub_(low)
    turned = x < 0
    x = x.abs_()
    x = torch.add(x, x.div(2 * span).trunc_(), alpha=-2 * span) if span else x.zero_()
    back = 2 * span - x
    turned ^= x > back
    x, slope = reference.border(torch.minimum(x, back).add_(low), n, align_corners)
    return x, slope * (1.0 - 2.0 * turned)


def _taps(maps: Maps, part: Part, axes: Sequence[_Axis], per_image: int) -> _Taps:
    taps = [tap[::-1] for tap in itertools.product(*(range(axis.taps) for axis in axes))]  # the next along x first
    dtype, pixels = axes[0].fraction.dtype, math.prod(maps.input_size)
    rows = maps.count // per_image * pixels
    integers = torch.int32 if max(rows, len(axes[0].first) * len(taps)) < INDEX_LIMIT else torch.int64
    image = torch.arange(part.first, part.last, dtype=integers).div_(per_image, rounding_mode="floor").mul_(pixels)
    samples = len(axes[0].first) // len(image)
    base, found = image.repeat_interleave(samples), []
    for axis in axes:
        near = axis.first.clamp(0, max(axis.size - axis.taps, 0))
        base.add_(near.to(integers), alpha=axis.stride)
        found.append(near == axis.first if axis.size >= axis.taps else torch.zeros(len(near), dtype=torch.bool))
    index = torch.empty(len(base), len(taps), dtype=integers)
    for column, tap in zip(index.unbind(1), taps, strict=True):
        step = sum(t * axis.stride for t, axis in zip(tap, axes, strict=True) if axis.size > 1)
        torch.add(base, step, out=column)

    lost = functools.reduce(torch.logical_and, found).logical_not_().nonzero().squeeze(1)
    inside = torch.ones(len(lost), len(taps), dtype=torch.bool)
    if len(lost):
        of_lost = image[lost.div(samples, rounding_mode="floor")].unsqueeze(1).repeat(1, len(taps))
        for axis, along in zip(axes, torch.tensor(taps, dtype=dtype).unbind(1), strict=True):
            place = axis.first.index_select(0, lost).unsqueeze(1) + along
            inside &= (place >= 0) & (place < axis.size)
            of_lost.add_(place.to(integers), alpha=axis.stride)
        index.index_copy_(0, lost, torch.where(inside, of_lost, 0))
    return _Taps(index, _weights(axes, len(taps)), lost, inside)


def _weights(axes: Sequence[_Axis], taps: int) -> Tensor:
    """(S, T)"""
    fractions = [axis.fraction for axis in axes]
    weights = fractions[0].new_empty(len(fractions[0]), taps)
    if taps == 1:
        return weights.fill_(1)
    parts = [1 - fractions[0], fractions[0]]
    for fraction in fractions[1:-1]:
        parts = [part * share for share in (1 - fraction, fraction) for part in parts]
    last = ((part, share) for share in (1 - fractions[-1], fractions[-1]) for part in parts)
    for product, column in zip(last, weights.unbind(1), strict=True):
        torch.mul(*product, out=column)
    return weights


def _grid_vjp(axes: Sequence[_Axis], dots: Tensor, grid: Tensor) -> Tensor:
    """What each tap's weight changes, (S, T), → what the normalised places do: as a grid, contiguous."""
    change = grid.new_zeros(grid.shape)
    for along, axis in enumerate(axes if dots.shape[1] > 1 else ()):  # nearest has no slopes
        planes = dots.unbind(1)
        for other in axes:
            pairs = zip(planes[::2], planes[1::2], strict=True)
            planes = tuple(b - a if other is axis else _between(a, b, other.fraction) for a, b in pairs)
        slope = planes[0] if axis.slope is None else planes[0] * axis.slope
        torch.mul(slope, axis.unit, out=change[..., along].view(-1))
    return change


def _between(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
    """As `torch.lerp`, which makes NaN of two infinities."""
    return torch.addcmul(a * (1 - fraction), b, fraction)


# --- the reference's road, by rows ------------------------------------------------------------------


def _taps_of(corners: Sequence[Tap], image: Tensor) -> _Taps:
    """The reference's, of images (M, C, *size)."""
    first = torch.arange(len(image)).view(-1, 1, 1) * math.prod(image.shape[2:])
    index = torch.stack([corner.flat(image)[:, 0] + first for corner, _ in corners], -1).flatten(0, -2)
    inside = torch.stack([corner.inside for corner, _ in corners], -1).flatten(0, -2)
    weights = torch.stack(torch.broadcast_tensors(*(weight for _, weight in corners)), -1)
    weights = weights.expand(*corners[0][0].inside.shape, -1).reshape(inside.shape)
    lost = (~inside.all(1)).nonzero().squeeze(1)
    return _Taps(torch.where(inside, index, 0), weights, lost, inside.index_select(0, lost))


def _weighted_sum(image: Tensor, corners: Iterable[Tap]) -> Tensor:
    if not _is_table(image):
        return PLAIN.read(image, corners)
    corners = list(corners)
    rows = _taps_of(corners, image).read(_rows(image))
    return rows.view(*corners[0][0].inside.shape, -1).movedim(-1, 1)


def _back(grad_image: Tensor | None, image: Tensor | None, corners: Sequence[Tap], samples: Tensor) -> Iterable[Tensor]:
    if not all(_is_table(there) for there in (grad_image, image) if there is not None):
        return PLAIN.back(grad_image, image, corners, samples)
    like = grad_image if grad_image is not None else image
    if like is None:
        return ()
    taps, rows = _taps_of(corners, like), _rows(samples)
    if grad_image is not None:
        taps.add_to(_rows(grad_image), rows)
    if image is None:
        return ()
    return taps.dots(_rows(image), rows).view(*corners[0][0].inside.shape, -1).unbind(-1)


ROWS = Access(_weighted_sum, _back, tensors=1)
gather = functools.partial(reference.gather, access=ROWS)
adjoint = functools.partial(reference.adjoint, access=ROWS)
