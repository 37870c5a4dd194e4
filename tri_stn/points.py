"""Maps of points in plain PyTorch, and chains of them: where a normalised point goes.

The twins of `kernels.points`. They are written so that autograd can follow them: the CPU path takes their
gradients that way, and so do the derivatives that no kernel has. Shape notes: M images, K maps per
image, P points; points are x first, (P,) or (M, K, P) along each axis.

A kind is its links' names, joined by "+", each with its sizes, x first: "affine+free_form[8,6]". The numbers of a
map, (M, K, count), lie in this order; a field, (M or fewer, K or 1, *size, …), serves the one link that reads one.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FAR = 2.0**20
"""Out of bounds for whatever comes next."""
Point = Sequence[Tensor]


@dataclass(frozen=True)
class Table:
    """What a link reads: its numbers (M, K, count), its sizes, a field, and where the points are output pixels
    (their indices, x first, each (P,)).
    """

    numbers: Tensor
    sizes: tuple[int, ...]
    field: Tensor | None
    index: Sequence[Tensor]
    input_size: tuple[int, ...]
    align_corners: bool
    held: Tensor | None
    """The map's own numbers, where `numbers` are a tangent of them: asks for the part that is linear in these."""


def affine(theta: Sequence[Tensor], v: Point) -> Point:
    """theta, (d, d+1)."""
    return _rows(theta, v)


def projective(theta: Sequence[Tensor], v: Point) -> Point:
    """A homogeneous matrix, (d+1, d+1); at or behind infinity, far away."""
    *y, divisor = _rows(theta, v)
    ahead = divisor > 1e-30
    inverse = 1 / torch.where(ahead, divisor, 1)
    return [torch.where(ahead, a * inverse, _FAR) for a in y]


def _rows(theta: Sequence[Tensor], v: Point) -> list[Tensor]:
    rows = itertools.zip_longest(*[iter(theta)] * (len(v) + 1))
    return [sum((t * a for t, a in zip(row, v, strict=False)), row[-1]) for row in rows]


def thin_plate(table: Table, v: Point) -> Point:
    """K target points (K, 2), their weights (K, 2) and an affine part (3, 2): 1, x, y."""
    knots = table.sizes[0]
    targets, weights, plane = table.numbers.split([2 * knots, 2 * knots, 6], -1)
    targets, weights, plane = (t.unflatten(-1, (-1, 2)) for t in (targets, weights, plane))
    points = torch.stack([torch.ones_like(v[0]), *v], -1)  # ([M, K,] P, 3)
    if table.held is not None:
        targets = table.held[..., : 2 * knots].unflatten(-1, (-1, 2))
    square = sum((a.unsqueeze(-1) - t.unsqueeze(-2)) ** 2 for a, t in zip(v, targets.unbind(-1), strict=True))
    bend = square * torch.where(square > 0, square, 1).log()  # (M, K, P, knots)
    return (times(points, plane) + times(bend, weights)).unbind(-1)


def free_form(table: Table, v: Point) -> Point:
    """A lattice, (*lattice_size, d), of displacements: uniform cubic B-splines."""
    dims, sizes = len(v), table.sizes
    lattice = table.numbers.unflatten(-1, (-1, dims))
    places = [((a + 1) * ((n - 3) / 2)).nan_to_num(nan=0).clamp(0, n - 3) for a, n in zip(v, sizes, strict=True)]
    cells = [s.detach().floor().clamp(max=n - 4).long() for s, n in zip(places, sizes, strict=True)]
    moved = torch.zeros((), dtype=lattice.dtype, device=lattice.device)
    for taps in itertools.product(range(4), repeat=dims):
        at, step, weight = torch.zeros_like(cells[0]), 1, torch.ones_like(places[0])
        for s, i, tap, n in zip(places, cells, taps, sizes, strict=True):
            at, step = at + (i + tap) * step, step * n
            weight = weight * _spline(s + 1 - (i + tap))
        moved = moved + weight.unsqueeze(-1) * _rows_of(lattice, at)
    return (
        list(moved.unbind(-1)) if table.held is not None else [a + m for a, m in zip(v, moved.unbind(-1), strict=True)]
    )


