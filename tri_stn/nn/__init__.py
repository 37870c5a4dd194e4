"""Spatial Transformer modules: what goes into a network, and what trains it."""

from .localisation import Convolutional, FullyConnected
from .losses import BendingEnergy, GradientLoss, LocalNCCLoss, bending_energy, gradient_loss, local_ncc
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
from .rectifier import TPSRectifier
from .registration import DisplacementWarp, ScalingAndSquaring
from .transformer import SpatialTransformer

__all__ = [
    "AffineMap",
    "AttentionMap",
    "BendingEnergy",
    "Convolutional",
    "DisplacementWarp",
    "FreeFormMap",
    "FullyConnected",
    "GradientLoss",
    "LinearBasisMap",
    "LocalNCCLoss",
    "ParametricMap",
    "PiecewiseAffineMap",
    "ProjectiveMap",
    "ScalingAndSquaring",
    "SimilarityMap",
    "SpatialTransformer",
    "TPSRectifier",
    "ThinPlateSplineMap",
    "bending_energy",
    "gradient_loss",
    "local_ncc",
]
