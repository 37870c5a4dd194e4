"""Names to device functions: what a kernel is composed of at compile time.

A new transform, interpolation or padding mode is one row in a table here and one pair of device
functions where the row points.
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from . import chain as chains
from . import interpolation, launch, padding, points, transforms


@dataclass(frozen=True)
class Transform:
    """A transform's device functions, described in `transforms`."""

    load: Any
    load_vjp: Any
    map: Any
    map_jvp: Any
    map_vjp: Any
    map_vjp_jvp: Any = None
    """None for a map that is linear in its coefficients."""
    bounds: Any = None
    box: Any = None
    columns: Any = None
    meets: Any = None
    """None for a map without bounds for a walk."""
    shrink: Any = None
    """None for a map that shrinks more here than there."""
    refine: Any = None
    dense: bool = False
    """Whether there are parameters for each output pixel."""


@dataclass(frozen=True)
class Interpolation:
    weight: Any
    weight_vjp: Any
    weight_curvature: Any
    taps: int


@dataclass(frozen=True)
class Padding:
    pad: Any
    pad_vjp: Any
    folds: bool
    """Whether a sample outside the image reads something."""


TRANSFORMS = {
    "affine": Transform(
        transforms.affine_load,
        transforms.affine_load_vjp,
        transforms.affine,
        transforms.affine_jvp,
        transforms.affine_vjp,
        bounds=transforms.affine_bounds,
        box=transforms.affine_box,
        columns=transforms.affine_columns,
        meets=transforms.affine_meets,
        shrink=transforms.affine_shrink,
        refine=transforms.affine_refine,
    ),
    "projective": Transform(
        transforms.projective_load,
        transforms.projective_load_vjp,
        transforms.projective,
        transforms.projective_jvp,
        transforms.projective_vjp,
        transforms.projective_vjp_jvp,
    ),
    "grid": Transform(
        transforms.grid_load,
        transforms.grid_load_vjp,
        transforms.dense,
        transforms.dense_jvp,
        transforms.dense_vjp,
        dense=True,
    ),
    "displacement": Transform(
        transforms.displacement_load,
        transforms.grid_load_vjp,
        transforms.dense,
        transforms.dense_jvp,
        transforms.dense_vjp,
        dense=True,
    ),
    "pixel_displacement": Transform(
        transforms.pixel_displacement_load,
        transforms.pixel_displacement_load_vjp,
        transforms.dense,
        transforms.dense_jvp,
        transforms.dense_vjp,
        dense=True,
    ),
}

INTERPOLATIONS = {
    "nearest": Interpolation(interpolation.nearest, interpolation.nearest_vjp, interpolation.nearest_curvature, taps=1),
    "bilinear": Interpolation(interpolation.linear, interpolation.linear_vjp, interpolation.linear_curvature, taps=2),
    "bicubic": Interpolation(interpolation.cubic, interpolation.cubic_vjp, interpolation.cubic_curvature, taps=4),
}

PADDINGS = {
    "zeros": Padding(padding.zeros, padding.zeros_vjp, folds=False),
    "border": Padding(padding.border, padding.border_vjp, folds=True),
    "reflection": Padding(padding.reflection, padding.reflection_vjp, folds=True),
}


@dataclass(frozen=True)
class Link:
    """A map of points, described in `points`."""

    map: Any
    map_vjp: Any
    count: Any
    """(dimensions, *sizes) → how many numbers it takes per map."""
    table: bool = True
    """Whether it reads them from a table, or takes them as a tuple."""


LINKS = {
    "affine": Link(points.affine, points.affine_vjp, lambda dims: dims * (dims + 1), table=False),
    "projective": Link(points.projective, points.projective_vjp, lambda dims: (dims + 1) ** 2, table=False),
    "thin_plate": Link(points.thin_plate, points.thin_plate_vjp, lambda _, knots: 4 * knots + 6),
    "free_form": Link(points.free_form, points.free_form_vjp, lambda dims, *lattice: math.prod(lattice) * dims),
    "piecewise_affine": Link(points.piecewise_affine, points.piecewise_affine_vjp, lambda _, triangles: 15 * triangles),
    "linear_basis": Link(points.linear_basis, points.linear_basis_vjp, lambda dims, functions: dims * functions),
    "grid": Link(points.field, points.field_vjp, lambda _: 0),
    "displacement": Link(points.displacement, points.displacement_vjp, lambda _: 0),
    "pixel_displacement": Link(points.pixel_displacement, points.pixel_displacement_vjp, lambda _: 0),
}

