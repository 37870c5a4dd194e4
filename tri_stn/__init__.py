"""Spatial transformer sampling for PyTorch, fused in Triton: no grid is ever stored."""

from .functional import warp
from .transforms import Affine

__version__ = "0.1.0"

__all__ = ["Affine", "warp"]
