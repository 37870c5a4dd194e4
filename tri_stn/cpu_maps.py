"""Grids for torch's sampler on the CPU, part by part and in few passes over memory, and their gradients' way back.

Grids of matrices and splines are made as planes, one for each axis, which ATen reads as fast as pairs. With columns
along x and rows along the other axes, a matrix takes one addition for each number,

    grid[row, column] = (θ_x · x[column] + θ_1) + (θ_y · y[row] + θ_z · z[row])

and a spline one product of matrices with terms that all maps share. Fields stay in their own order of memory.

A row of a matrix that moves along one axis of the output is straight: it has a number for each of its columns or rows,
which may lie on pixels all along. Then these are made from a table of pixels, on the side that convention picks.

Shape notes: B maps, R rows and W columns of an output, d dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .points import parse, pixels_per_unit

CHUNK_BYTES = 2**23
"""Working memory: the grid of a whole output up to this size; of a part of it, with what is read there."""
SMALL = 2**10
"""Pixels of an output that fill few of ATen's vectors."""
FAR = 1e4
"""Numbers of a map beyond this are left to the reference: ATen's CPU sampler takes 32-bit pixels."""

_MATRICES, _FIELDS, _SPLINE = ("affine", "projective"), ("grid", "displacement", "pixel_displacement"), "thin_plate"