_CHAIN = Transform(
    chains.chain_load, chains.chain_load_vjp, transforms.dense, transforms.dense_jvp, transforms.dense_vjp
)


def transform(kind: str) -> Transform:
    """The stages of a kind: its own, or those of a chain of links, "affine+free_form:0,12;…" (see `chain`)."""
    return TRANSFORMS.get(kind, _CHAIN)


@functools.cache
def _parse(kind: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """A chain's links, by name, and their sizes."""
    found = re.findall(r"(\w+)(?:\[([\d,]*)\])?", kind)
    return tuple((name, tuple(int(n) for n in sizes.split(",") if n)) for name, sizes in found)


def is_chain(kind: str) -> bool:
    return kind not in TRANSFORMS


def chain(kind: str, auxiliary: Any, grad_auxiliary: Any, dims: int) -> Any:
    """A kind's links as the kernels take them, and what they read, described in `chain`, without the pointers of
    fields, which `with_fields` adds; empty for a map that is no chain.

    A kind is its links' names, joined by "+", each with its sizes, x first: "affine+free_form[8,6]". The numbers of
    one map lie in this order.
    """
    if not is_chain(kind):
        return (), ()
    links, sizes, start = (), (), 0
    for name, size in _parse(kind):
        link = LINKS[name]
        count = link.count(dims, *size)
        links += ((link.map, link.map_vjp, tl.constexpr(0 if link.table else count)),)
        sizes += ((start, *size),)
        start += count
    field, grad_field = (), ()
    if auxiliary is not None:
        size = tuple(reversed(auxiliary.shape[2:-1]))
        field = (launch.shared_strides(auxiliary), size, auxiliary.shape[0])
    if grad_auxiliary is not None:
        grad_field = (launch.shared_strides(grad_auxiliary),)
    return links, (sizes, field, grad_field)


def gather(kind: str, mode: str, padding_mode: str) -> dict[str, Any]:
    """The stages of the gather kernel, by the names of its arguments."""
    return {
        "LOAD": transform(kind).load,
        "ONCE": not transform(kind).dense and not is_chain(kind),
        "TRANSFORM": transform(kind).map,
        "TRANSFORM_JVP": transform(kind).map_jvp,
        "SHRINK": transform(kind).shrink,
        "PADDING": PADDINGS[padding_mode].pad,
        "PADDING_VJP": PADDINGS[padding_mode].pad_vjp,
        "WEIGHT": INTERPOLATIONS[mode].weight,
        "WEIGHT_VJP": INTERPOLATIONS[mode].weight_vjp,
        "WEIGHT_CURVATURE": INTERPOLATIONS[mode].weight_curvature,
        "TAPS": INTERPOLATIONS[mode].taps,
    }


def scatter(kind: str, mode: str, padding_mode: str) -> dict[str, Any]:
    """The stages of the scatter kernel: the gather's and the transform's gradient."""
    return gather(kind, mode, padding_mode) | {
        "LOAD_VJP": transform(kind).load_vjp,
        "TRANSFORM_VJP": transform(kind).map_vjp,
        "TRANSFORM_VJP_JVP": transform(kind).map_vjp_jvp,
    }


def walk(kind: str, mode: str, padding_mode: str) -> dict[str, Any]:
    """The stages of the walk kernel."""
    named = scatter(kind, mode, padding_mode)
    # Walked maps are linear so far, and all their coefficients serve all pixels.
    for name in ("PADDING", "PADDING_VJP", "TRANSFORM_VJP_JVP", "ONCE"):
        del named[name]
    return named | {
        "BOUNDS": transform(kind).bounds,
        "BOX": transform(kind).box,
        "COLUMNS": transform(kind).columns,
        "MEETS": transform(kind).meets,
        "REFINE": transform(kind).refine,
        "FOLDS": PADDINGS[padding_mode].folds,
    }
