"""Names to device functions: what a kernel is composed of at compile time.

A new transform, interpolation or padding mode is one row in a table here and one pair of device
functions where the row points.
"""

from dataclasses import dataclass
from typing import Any

from . import interpolation, padding, transforms


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
    rows: Any = None
    columns: Any = None
    """None for a map without bounds for a walk."""
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
        rows=transforms.affine_rows,
        columns=transforms.affine_columns,
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


def gather(kind: str, mode: str, padding_mode: str) -> dict[str, Any]:
    """The stages of the gather kernel, by the names of its arguments."""
    return {
        "LOAD": TRANSFORMS[kind].load,
        "TRANSFORM": TRANSFORMS[kind].map,
        "TRANSFORM_JVP": TRANSFORMS[kind].map_jvp,
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
        "LOAD_VJP": TRANSFORMS[kind].load_vjp,
        "TRANSFORM_VJP": TRANSFORMS[kind].map_vjp,
        "TRANSFORM_VJP_JVP": TRANSFORMS[kind].map_vjp_jvp,
    }


def walk(kind: str, mode: str, padding_mode: str) -> dict[str, Any]:
    """The stages of the walk kernel."""
    named = scatter(kind, mode, padding_mode)
    del named["PADDING"], named["PADDING_VJP"], named["TRANSFORM_VJP_JVP"]  # walked maps are linear so far
    return named | {
        "ROWS": TRANSFORMS[kind].rows,
        "COLUMNS": TRANSFORMS[kind].columns,
        "FOLDS": PADDINGS[padding_mode].folds,
    }