@dataclass(frozen=True)
class Part:
    """Some images with all their maps, some maps of one image, or some rows of one map; of `equal_parts` any maps, and
    the images that they look at.
    """

    images: slice
    first: int
    last: int
    """The maps, and positions along the first axis of the output: the first and the one after the last."""
    start: int
    stop: int
    together: int
    """How many maps of an image lie below each other, in one grid."""

    @property
    def maps(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Maps:
    """B = M * K maps of one size."""

    parameters: Tensor
    """(B, …), in the dtype of the computation but for fields, which keep their own."""
    per_image: int
    kind: str
    """Of a chain of one link, the link's name."""
    input_size: tuple[int, ...]
    size: tuple[int, ...]
    padding_mode: str
    align_corners: bool
    dtype: torch.dtype

    @staticmethod
    def of(
        parameters: Tensor, shape: Sequence[int], size: Sequence[int], dtype: torch.dtype,
        kind: str, mode: str, padding_mode: str, align_corners: bool,
    ) -> Maps | None:  # fmt: skip
        """The maps, where they are served for images (M, C, *input_size) of a shape."""
        dims = len(size)
        if kind.startswith(_SPLINE) and len(parse(kind)) == 1:
            kind = _SPLINE
        elif kind not in _MATRICES + _FIELDS:
            return None
        if dims not in (2, 3) or (dims == 3 and mode == "bicubic"):
            return None
        if len(parameters) != shape[0] or 0 in (*shape, *size, parameters.shape[1]):
            return None
        if kind == "pixel_displacement" and align_corners and 1 in shape[2:]:
            return None  # such an axis has no unit to normalise by
        flat = parameters.flatten(0, 1) if parameters.shape[1] > 1 else parameters[:, 0]
        maps = Maps(
            flat if kind in _FIELDS else flat.to(dtype),
            parameters.shape[1], kind, tuple(shape[2:]), tuple(size), padding_mode, align_corners, dtype,
        )  # fmt: skip
        return maps if maps._is_served(mode) else None

    @property
    def dims(self) -> int:
        return len(self.size)

    @property
    def count(self) -> int:
        return len(self.parameters)

    @functools.cached_property
    def are_on_pixels(self) -> bool:
        """Whether all samples are seen to lie on pixels, so that neighbours weigh nothing."""
        if self.kind in _FIELDS:
            return self.kind != "grid" and self.size == self.input_size and self._squares == 0
        if self.kind == _SPLINE or self._tied is None:
            return False
        rows, _, x = self._tied
        return len(rows) == self.count * self.dims and torch.equal(x, x.floor())

    def parts(self, channels: int, forward: bool, copied: bool, rows: bool = True) -> list[Part]:
        """The whole where its grids, one or with its gradient two, are small; else parts for which they are, with what
        a map's output or image takes beside, which counts for the whole too if it is `copied`. In `rows`, or with all
        maps of an image together, as the gradient of an image wants them. Of several images each thread has one, as
        long as that takes no more than all grids, and what torch copies as well.
        """
        beside = channels * math.prod(self.size if forward else self.input_size) * self.dtype.itemsize
        grids = 1 if forward else 2
        limit, height, k = grids * CHUNK_BYTES, self.size[0], self.per_image
        if self.kind == _SPLINE:  # a product of other shape is rounded otherwise: the same parts both ways
            grids, copied = 2, True
            most = max(math.prod(self.size), math.prod(self.input_size))
            limit, beside = 2 * CHUNK_BYTES, channels * most * self.dtype.itemsize
        elif self.kind == "grid" and self.parameters.dtype == self.dtype:
            grids = 0  # there is one, and its gradient is a result
        elif self.kind in _FIELDS:
            grids = 1
        each = grids * self.dims * math.prod(self.size) * self.dtype.itemsize
        all_grids, images = each * self.count, self.count // k
        busy = min(images, torch.get_num_threads()) if images > 1 else 0
        if (each + copied * beside) * self.count <= max(limit, all_grids if busy == images else 0):
            return [Part(slice(None), 0, self.count, 0, height, self._together(self.count, rows))]
        each += beside
        if not forward and rows and self.count == 1:  # each part has an image of its own, which is added
            limit = max(limit, 2 * beside)
        step = _even(limit // each, k)
        if busy * k * each <= all_grids + (0 if forward else copied * beside * self.count):
            step = max(step, busy * k)
        if step >= k:
            starts = range(0, self.count, step)
            ends = [min(start + starts.step, self.count) for start in starts]
            return [
                Part(slice(a // k, b // k), a, b, 0, height, self._together(b - a, rows))
                for a, b in zip(starts, ends, strict=True)
            ]
        step = max(1, _even(step, 1))
        band = height if step > 1 or not rows else max(1, limit * height // each)
        if self.kind == _SPLINE:
            band = max(1, band // self._block) * self._block
        return [
            Part(slice(image, image + 1), a, b, start, min(start + band, height), self._together(b - a, rows))
            for image in range(self.count // k)
            for a in range(image * k, (image + 1) * k, step)
            for b in [min(a + step, (image + 1) * k)]
            for start in range(0, height, band)
        ]

    def equal_parts(self, each: int, copied: int) -> list[Part]:
        """The same both ways: the whole, where samples of `each` bytes are no more than CHUNK_BYTES; else some maps, or
        some rows of one, for which they are, with the bytes that are `copied` of each besides; one row at least.
        """
        of_map, height, k = math.prod(self.size), self.size[0], self.per_image
        samples = CHUNK_BYTES // each
        if of_map * self.count > samples:
            samples = CHUNK_BYTES // (each + copied)
        maps, band = max(1, samples // of_map), height if of_map <= samples else max(1, samples * height // of_map)
        if self.kind == _SPLINE:
            band = min(height, max(1, band // self._block) * self._block)
        return [
            Part(slice(first // k, (last - 1) // k + 1), first, last, start, min(start + band, height), 1)
            for first in range(0, self.count, maps)
            for last in [min(first + maps, self.count)]
            for start in range(0, height, band)
        ]

    def _together(self, maps: int, apart: bool) -> int:
        """How many of a part's maps share a grid: those of an image, where there are several images. Those of one image
        may stay apart, which is slower where each fills few vectors.
        """
        if maps > self.per_image:
            return self.per_image
        return 1 if apart and math.prod(self.size) > SMALL else maps

    def grid(self, part: Part) -> Tensor:
        """Where a part's maps look: normalised, (maps / together, together * (stop - start), …, d)."""
        numbers = self.parameters if part.maps == self.count else self.parameters[part.first : part.last]
        if self.kind in _FIELDS:
            grid = self._field(numbers[:, part.start : part.stop], part)
            return grid.reshape(-1, part.together * grid.shape[1], *grid.shape[2:])
        if self.kind == _SPLINE:
            return self._bent(numbers, part)
        planes = self._outer_sum(part)
        if self.kind == "projective":
            planes, divisor = planes.split([self.dims, 1], 1)
            planes.mul_(divisor.reciprocal_())
        return planes.movedim(1, -1)

    def grid_vjp(self, grad: Tensor, grid: Tensor, part: Part) -> Tensor:
        """The gradient of a part's grid, contiguous and ours → that of the maps' numbers, or of the part of a field."""
        of_maps = grad.view(part.maps, -1, *grad.shape[2:])
        if self.kind == "affine":
            return self._outer_sum_vjp(of_maps, part)
        if self.kind == "pixel_displacement":
            of_maps.flatten(-2).mul_(self._per_pixel().repeat(self.size[-1]))
        if self.kind in _FIELDS:
            return of_maps
        if self.kind == _SPLINE:
            return self._bent_vjp(of_maps, part)
        inverse = self._outer_sum(part, slice(self.dims, None)).squeeze(1).reciprocal_()
        rows = [grad[..., axis] * inverse for axis in range(self.dims)]
        last = rows[0] * grid[..., 0]
        for axis in range(1, self.dims):
            last.addcmul_(rows[axis], grid[..., axis])
        return self._outer_sum_vjp(torch.stack([*rows, last.neg_()], -1).view(*of_maps.shape[:-1], -1), part)

    def add_part(self, total: Tensor | None, change: Tensor, part: Part) -> Tensor:
        if total is None:
            total = torch.zeros(self.parameters.shape, dtype=self.dtype)
        maps = total[part.first : part.last]
        if self.kind in _FIELDS:
            maps[:, part.start : part.stop] = change
        else:
            maps += change
        return total

    # Matrices.

    @functools.cached_property
    def _lines(self) -> tuple[Tensor, Tensor]:
        """Each matrix times (x, 0, 0, 1) of each column, (B, rows, W), and times (0, y, z, 0) of each row, (B, rows,
        R); for fields, the identity's. Of all maps, so that every part looks at the same places to the bit.
        """
        if self.kind in _FIELDS:
            return _identity_lines(self.input_size, self.size, self.padding_mode, self.align_corners, self.dtype)
        width, basis = self.size[-1], _basis(self.size, self.align_corners, self.dtype)
        lines = torch.bmm(self.parameters, basis.expand(self.count, -1, -1))
        if self._tied is not None:
            rows, moving, x = self._tied
            g, mine = self._normalized(x, rows % self.dims), _moves(self.size, self.dtype)[1].index_select(0, moving)
            g = torch.cat([g[:, :width], g[:, : lines.shape[2] - width]], 1) * mine
            lines[rows // self.dims, rows % self.dims] = g
        along, across = lines.split([width, basis.shape[1] - width], 2)
        return along, across

    @functools.cached_property
    def _straight(self) -> Tensor | None:
        """Which rows of matrices move along one axis of the output at most, (B, d): they may meet pixels all along."""
        slopes = self.parameters[:, : self.dims, :-1]
        if bool(slopes.all()):  # none is zero: so it is for maps that turn
            return None
        straight = (slopes != 0).sum(-1) <= 1
        if self.kind == "projective":
            straight &= (self.parameters[:, -1] == torch.eye(self.dims + 1, device="cpu")[-1]).all(-1, keepdim=True)
        if self.padding_mode == "reflection":  # beyond the edges, what is left of a pixel lies right of it in the image
            *steps, middle = self._coefficients.abs().unbind(-1)
            reach = sum((step * ((n - 1) / 2) for step, n in zip(steps, reversed(self.size), strict=True)), middle)
            straight &= reach < (torch.tensor(self.input_size[::-1], device="cpu") + 1) / 2
        return straight

    @functools.cached_property
    def _tied(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The straight rows that meet pixels, counted through all maps, the axis of the output along which each moves,
        and where it looks on the way, in pixels and rounded as the reference: (some, the larger of W and R).
        """
        if self._straight is None:
            return None
        rows = self._straight.view(-1).nonzero().squeeze(1)
        slopes, middle = self._coefficients.view(-1, self.dims + 1).index_select(0, rows).split([self.dims, 1], 1)
        moving = slopes.abs().argmax(1)
        x = torch.addcmul(middle, slopes.sum(1, keepdim=True), _moves(self.size, self.dtype)[0].index_select(0, moving))
        x += self._axes[0].index_select(0, rows % self.dims)
        some = ((x - x.round()).abs_().amin(1) <= 2.0**-22 * max(self.input_size)).nonzero().squeeze(1)
        return (rows[some], moving[some], x[some]) if len(some) else None

    def _normalized(self, x: Tensor, axes: Tensor) -> Tensor:
        """Places in pixels along axes of the input, where ATen finds none left of the pixel that it is right of."""
        _, last, unit, table = (of_axis.index_select(0, axes) for of_axis in self._axes)
        pixel = torch.minimum(x.floor().clamp_(min=-1), last)
        return torch.addcdiv(table.gather(1, (pixel + 1).long()), x - pixel, unit)

    @property
    def _axes(self) -> tuple[Tensor, ...]:
        return _axes(self.input_size, self.align_corners, self.padding_mode == "zeros", self.dtype)

    @functools.cached_property
    def _coefficients(self) -> Tensor:
        """Matrices in pixels, from the middle of the output and of the input: (B, d, d+1)."""
        return self.parameters[:, : self.dims] * self._scale

    @property
    def _scale(self) -> Tensor:
        return _scale(self.input_size, self.size, self.align_corners, self.dtype)

    def _of_part(self, part: Part) -> tuple[Tensor, Tensor]:
        """The lines of a part's maps, and of these the rows of the part."""
        row, (along, across) = math.prod(self.size[1:-1]), self._lines
        if self.kind not in _FIELDS:
            along, across = along[part.first : part.last], across[part.first : part.last]
        return along, across[:, :, part.start * row : part.stop * row]

    def _outer_sum(self, part: Part, rows: slice = slice(None)) -> Tensor:
        """A part's matrices, or some of their rows, times (x, y, z, 1) of each output pixel: planes, (maps / together,
        rows, together * (stop - start), …).
        """
        together = 1 if self.kind in _FIELDS else part.together
        along, across = (line[:, rows].unflatten(0, (-1, together)).transpose(1, 2) for line in self._of_part(part))
        planes = torch.empty((*across.shape, along.shape[-1]), dtype=self.dtype)  # its order in memory is not theirs
        torch.add(across.unsqueeze(-1), along.unsqueeze(-2), out=planes)
        return planes.view(*planes.shape[:2], -1, *self.size[1:])

    def _outer_sum_vjp(self, grad: Tensor, part: Part) -> Tensor:
        width, rows, row = self.size[-1], grad.shape[-1], math.prod(self.size[1:-1])
        across, columns, chosen = _sums(self.size, rows, self.align_corners, self.dtype)
        across = across[:, part.start * row : part.stop * row]
        sums = torch.bmm(
            across.expand(len(grad), -1, -1), grad.reshape(len(grad), -1, width * rows)
        )  # (B, d, W * rows)
        sums = sums.view(-1, width * rows) @ columns
        return sums.view(len(grad), -1).index_select(1, chosen).view(len(grad), rows, -1)

    # Thin-plate splines, all with the same target points.

    @property
    def _knots(self) -> int:
        return (self.parameters.shape[1] - 6) // 4

    @property
    def _block(self) -> int:
        """How many rows' terms are held at a time."""
        return max(1, CHUNK_BYTES // 4 // ((self._knots + 3) * self.size[1] * self.dtype.itemsize))

    def _terms(self, part: Part) -> Iterator[tuple[slice, Tensor]]:
        """For some rows at a time: their pixels' places in the part, and their terms; a small output's are kept."""
        width, targets = self.size[1], tuple(self.parameters[0, : 2 * self._knots].tolist())
        for start in range(part.start, part.stop, self._block):
            stop = min(start + self._block, part.stop)
            terms = _spline_terms if (start, stop) == (0, self.size[0]) else _spline_terms.__wrapped__
            where = slice((start - part.start) * width, (stop - part.start) * width)
            yield where, terms(targets, start, stop, self.size, self.align_corners, self.dtype)

    def _bent(self, numbers: Tensor, part: Part) -> Tensor:
        weights = numbers[:, 2 * self._knots :].unflatten(1, (-1, 2)).mT.flatten(0, 1)  # (maps * 2, knots + 3)
        planes = torch.empty(len(weights), (part.stop - part.start) * self.size[1], dtype=self.dtype)
        for where, terms in self._terms(part):
            torch.mm(weights, terms, out=planes[:, where])
        # Ordered after the product, which rounds a row by where it stands.
        planes = planes.view(-1, part.together, 2, part.stop - part.start, self.size[1])
        return planes.permute(0, 1, 3, 4, 2).flatten(1, 2)

    def _bent_vjp(self, grad: Tensor, part: Part) -> Tensor:
        change = torch.zeros(len(grad), self.parameters.shape[1], dtype=self.dtype)  # of targets, none
        weights = change[:, 2 * self._knots :].unflatten(1, (-1, 2))
        planes = grad.flatten(1, 2).mT.flatten(0, 1)  # copied, as one product takes it
        for where, terms in self._terms(part):
            weights += (planes[:, where] @ terms.mT).unflatten(0, (-1, 2)).mT
        return change

    # Fields.

    def _field(self, field: Tensor, part: Part) -> Tensor:
        field = field.to(self.dtype)
        if self.kind == "grid":
            return field
        planes, units = _planes(field), self._per_pixel()
        if _planes(self.parameters).is_contiguous():  # of the whole, as the sum of a part must not be rounded otherwise
            along, across = self._of_part(part)
            across = across.view(1, self.dims, -1, *self.size[1:-1], 1)
            along = along.view(1, self.dims, *[1] * (self.dims - 1), -1)
            if self.kind == "displacement":
                moved = planes + across
            else:
                moved = torch.addcmul(across, planes, units.view(-1, *[1] * self.dims))
            return moved.add_(along).movedim(1, -1)
        identity = self._outer_sum(part).movedim(1, -1).contiguous()
        into = identity if len(field) == 1 else torch.empty_like(field, memory_format=torch.contiguous_format)
        if self.kind == "displacement":
            return torch.add(identity, field, out=into)
        torch.addcmul(identity.flatten(-2), field.flatten(-2), units.repeat(self.size[-1]), out=into.flatten(-2))
        return into

    def _per_pixel(self) -> Tensor:
        """What a pixel of the input is in normalised units, x first: (d,)."""
        units = [pixels_per_unit(n, self.align_corners) for n in reversed(self.input_size)]
        return torch.tensor([1 / unit if unit else 0.0 for unit in units], dtype=self.dtype)

    # What is served, by the numbers of the maps.

    def _is_served(self, mode: str) -> bool:
        if self.kind in _FIELDS:
            served = self.kind == "grid" or mode == "bicubic" or self.are_on_pixels
            return self._is_near_field() and (served or not self._field_has_ties(mode))
        largest = torch.linalg.vector_norm(self.parameters, math.inf).item()
        if not largest < FAR:  # nor NaN
            return False
        matrices = self.parameters
        if self.kind == _SPLINE:
            knots = self._knots
            if not torch.equal(matrices[:, : 2 * knots], matrices[:1, : 2 * knots].expand(self.count, -1)):
                return False
            weights, plane = matrices[:, 2 * knots :].split([2 * knots, 6], 1)
            straight = torch.linalg.vector_norm(weights, math.inf, 1) < 1e-6
            matrices = plane.view(-1, 3, 2).mT[:, :, [1, 2, 0]][straight]
        elif self.kind == "projective":
            *slopes, middle = matrices[:, -1].unbind(-1)
            nearest = middle - sum((slope.abs() for slope in slopes), torch.zeros(()))
            if not float(nearest.amin()) > 1e-3 * largest:
                return False
            matrices = matrices[:, :-1] / middle[:, None, None]
        straight = self._straight if mode == "bilinear" and self.kind != _SPLINE else None
        if straight is not None and bool(straight.all()):
            return True
        return mode == "bicubic" or not (len(matrices) and self._has_ties(matrices, straight, mode))

    @functools.cached_property
    def _squares(self) -> float:
        """The sum of a field's squares, the fastest pass there is; NaN where there is none that fast."""
        if not self._ordered.is_contiguous() or self._ordered.dtype != self.dtype:
            return math.nan
        flat = self._ordered.view(-1)
        return torch.dot(flat, flat).item()

    @property
    def _ordered(self) -> Tensor:
        """A field in its order of memory, if that is one of the common two."""
        planes = _planes(self.parameters)
        return planes if planes.is_contiguous() else self.parameters

    def _is_near_field(self) -> bool:
        """Whether a field's numbers are finite and near."""
        if self._squares < FAR**2 / 2:  # False for NaN
            return True
        low, high = torch.aminmax(self._ordered)
        return max(-low.item(), high.item()) < FAR  # False for NaN

    def _field_has_ties(self, mode: str) -> bool:
        """Whether a field sends many output pixels to a place where convention picks the side, other than by leaving
        them where they are: some of them tell.
        """
        index, places = _some(self.size, self.count)
        where: tuple[Any, ...] = (slice(None), *index)
        moved = self.parameters[where].double()  # (B, some, d)
        if self.kind == "displacement":
            moved *= self._scale[:, -1]
        tied = self._are_ties((self._scale.diagonal()[:, None] * places[:-1]).mT + moved, mode)
        if mode == "bilinear":
            tied &= moved.abs() > 2.0**-22 * max(self.input_size)
        return int(tied.count_nonzero()) * 32 > moved.numel()

    def _has_ties(self, matrices: Tensor, straight: Tensor | None, mode: str) -> bool:
        """Whether a map (B, d, d+1) may do so, other than along rows that are straight.

        Along an axis of the input that takes steps of halves of a pixel, or of nothing, along all axes of the output
        but one. That one may meet a pixel by chance.
        """
        matrices = matrices * self._scale
        steps = 2 * matrices[:, :, :-1]
        away = (steps - steps.round()).abs()
        if torch.linalg.vector_norm(away, -math.inf).item() > 2.0**-20:  # the least: so it is for nearly all maps
            return False
        suspect = (away <= 2.0**-20).sum(-1) >= self.dims - 1
        if straight is not None:
            suspect &= ~straight
        maps = suspect.any(-1)
        if not bool(maps.any()):
            return False
        _, places = _some(self.size, 1)
        tied = self._are_ties((matrices[maps].double() @ places).mT, mode).double().mean(1)  # (some maps, d)
        chance = 1 / torch.tensor(self.size[::-1], device="cpu")[away[maps].argmax(-1)]
        return bool((suspect[maps] & (tied > chance + 1 / 64)).any())

    def _are_ties(self, x: Tensor, mode: str) -> Tensor:
        """Which places, in pixels from the middle of the input, (…, d), are where convention picks the side."""
        n = torch.tensor(self.input_size[::-1], device="cpu")
        x = x + ((n - 1) / 2 + (0.5 if mode == "nearest" else 0.0))
        return (x - x.round()).abs() <= 2.0**-22 * n


def _even(count: int, unit: int) -> int:
    """As many whole units, of which all threads have as many if there are enough."""
    for whole in (unit * torch.get_num_threads(), unit):
        if count >= whole:
            return count // whole * whole
    return count


def _planes(field: Tensor) -> Tensor:
    """(B, *size, d) → (B, d, *size), a view."""
    return field.movedim(-1, 1)


@functools.lru_cache(16)
def _identity_lines(
    input_size: tuple[int, ...], size: tuple[int, ...], padding_mode: str, align_corners: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    identity = torch.eye(len(size), len(size) + 1, dtype=dtype, device="cpu").unsqueeze(0)
    return Maps(identity, 1, "affine", input_size, size, padding_mode, align_corners, dtype)._lines


@functools.lru_cache(16)
def _axes(input_size: tuple[int, ...], align_corners: bool, zeros: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """For each axis of an input, x first: its middle, its size n and how many pixels a unit spans, (d, 1), and the
    normalised places of pixels from -1 to n, (d, largest n + 2).

    A place that was rounded to the wrong side of its pixel takes a step back. The left side is wrong, but the right one
    of pixel 0 where padding continues the image, as there is no slope there.

    ATen finds (g + 1) * n / 2 - 1/2, or (g + 1) * (n - 1) / 2, in some order, fused or not. Rounding keeps order, and a
    pixel's own place is a number at each step. So what is no less than it before rounding is no less afterwards; and
    g + 1 is not rounded, as g has steps no finer than its.
    """
    n = torch.tensor(input_size[::-1], dtype=torch.float64, device="cpu").unsqueeze(1)
    x = torch.arange(-1, max(input_size) + 1, dtype=torch.float64, device="cpu")
    edge = 0.0 if align_corners else 0.5
    unit = ((n - 1) / 2 + edge).clamp(min=0.5)
    t = ((x + edge) / unit - 1).to(dtype) + 1
    high = t.float().double()  # two products, each exact in fp64
    beyond = (high * unit - (x + edge)) + (t - high) * unit
    coarse = torch.maximum(t, 1 - t)  # of g + 1 and g, the one of longer steps
    step = torch.nextafter(coarse, torch.full_like(coarse, math.inf)) - coarse
    right = (x > 0) | zeros
    t = torch.where(right & (beyond < 0), t + step, torch.where(~right & (beyond > 0), t - step, t))
    return ((n - 1) / 2).to(dtype), n.to(dtype), unit.to(dtype), t - 1


@functools.lru_cache(2)
def _spline_terms(
    targets: tuple[float, ...], start: int, stop: int, size: tuple[int, ...], align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """r² log r² of each target point (x, y), 1, x and y, for the pixels of some rows: (knots + 3, pixels)."""
    points = torch.tensor(targets, dtype=dtype, device="cpu").view(-1, 2)
    x, y = (_ramp(n, align_corners, dtype) for n in reversed(size))
    from_x = (x - points[:, :1]).square_().unsqueeze(1)
    from_y = (y - points[:, 1:]).square_().unsqueeze(2)
    terms = torch.empty(len(points) + 3, stop - start, len(x), dtype=dtype, device="cpu")
    square = torch.add(from_x, from_y[:, start:stop])
    torch.xlogy(square, square, out=terms[:-3])
    terms[-3], terms[-2], terms[-1] = 1, x, y[start:stop, None]
    return terms.flatten(1)


@functools.lru_cache(16)
def _moves(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each axis of an output, x first: indices along it from the middle, of each column, or for the other axes of
    each row, repeated to as many, (d, W or R); and a mask of columns, or of rows, (d, W + R).
    """
    columns, rows = _basis(size, None, dtype)[:-1].split([size[-1], math.prod(size[:-1])], 1)
    most = torch.arange(max(columns.shape[1], rows.shape[1]), device="cpu")
    columns_along, rows_along = (line[:, most.clamp(max=line.shape[1] - 1)] for line in (columns, rows))
    first = torch.arange(len(size), device="cpu").unsqueeze(1) == 0
    mask = (torch.arange(columns.shape[1] + rows.shape[1], device="cpu") < columns.shape[1]) == first
    return torch.where(first, columns_along, rows_along), mask.to(dtype)


@functools.lru_cache(16)
def _some(size: tuple[int, ...], count: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Some pixels of an output, for each of so many: their indices, and where they are from its middle, x first, with
    ones, (d+1, some).
    """
    pixels = math.prod(size)
    some = torch.arange(min(pixels, 1024 // count + 1), device="cpu")
    if len(some) < pixels:  # the golden ratio has no rhythm in common with rows
        some = (some.double() * 0.6180339887498949 % 1 * pixels).long()
    index = torch.unravel_index(some, size)
    places = [along - (n - 1) / 2 for along, n in zip(reversed(index), reversed(size), strict=True)]
    return index, torch.stack([*places, torch.ones_like(places[0])]).double()


@functools.lru_cache(16)
def _basis(size: tuple[int, ...], align_corners: bool | None, dtype: torch.dtype) -> Tensor:
    """(x, 0, 0, 1) for each column and (0, y, z, 0) for each row of an output, normalised, or for None in pixels:
    (d+1, W + R).
    """
    columns, *others = (_ramp(n, align_corners, dtype) for n in reversed(size))
    basis = torch.zeros(len(size) + 1, len(columns) + math.prod(size[:-1]), dtype=dtype, device="cpu")
    basis[0, : len(columns)], basis[-1, : len(columns)] = columns, 1
    rows = basis[:, len(columns) :].unflatten(1, size[:-1])
    for axis, along in enumerate(others, start=1):
        rows[axis] = along.view(-1, *[1] * (axis - 1))
    return basis


@functools.lru_cache(16)
def _sums(size: tuple[int, ...], rows: int, align_corners: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices for sums over an output's rows, times y, z and 1, (d, R), and then over its columns, times x and 1, for
    each row of θ, (W * rows, rows * 2); and which of the results, (d, rows, 2), are θ's: (rows * (d+1),).
    """
    width, dims = size[-1], len(size)
    across = _basis(size, align_corners, dtype)[1:, width:].clone()
    across[-1] = 1
    columns = _ramp(width, align_corners, dtype)
    columns = torch.stack([columns, torch.ones_like(columns)], -1)[:, None, None]
    columns = torch.eye(rows, dtype=dtype, device="cpu")[:, :, None] * columns  # (W, rows, rows, 2)
    place = torch.arange(dims * rows * 2, device="cpu").view(dims, rows, 2)
    chosen = torch.cat([place[-1, :, :1], place[:, :, 1].mT], -1)
    return across, columns.reshape(-1, rows * 2), chosen.flatten()


def _ramp(size: int, align_corners: bool | None, dtype: torch.dtype) -> Tensor:
    """Positions of output pixels along an axis, from its middle: normalised, or for None in pixels."""
    unit = 1.0 if align_corners is None else pixels_per_unit(size, align_corners)
    return (torch.arange(size, dtype=dtype, device="cpu") - (size - 1) / 2) * (1 / unit if unit else 0.0)


@functools.lru_cache(64)
def _scale(input_size: tuple[int, ...], size: tuple[int, ...], align_corners: bool, dtype: torch.dtype) -> Tensor:
    """What a matrix is multiplied by to take output pixels to input pixels, both from the middle: (d, d+1)."""
    source = [pixels_per_unit(n, align_corners) for n in reversed(input_size)]
    target = [pixels_per_unit(n, align_corners) for n in reversed(size)]
    return torch.tensor([[s / t if t else 0.0 for t in target] + [s] for s in source], dtype=dtype, device="cpu")