def _rows_of(tables: Tensor, at: Tensor) -> Tensor:
    """Entries (P,) or (M, K, P) of tables (M, K, count, d) → (M, K, P, d)."""
    at = at.expand(*tables.shape[:2], -1)
    return tables.gather(2, at.unsqueeze(-1).expand(*at.shape, tables.shape[-1]))


def _spline(x: Tensor) -> Tensor:
    """The cubic B-spline, at most 2 from its middle."""
    d = x.abs()
    return torch.where(d <= 1, (0.5 * d - 1) * d * d + 2 / 3, (2 - d) ** 3 / 6)


def piecewise_affine(table: Table, v: Point) -> Point:
    """T triangles: a matrix (3, 3) from (x, y, 1) to barycentric coordinates, and the source points (3, 2)."""
    triangles = table.numbers.unflatten(-1, (-1, 15))
    held = None if table.held is None else table.held.unflatten(-1, (-1, 15))
    x, y = (torch.full((), _FAR if table.held is None else 0.0, dtype=a.dtype, device=a.device) for a in v)
    free = torch.ones((), dtype=torch.bool, device=x.device)
    for t in range(table.sizes[0]):
        numbers = [n.unsqueeze(-1) for n in triangles[..., t, :].unbind(-1)]
        matrix = (numbers if held is None else [n.unsqueeze(-1) for n in held[..., t, :].unbind(-1)])[:9]
        rows = [[n.detach() for n in matrix[3 * k : 3 * k + 3]] for k in range(3)]
        shares = [a * v[0] + b * v[1] + c for a, b, c in rows]
        here = functools.reduce(torch.logical_and, [s >= -1e-6 for s in shares], free)
        x = torch.where(here, sum(s * n for s, n in zip(shares, numbers[9::2], strict=True)), x)
        y = torch.where(here, sum(s * n for s, n in zip(shares, numbers[10::2], strict=True)), y)
        free = free & ~here
    return [x, y]


def linear_basis(table: Table, v: Point) -> Point:
    """Coefficients (d, B) of a basis, (*size, B): B numbers for each output pixel."""
    assert table.field is not None
    coefficients = table.numbers.unflatten(-1, (len(v), -1))
    basis = _read(table, table.index)
    return times(basis, coefficients.mT).unbind(-1)


