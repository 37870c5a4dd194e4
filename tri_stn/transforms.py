"""Transforms: where each output pixel looks in the input.

Every transform is the *inverse* map of the paper (Jaderberg et al. 2015, section 3.2): it sends a
point of the output to the point of the input that is read there. Coordinates are those of
`torch.nn.functional.grid_sample`: normalised to [-1, 1], x first, with the same two meanings of
``align_corners``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
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

    @property
    def size(self) -> torch.Size | None:
        """The output's spatial size, where the transform fixes it."""
        return None


@dataclass(frozen=True, eq=False)
class Affine(Transform):
    """An affine map, with the same ``theta`` as `torch.nn.functional.affine_grid`.

    The output point (x, y) looks at the input point ``theta @ (x, y, 1)``.

    Args:
        theta: (N, d, d+1) with d = 1, 2 or 3, one map per image, or (N, K, d, d+1), K maps per
            image; any float dtype. In normalised coordinates, x first. May require grad.

    Raises:
        TypeError: theta is not a floating-point tensor.
        ValueError: theta has another shape.
    """

    theta: Tensor

    kind: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        theta = _check_floating(self.theta, "Affine", "theta")
        if theta.dim() not in (3, 4) or tuple(theta.shape[-2:]) not in ((1, 2), (2, 3), (3, 4)):
            raise ValueError(
                "Affine takes theta of shape (N, 2, 3) or (N, K, 2, 3), or with (1, 2) or (3, 4) for 1-D or 3-D "
                f"images; got {tuple(theta.shape)}."
            )

    @property
    def parameters(self) -> Tensor:
        return self.theta

    @property
    def batch(self) -> torch.Size:
        return self.theta.shape[:-2]

    @property
    def dims(self) -> int:
        return self.theta.shape[-2]


@dataclass(frozen=True, eq=False)
class _Dense(Transform):
    """A map with d numbers for each output pixel: (N, *size, d) or (N, K, *size, d)."""

    def __post_init__(self) -> None:
        argument = fields(self)[0].name
        field = _check_floating(self.parameters, type(self).__name__, argument)
        dims = field.shape[-1] if field.dim() else 0
        # Not with `in`, which is false under torch.compile where the size is a symbol.
        if not 1 <= dims <= 3 or not dims + 2 <= field.dim() <= dims + 3:
            raise ValueError(
                f"{type(self).__name__} takes {argument} of shape (N, *size, d) or (N, K, *size, d) for d-dimensional "
                f"images, d = 1, 2 or 3; got {tuple(field.shape)}."
            )

    @property
    def batch(self) -> torch.Size:
        return self.parameters.shape[: -self.dims - 1]

    @property
    def dims(self) -> int:
        return self.parameters.shape[-1]

    @property
    def size(self) -> torch.Size:
        return self.parameters.shape[-self.dims - 1 : -1]


@dataclass(frozen=True, eq=False)
class Grid(_Dense):
    """An explicit grid, as `torch.nn.functional.grid_sample` takes it: where each output pixel looks.

    Args:
        grid: (N, *size, d) for d-dimensional images, d = 1, 2 or 3, or (N, K, *size, d) for K maps
            per image; any float dtype and strides. Normalised, x first. May require grad.

    Raises:
        TypeError: grid is not a floating-point tensor.
        ValueError: grid has another shape.
    """

    grid: Tensor

    kind: ClassVar[str] = "grid"

    @property
    def parameters(self) -> Tensor:
        return self.grid


@dataclass(frozen=True, eq=False)
class Displacement(_Dense):
    """The identity plus a displacement field: dense registration, optical flow.

    The identity is added in fp32 whatever the field's dtype, so a 16-bit field loses nothing of it.

    Args:
        field: (N, *size, d) for d-dimensional images, d = 1, 2 or 3, or (N, K, *size, d) for K maps
            per image; any float dtype and strides. In normalised units, x first. May require grad.

    Raises:
        TypeError: field is not a floating-point tensor.
        ValueError: field has another shape.
    """

    field: Tensor

    kind: ClassVar[str] = "displacement"

    @property
    def parameters(self) -> Tensor:
        return self.field


def _check_floating(tensor: object, name: str, argument: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} takes {argument} as a torch.Tensor; got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} takes {argument} in a floating-point dtype; got {tensor.dtype}. Convert it with .float()."
        )
    return tensor
