"""Spatial transformer sampling for PyTorch, fused in Triton: no grid is ever stored."""

from .functional import grid_sample, splat, warp
from .transforms import Affine, Displacement, Grid

__version__ = "0.1.0"

__all__ = ["Affine", "Displacement", "Grid", "grid_sample", "splat", "warp"]