def times(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, with derivatives: in fp64, which keeps autocast and TF32 out of all of them."""
    return (left.double() @ right.double()).to(right.dtype)


def field(table: Table, v: Point) -> Point:
    """A field of points, (*field_size, d), read bilinearly; beyond its border, the border's."""
    assert table.field is not None
    size = tuple(reversed(table.field.shape[2:-1]))
    below, shares = [], []
    for a, n in zip(v, size, strict=True):
        x = a * pixels_per_unit(n, table.align_corners) + (n - 1) / 2
        # Clamped as ATen does: on the edge, no slope.
        x = torch.where((x > 0) & (x < n - 1), x, x.detach().nan_to_num(nan=0).clamp(0, n - 1))
        below.append(x.detach().floor())
        shares.append(x - below[-1])
    result = torch.zeros((), dtype=v[0].dtype, device=v[0].device)
    for corner in itertools.product((0, 1), repeat=len(v)):
        index = [(b.long() + c).clamp(max=n - 1) for b, c, n in zip(below, corner, size, strict=True)]
        weight = functools.reduce(torch.mul, (s if c else 1 - s for s, c in zip(shares, corner, strict=True)))
        result = result + weight.unsqueeze(-1) * _read(table, index)
    return result.unbind(-1)


def displacement(table: Table, v: Point) -> Point:
    """The point, moved by a field of normalised displacements."""
    return [a + m for a, m in zip(v, field(table, v), strict=True)]


def pixel_displacement(table: Table, v: Point) -> Point:
    """The same by displacements in pixels of the input."""
    per_unit = [pixels_per_unit(n, table.align_corners) for n in table.input_size]
    return [a + m / p for a, m, p in zip(v, field(table, v), per_unit, strict=True)]


def _read(table: Table, index: Sequence[Tensor]) -> Tensor:
    """A field's numbers at pixels, x first, (P,) or (M, K, P) → (M, K, P, …)."""
    assert table.field is not None
    images, maps = table.numbers.shape[:2]
    n = torch.arange(images, device=index[0].device)[:, None, None] % table.field.shape[0]
    k = torch.arange(maps, device=index[0].device)[:, None] % table.field.shape[1]
    where = [n, k, *reversed(index)]
    return table.field[tuple(where)].to(table.numbers.dtype)


def pixels_per_unit(size: int, align_corners: bool) -> float:
    """How many pixels one normalised unit spans."""
    return (size - 1) / 2 if align_corners else size / 2


# --- chains ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    map: Callable[..., Point]
    count: Callable[..., int]
    """(dimensions, *sizes) → how many numbers it takes per map."""
    table: bool = True
    """Whether it takes a `Table`, or its numbers as a tuple, each (M, K, 1)."""
    linear: bool = True
    """Whether the kernels have its derivatives of all orders: it is linear in its one tensor of numbers."""
    reads_field: bool = False


LINKS = {
    "affine": Link(affine, lambda dims: dims * (dims + 1), table=False, linear=False),
    "projective": Link(projective, lambda dims: (dims + 1) ** 2, table=False, linear=False),
    "thin_plate": Link(thin_plate, lambda _, knots: 4 * knots + 6),
    "free_form": Link(free_form, lambda dims, *lattice: math.prod(lattice) * dims),
    "piecewise_affine": Link(piecewise_affine, lambda _, triangles: 15 * triangles),
    "linear_basis": Link(linear_basis, lambda dims, functions: dims * functions, linear=False, reads_field=True),
    "grid": Link(field, lambda _: 0, linear=False, reads_field=True),
    "displacement": Link(displacement, lambda _: 0, linear=False, reads_field=True),
    "pixel_displacement": Link(pixel_displacement, lambda _: 0, linear=False, reads_field=True),
}


@functools.cache
def parse(kind: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """A kind's links, by name, and their sizes."""
    found = re.findall(r"(\w+)(?:\[([\d,]*)\])?", kind)
    return tuple((name, tuple(int(n) for n in sizes.split(",") if n)) for name, sizes in found)


def is_linear(kind: str) -> bool:
    """Whether a chain is one link that is linear in its numbers."""
    links = parse(kind)
    return len(links) == 1 and LINKS[links[0][0]].linear


def follow(
    kind: str, numbers: Tensor, field: Tensor | None, v: Point, index: Sequence[Tensor],
    input_size: tuple[int, ...], align_corners: bool, held: Tensor | None = None,
) -> Point:  # fmt: skip
    """Points through all links of a chain, each axis (M, K, P)."""
    start = 0
    for name, sizes in parse(kind):
        link = LINKS[name]
        stop = start + link.count(len(v), *sizes)
        own = numbers[..., start:stop]
        if link.table:
            own_held = None if held is None else held[..., start:stop]
            v = link.map(Table(own, sizes, field, index, input_size, align_corners, own_held), v)
        else:
            v = link.map(own.unsqueeze(-1).unbind(-2), v)
        start = stop
    shape = *numbers.shape[:2], index[0].shape[0]
    return [a.expand(shape) for a in v]


def grid(
    kind: str, numbers: Tensor, field: Tensor | None, size: Sequence[int], input_size: Sequence[int],
    align_corners: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """A chain as an explicit grid, (M, K, *size, d), normalised: for derivatives that no kernel has. Stored!"""
    rest = torch.arange(math.prod(size), device=numbers.device)
    index, v = [], []
    for n in reversed(size):
        index.append(rest % n)
        v.append((index[-1].to(dtype) - (n - 1) / 2) / (pixels_per_unit(n, align_corners) or 1))
        rest = rest // n
    points = follow(kind, numbers.to(dtype), field, v, index, tuple(reversed(input_size)), align_corners)
    return torch.stack(list(points), -1).unflatten(2, tuple(size))
