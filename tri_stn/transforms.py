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

    @property
    def align_corners(self) -> bool | None:
        """The ``align_corners`` that the parameters were made for, and `warp` must be given; None for either."""
        return None

    def inverse(self) -> Transform:
        """The map from points of the input to points of the output.

        Raises:
            NotImplementedError: this transform has none.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no inverse(). Affine, Attention, Similarity and Projective have one in closed "
            "form, Velocity by its own, and Displacement by iteration."
        )


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

    def inverse(self) -> Affine:
        """The inverse map, as of `invert`: of a singular theta, infinities and NaN, without an error."""
        from .matrices import invert

        return Affine(invert(self.theta))


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
        return self._per_axis(self.scale).expand(self.translation.shape).diag_embed()

    def _per_axis(self, scale: Tensor) -> Tensor:
        return scale if scale.shape == self.translation.shape else scale.unsqueeze(-1)

    def inverse(self) -> Attention:
        """The window that undoes this one, in the same shapes and dtypes; infinite where the scale is 0."""
        scale = 1 / _wide(self.scale)
        translation = -self._per_axis(scale) * _wide(self.translation)
        return Attention(scale.to(self.scale.dtype), translation.to(self.translation.dtype))


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

    def inverse(self) -> Similarity:
        """The similarity that undoes this one, in the same shapes and dtypes; infinite where the scale is 0."""
        scale, angle = 1 / _wide(self.scale), _wide(self.angle)
        cos, sin = scale * angle.cos(), scale * angle.sin()
        x, y = _wide(self.translation).unbind(-1)
        translation = -torch.stack([cos * x + sin * y, cos * y - sin * x], -1)
        return Similarity(scale.to(self.scale.dtype), -self.angle, translation.to(self.translation.dtype))


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

    def inverse(self) -> Projective:
        """The inverse map, as of `invert`: of a singular matrix, infinities and NaN, without an error.

        What this map sends to y with a divisor w > 0 comes back from y with the divisor 1 / w, so nothing
        that is in view of one is behind infinity for the other.
        """
        from .matrices import invert

        return Projective(invert(self.matrix))


@dataclass(frozen=True, eq=False)
class _Dense(Transform):
    """A map with d numbers for each output pixel: (N, *size, d) or (N, K, *size, d)."""

    def __post_init__(self) -> None:
        argument = fields(self)[0].name
        field = _check_floating(self._numbers, type(self).__name__, argument)
        dims = field.shape[-1] if field.dim() else 0
        # Not with `in`, which is false under torch.compile where the size is a symbol.
        if not 1 <= dims <= 3 or not dims + 2 <= field.dim() <= dims + 3:
            raise ValueError(
                f"{type(self).__name__} takes {argument} of shape (N, *size, d) or (N, K, *size, d) for d-dimensional "
                f"images, d = 1, 2 or 3; got {tuple(field.shape)}."
            )

    @property
    def _numbers(self) -> Tensor:
        """The tensor that the class takes first: the parameters, or of their shape."""
        return getattr(self, fields(self)[0].name)

    @property
    def batch(self) -> torch.Size:
        return self._numbers.shape[: -self.dims - 1]

    @property
    def dims(self) -> int:
        return self._numbers.shape[-1]

    @property
    def size(self) -> torch.Size:
        return self._numbers.shape[-self.dims - 1 : -1]


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
            raise ValueError(f"{type(self).__name__} takes unit 'normalized' or 'pixel'; got {self.unit!r}.")

    @property
    def kind(self) -> str:
        return "displacement" if self.unit == "normalized" else "pixel_displacement"

    @property
    def parameters(self) -> Tensor:
        return self.field

    def inverse(self, iterations: int = 20, align_corners: bool = False) -> Displacement:
        """The inverse map, by fixed-point iteration.

        The inverse's displacement v solves v(p) = -f(p + v(p)) for this field f, which is read bilinearly and,
        beyond the outermost pixels, as they are. From v = -f, each iteration puts v into the right side. It converges
        if f has a Lipschitz constant L < 1 (two of its vectors differ by less than their places are apart); the
        error is at most L ** (iterations + 1) times the largest displacement. Otherwise the map may
        fold, has no inverse, and the result is without meaning.

        Args:
            iterations: how often f is read, at least 0. A backward pass keeps one field for each.
            align_corners: as it will be given to `warp`, with this transform and with its inverse.

        Returns:
            A displacement of the same size, unit and dtype; 16-bit fields are iterated in fp32 and rounded
            once. Differentiable in the field, through the iterations. The images that both read have the
            field's size (where the unit is "normalized", any).

        Raises:
            TypeError: iterations is not an integer, or align_corners not a bool.
            ValueError: iterations is negative.
        """
        from .diffeomorphic import invert_displacement

        return Displacement(invert_displacement(self, iterations, align_corners), self.unit)


def _check_floating(tensor: object, name: str, argument: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} takes {argument} as a torch.Tensor; got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} takes {argument} in a floating-point dtype; got {tensor.dtype}. Convert it with .float()."
        )
    return tensor


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 or wider, to compute in and round once."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
