"""Spatial Transformer modules: what goes into a network."""

from .localisation import Convolutional, FullyConnected
from .maps import (
    AffineMap,
    AttentionMap,
    FreeFormMap,
    LinearBasisMap,
    ParametricMap,
    PiecewiseAffineMap,
    ProjectiveMap,
    SimilarityMap,
    ThinPlateSplineMap,
)
from .transformer import SpatialTransformer

__all__ = [
    "AffineMap",
    "AttentionMap",
    "Convolutional",
    "FreeFormMap",
    "FullyConnected",
    "LinearBasisMap",
    "ParametricMap",
    "PiecewiseAffineMap",
    "ProjectiveMap",
    "SimilarityMap",
    "SpatialTransformer",
    "ThinPlateSplineMap",
]
