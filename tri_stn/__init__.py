"""Spatial transformer sampling for PyTorch, fused in Triton: no grid is ever stored."""

from . import nn
from .diffeomorphic import Velocity
from .extend import register_transform
from .functional import grid_sample, splat, warp
from .fuse import fuse
from .lazy import affine_grid
from .matrices import (
    boxes,
    compose,
    crop_box,
    from_pixel_matrix,
    invert,
    rotation,
    scaling,
    shear,
    to_pixel_matrix,
    translation,
)
from .transforms import (
    Affine,
    Attention,
    Compose,
    Displacement,
    FreeForm,
    Grid,
    LinearBasis,
    PiecewiseAffine,
    Projective,
    Similarity,
    ThinPlateSpline,
)

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Attention",
    "Compose",
    "Displacement",
    "FreeForm",
    "Grid",
    "LinearBasis",
    "PiecewiseAffine",
    "Projective",
    "Similarity",
    "ThinPlateSpline",
    "Velocity",
    "affine_grid",
    "boxes",
    "compose",
    "crop_box",
    "from_pixel_matrix",
    "fuse",
    "grid_sample",
    "invert",
    "nn",
    "register_transform",
    "rotation",
    "scaling",
    "shear",
    "splat",
    "to_pixel_matrix",
    "translation",
    "warp",
]
