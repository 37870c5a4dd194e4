"""Transforms: where each output pixel looks in the input.

Every transform is the *inverse* map of the paper (Jaderberg et al. 2015, section 3.2): it sends a
point of the output to the point of the input that is read there. Coordinates are those of
`torch.nn.functional.grid_sample`: normalised to [-1, 1], x first, with the same two meanings of
``align_corners``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Transform:
    """What every transform offers the sampler."""

    @property
    def kind(self) -> str:
        """The name of its device functions in the kernels' tables."""
        raise NotImplementedError

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

    @property
    def kind(self) -> str:
        return "affine"

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


class _AffineFamily(Transform):
    """Affine maps with fewer parameters. Their matrix is a few numbers, made by torch with its gradient."""

    translation: Tensor  # a field of the classes below, which put their own before it

    def __post_init__(self) -> None:
        name = type(self).__name__
        translation = _check_floating(self.translation, name, "translation")
        dims = translation.shape[-1] if translation.dim() else 0
        if translation.dim() not in (2, 3) or dims not in (1, 2, 3):
            raise ValueError(
                f"{name} takes translation of shape (N, d) or (N, K, d), d = 1, 2 or 3; got {tuple(translation.shape)}."
            )

    @property
    def kind(self) -> str:
        return "affine"

    @functools.cached_property
    def parameters(self) -> Tensor:  # type: ignore[override]
        linear = self._linear
        return torch.cat([linear, self.translation.unsqueeze(-1).to(linear.dtype)], -1)

    @property
    def _linear(self) -> Tensor:
        raise NotImplementedError

    @property
    def batch(self) -> torch.Size:
        return self.translation.shape[:-1]

    @property
    def dims(self) -> int:
        return self.translation.shape[-1]


@dataclass(frozen=True, eq=False)
class Attention(_AffineFamily):
    """A window: the paper's attention, which crops, translates and scales (Jaderberg et al. 2015, equation 2).

    The output point x looks at the input point ``scale * x + translation``.

    Args:
        scale: (N,) or (N, K), the window's size as a fraction of the image's; or one for each axis, in
            translation's shape.
        translation: (N, d), or (N, K, d) for K windows per image: the window's centre, normalised, x first. Both
            may require grad.

    Raises:
        TypeError: one of them is not a floating-point tensor.
        ValueError: their shapes do not fit.
    """

    scale: Tensor
    translation: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = _check_floating(self.scale, "Attention", "scale")
        if scale.shape not in (self.batch, self.translation.shape):
            raise ValueError(
                f"Attention takes scale of shape {tuple(self.batch)} or {tuple(self.translation.shape)} with this "
                f"translation; got {tuple(scale.shape)}."
            )

    @property
    def _linear(self) -> Tensor:
        scale = self.scale if self.scale.shape == self.translation.shape else self.scale.unsqueeze(-1)
        return scale.expand(self.translation.shape).diag_embed()


@dataclass(frozen=True, eq=False)
class Similarity(_AffineFamily):
    """A rotation and one scale for both axes, in normalised coordinates: rigid on square images.

    The output point p looks at the input point ``scale * R(angle) p + translation``, where R turns the
    x axis towards the y axis: clockwise on a picture, whose y points down. The picture itself turns the other way.

    Args:
        scale: (N,) or (N, K).
        angle: (N,) or (N, K), in radians.
        translation: (N, 2), or (N, K, 2) for K maps per image, normalised, x first. All may require grad.

    Raises:
        TypeError: one of them is not a floating-point tensor.
        ValueError: their shapes do not fit.
    """

    scale: Tensor
    angle: Tensor
    translation: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "angle"):
            value = _check_floating(getattr(self, name), "Similarity", name)
            if value.shape != self.batch or self.dims != 2:
                raise ValueError(
                    f"Similarity takes translation (N, 2) or (N, K, 2), and {name} of shape (N,) or (N, K); got "
                    f"{tuple(self.translation.shape)} and {tuple(value.shape)}."
                )

    @property
    def _linear(self) -> Tensor:
        cos, sin = self.scale * self.angle.cos(), self.scale * self.angle.sin()
        return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


@dataclass(frozen=True, eq=False)
class Projective(Transform):
    """A projective map (homography): straight lines stay straight, parallels may meet.

    The output point p looks at the input point ``(A p + b) / (w p + c)`` for the matrix ``[[A, b], [w, c]]``. Where the
    divisor is not positive, p is at or behind infinity: out of bounds, and without a gradient. A matrix
    and its negative are not the same map here: of the two take the one with a positive divisor in view.

    Args:
        matrix: (N, d+1, d+1) with d = 2 or 3, one map per image, or (N, K, d+1, d+1), K maps per image;
            any float dtype. In normalised coordinates, x first. May require grad.

    Raises:
        TypeError: matrix is not a floating-point tensor.
        ValueError: matrix has another shape.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        matrix = _check_floating(self.matrix, "Projective", "matrix")
        if matrix.dim() not in (3, 4) or tuple(matrix.shape[-2:]) not in ((3, 3), (4, 4)):
            raise ValueError(
                "Projective takes a matrix of shape (N, 3, 3) or (N, K, 3, 3), or with (4, 4) for 3-D images; got "
                f"{tuple(matrix.shape)}."
            )

    @property
    def kind(self) -> str:
        return "projective"

    @property
    def parameters(self) -> Tensor:
        return self.matrix

    @property
    def batch(self) -> torch.Size:
        return self.matrix.shape[:-2]

    @property
    def dims(self) -> int:
        return self.matrix.shape[-1] - 1


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

    @property
    def kind(self) -> str:
        return "grid"

    @property
    def parameters(self) -> Tensor:
        return self.grid


@dataclass(frozen=True, eq=False)
class Displacement(_Dense):
    """The identity plus a displacement field: dense registration, optical flow.

    The identity is added in fp32 whatever the field's dtype, so a 16-bit field loses nothing of it.

    Args:
        field: (N, *size, d) for d-dimensional images, d = 1, 2 or 3, or (N, K, *size, d) for K maps
            per image; any float dtype and strides. x first. May require grad.
        unit: "normalized", where the input spans two units, or "pixel", of the input.

    Raises:
        TypeError: field is not a floating-point tensor.
        ValueError: field has another shape, or unit is neither.
    """

    field: Tensor
    unit: str = "normalized"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in ("normalized", "pixel"):
            raise ValueError(f"Displacement takes unit 'normalized' or 'pixel'; got {self.unit!r}.")

    @property
    def kind(self) -> str:
        return "displacement" if self.unit == "normalized" else "pixel_displacement"

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
