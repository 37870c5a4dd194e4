"""Transforms: where each output pixel looks in the input.

Every transform is the *inverse* map of the paper (Jaderberg et al. 2015, section 3.2): it sends a
point of the output to the point of the input that is read there. Coordinates are those of
`torch.nn.functional.grid_sample`: normalised to [-1, 1], x first, with the same two meanings of
``align_corners``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Transform:
    """What every transform offers the sampler."""

    kind: ClassVar[str]
    """The name of its device functions in the kernels' tables."""

    @property
    def parameters(self) -> Tensor:
        """All parameters in one tensor, (N, …) or (N, K, …)."""
        raise NotImplementedError

    @property
    def batch(self) -> torch.Size:
        """(N,), or (N, K) for K maps per image."""
        raise NotImplementedError

    @property
    def dims(self) -> int:
        """Spatial dimensions of the images that it maps."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Affine(Transform):
    """An affine map, with the same ``theta`` as `torch.nn.functional.affine_grid`.

    The output point (x, y) looks at the input point ``theta @ (x, y, 1)``.

    Args:
        theta: (N, 2, 3), one map per image, or (N, K, 2, 3), K maps per image; any float dtype.
            In normalised coordinates, x first. May require grad.

    Raises:
        TypeError: theta is not a floating-point tensor.
        ValueError: theta has another shape.
    """

    theta: Tensor

    kind: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        theta = self.theta
        if not isinstance(theta, Tensor):
            raise TypeError(f"Affine takes theta as a torch.Tensor; got {type(theta).__name__}.")
        if not theta.is_floating_point():
            raise TypeError(
                f"Affine takes theta in a floating-point dtype; got {theta.dtype}. Convert it with .float()."
            )
        if theta.dim() not in (3, 4) or theta.shape[-2:] != (2, 3):
            raise ValueError(f"Affine takes theta of shape (N, 2, 3) or (N, K, 2, 3); got {tuple(theta.shape)}.")

    @property
    def parameters(self) -> Tensor:
        return self.theta

    @property
    def batch(self) -> torch.Size:
        return self.theta.shape[:-2]

    @property
    def dims(self) -> int:
        return self.theta.shape[-2]
