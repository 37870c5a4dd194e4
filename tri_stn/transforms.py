"""Transforms: where each output pixel looks in the input.

Every transform is the *inverse* map of the paper (Jaderberg et al. 2015, section 3.2): it sends a
point of the output to the point of the input that is read there. Coordinates are those of
`torch.nn.functional.grid_sample`: normalised to [-1, 1], x first, with the same two meanings of
``align_corners``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real

import torch
import torch.utils.weak
from torch import Tensor

from . import matrices
from .checks import check_devices, check_floating


@dataclass(frozen=True, eq=False, repr=False)
class Transform:
    """What every transform offers the sampler."""

    @property
    def kind(self) -> str:
        """The name of its device functions in the kernels' tables."""
        raise NotImplementedError

    @property
    def parameters(self) -> Tensor:
        """All parameters in one tensor, (N, …) or (N, K, …).

        Made anew at each use, of the numbers as they are then and with a graph of its own: kept, it would be stale
        after an optimiser's step, or without a gradient where it was first asked for under `torch.no_grad`.
        """
        raise NotImplementedError

    @property
    def auxiliary(self) -> Tensor | None:
        """A field beside the parameters, (N or 1, *size, …) or (N or 1, K or 1, *size, …)."""
        return None

    @property
    def batch(self) -> torch.Size:
        """(N,), or (N, K) for K maps per image."""
        raise NotImplementedError

    @property
    def _names(self) -> list[str]:
        """Those of what it is made of, a tensor first."""
        return [field.name for field in fields(self)]

    @property
    def _device(self) -> torch.device:
        """Of its tensors, all of them."""
        return getattr(self, self._names[0]).device

    def __repr__(self) -> str:
        """With tensors' shapes: the numbers of a field would be pages of a traceback."""
        values = ((name, getattr(self, name)) for name in self._names)
        shown = (f"{name}={f'<{tuple(v.shape)}>' if isinstance(v, Tensor) else repr(v)}" for name, v in values)
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def _numbers(self) -> Tensor:
        """What it takes as a link of a chain: (N, count) or (N, K, count)."""
        return self.parameters.flatten(len(self.batch))

    @property
    def _field(self) -> Tensor | None:
        """The field that it reads as a link of a chain."""
        return self.auxiliary

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
            "form, Velocity by its own, Displacement by iteration, and Compose those of its parts."
        )


@dataclass(frozen=True, eq=False, repr=False)
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
        theta = check_floating(self.theta, "Affine", "theta")
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
        return Affine(matrices.invert(self.theta))


class _AffineFamily(Transform):
    """Affine maps with fewer numbers than a matrix, which torch makes of them, with its gradient."""

    translation: Tensor  # a field of the classes below, which put their own before it

    def __post_init__(self) -> None:
        name = type(self).__name__
        translation = check_floating(self.translation, name, "translation")
        dims = translation.shape[-1] if translation.dim() else 0
        if translation.dim() not in (2, 3) or dims not in (1, 2, 3):
            raise ValueError(
                f"{name} takes translation of shape (N, d) or (N, K, d), d = 1, 2 or 3; got {tuple(translation.shape)}."
            )

    @property
    def kind(self) -> str:
        return "affine"

    @property
    def batch(self) -> torch.Size:
        return self.translation.shape[:-1]

    @property
    def dims(self) -> int:
        return self.translation.shape[-1]


@dataclass(frozen=True, eq=False, repr=False)
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
        scale = check_floating(self.scale, "Attention", "scale")
        if scale.shape not in (self.batch, self.translation.shape):
            raise ValueError(
                f"Attention takes scale of shape {tuple(self.batch)} or {tuple(self.translation.shape)} with this "
                f"translation; got {tuple(scale.shape)}."
            )
        check_devices("Attention", scale=scale, translation=self.translation)

    @property
    def parameters(self) -> Tensor:
        linear = self._per_axis(self.scale).expand(self.translation.shape).diag_embed()
        return torch.cat([linear, self.translation.unsqueeze(-1).to(linear.dtype)], -1)

    def _per_axis(self, scale: Tensor) -> Tensor:
        return scale if scale.shape == self.translation.shape else scale.unsqueeze(-1)

    def inverse(self) -> Attention:
        """The window that undoes this one, in the same shapes and dtypes; infinite where the scale is 0."""
        scale = 1 / _wide(self.scale)
        translation = -self._per_axis(scale) * _wide(self.translation)
        return Attention(scale.to(self.scale.dtype), translation.to(self.translation.dtype))


@dataclass(frozen=True, eq=False, repr=False)
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
            value = check_floating(getattr(self, name), "Similarity", name)
            if value.shape != self.batch or self.dims != 2:
                raise ValueError(
                    f"Similarity takes translation (N, 2) or (N, K, 2), and {name} of shape (N,) or (N, K); got "
                    f"{tuple(self.translation.shape)} and {tuple(value.shape)}."
                )
        check_devices("Similarity", scale=self.scale, angle=self.angle, translation=self.translation)

    @property
    def parameters(self) -> Tensor:
        cos, sin = self.scale * self.angle.cos(), self.scale * self.angle.sin()
        x, y = self.translation.to(cos.dtype).unbind(-1)
        return torch.stack([cos, -sin, x, sin, cos, y], -1).unflatten(-1, (2, 3))  # at once: each operator is a kernel

    def inverse(self) -> Similarity:
        """The similarity that undoes this one, in the same shapes and dtypes; infinite where the scale is 0."""
        scale, angle = 1 / _wide(self.scale), _wide(self.angle)
        cos, sin = scale * angle.cos(), scale * angle.sin()
        x, y = _wide(self.translation).unbind(-1)
        translation = -torch.stack([cos * x + sin * y, cos * y - sin * x], -1)
        return Similarity(scale.to(self.scale.dtype), -self.angle, translation.to(self.translation.dtype))


@dataclass(frozen=True, eq=False, repr=False)
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
        matrix = check_floating(self.matrix, "Projective", "matrix")
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
        return Projective(matrices.invert(self.matrix))


@dataclass(frozen=True, eq=False, repr=False)
class _Dense(Transform):
    """A map with d numbers for each output pixel: (N, *size, d) or (N, K, *size, d)."""

    def __post_init__(self) -> None:
        argument = fields(self)[0].name
        field = check_floating(self._given, type(self).__name__, argument)
        dims = field.shape[-1] if field.dim() else 0
        # Not with `in`, which is false under torch.compile where the size is a symbol.
        if not 1 <= dims <= 3 or not dims + 2 <= field.dim() <= dims + 3:
            raise ValueError(
                f"{type(self).__name__} takes {argument} of shape (N, *size, d) or (N, K, *size, d) for d-dimensional "
                f"images, d = 1, 2 or 3; got {tuple(field.shape)}."
            )

    @property
    def _given(self) -> Tensor:
        """The tensor that the class takes first: the parameters, or of their shape."""
        return getattr(self, fields(self)[0].name)

    @property
    def _numbers(self) -> Tensor:
        return self._given.new_empty(*self.batch, 0)

    @property
    def _field(self) -> Tensor:
        return self.parameters

    @property
    def batch(self) -> torch.Size:
        return self._given.shape[: -self.dims - 1]

    @property
    def dims(self) -> int:
        return self._given.shape[-1]

    @property
    def size(self) -> torch.Size:
        return self._given.shape[-self.dims - 1 : -1]


@dataclass(frozen=True, eq=False, repr=False)
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


@dataclass(frozen=True, eq=False, repr=False)
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
        _check_unit("Displacement", self.unit)

    @property
    def kind(self) -> str:
        return _displacement_kind(self.unit)

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


class _PointPairs(Transform):
    """Maps of 2-D images that send some output points to the source points given for them."""

    source_points: Tensor  # a field of the classes below

    @property
    def batch(self) -> torch.Size:
        return self.source_points.shape[:-2]

    @property
    def dims(self) -> int:
        return 2


@dataclass(frozen=True, eq=False, repr=False)
class ThinPlateSpline(_PointPairs):
    """A thin-plate spline: the smoothest map that reads the output points ``target_points`` at ``source_points``.

    The system of K + 3 equations is solved in fp64, once for a tensor ``target_points``, whose identity it is kept by:
    use the same tensor again. Its solution times the source points is a few numbers per map.

    Args:
        target_points: (K, 2), K >= 3, not all on one line, normalised, x first. No gradient.
        source_points: (N, K, 2), or (N, M, K, 2) for M maps per image. May require grad.
        regularization: a number; 0 to pass through the points; more, to bend less.

    Raises:
        TypeError: one of the points is not a floating-point tensor, or regularization not a number.
        ValueError: their shapes do not fit, or target_points requires grad.

    Source: Bookstein 1989; U(r) = r² log r².
    """

    target_points: Tensor
    source_points: Tensor
    regularization: float = 0.0

    def __post_init__(self) -> None:
        targets = _check_constant(self.target_points, "ThinPlateSpline", "target_points")
        sources = check_floating(self.source_points, "ThinPlateSpline", "source_points")
        if not isinstance(self.regularization, (Real, torch.SymFloat)):
            raise TypeError(f"ThinPlateSpline takes regularization as a number; got {self.regularization!r}.")
        if targets.dim() != 2 or targets.shape[1] != 2 or targets.shape[0] < 3:
            raise ValueError(f"ThinPlateSpline takes target_points (K, 2), K >= 3; got {tuple(targets.shape)}.")
        _check_points("ThinPlateSpline", targets, sources)
        check_devices("ThinPlateSpline", target_points=targets, source_points=sources)

    @property
    def kind(self) -> str:
        return f"thin_plate[{self.target_points.shape[0]}]"

    @property
    def parameters(self) -> Tensor:
        # fp64 also keeps autocast and TF32 out of the product.
        solved = _thin_plate_solution(self.target_points, self.regularization)
        bent = solved @ self.source_points.double()
        targets = self.target_points.double().expand(*self.batch, -1, 2)
        return torch.cat([targets, bent], -2).flatten(-2)


_solutions = torch.utils.weak.WeakTensorKeyDictionary()


def _thin_plate_solution(targets: Tensor, regularization: float) -> Tensor:
    """The matrix (K + 3, K) from source points to weights and an affine part (1, x, y)."""
    if torch.compiler.is_compiling() or targets.is_inference():  # these do not say whether they changed
        return _solve_thin_plate(targets, regularization)
    key = targets._version, regularization
    kept = _solutions.get(targets)
    if kept is not None and kept[0] == key:
        return kept[1]
    with torch.inference_mode(False):  # another call's backward pass may save it
        solution = _solve_thin_plate(targets, regularization)
    if type(solution) is Tensor:  # not a mode's stand-in for it
        _solutions[targets] = (key, solution)
    return solution


def _solve_thin_plate(targets: Tensor, regularization: float) -> Tensor:
    points = targets.detach().double()
    count = len(points)
    square = (points.unsqueeze(0) - points.unsqueeze(1)).square().sum(-1)
    bending = square * torch.where(square > 0, square, 1).log()
    identity = torch.eye(count, dtype=points.dtype, device=points.device)
    plane = torch.cat([torch.ones_like(points[:, :1]), points], 1)
    system = torch.cat([bending + regularization * identity, plane], 1)
    below = torch.cat([plane.T, plane.new_zeros(3, 3)], 1)
    return torch.linalg.inv_ex(torch.cat([system, below]))[0][:, :count]  # without waiting for the device


@dataclass(frozen=True, eq=False, repr=False)
class FreeForm(Transform):
    """A free-form deformation: the identity plus a uniform cubic B-spline of displacements.

    With L control points along an axis, they lie h = 2 / (L - 3) apart, the first at -1 - h: the displacement at u is
    ``Σ_k B_k(t) lattice[i + k]``, k = 0 to 3, with s = (u + 1) / h, i = min(⌊s⌋, L - 4), t = s - i. Beyond [-1, 1],
    where only a chain can look, it is the border's. No field of displacements is made.

    Args:
        lattice: (N, *lattice_size, d), d = 1, 2 or 3, at least 4 control points along each axis, or (N, K,
            *lattice_size, d) for K maps per image. Displacements are normalised, x first. May require grad.

    Raises:
        TypeError: lattice is not a floating-point tensor.
        ValueError: lattice has another shape.

    Source: Rueckert et al. 1999.
    """

    lattice: Tensor

    def __post_init__(self) -> None:
        lattice = check_floating(self.lattice, "FreeForm", "lattice")
        dims = lattice.shape[-1] if lattice.dim() else 0
        if not 1 <= dims <= 3 or not dims + 2 <= lattice.dim() <= dims + 3 or min(lattice.shape[-dims - 1 : -1]) < 4:
            raise ValueError(
                "FreeForm takes a lattice (N, *lattice_size, d) or (N, K, *lattice_size, d), d = 1, 2 or 3, of at "
                f"least 4 control points along each axis; got {tuple(lattice.shape)}."
            )

    @property
    def kind(self) -> str:
        sizes = reversed(self.lattice.shape[-self.dims - 1 : -1])
        return f"free_form[{','.join(str(int(n)) for n in sizes)}]"

    @property
    def parameters(self) -> Tensor:
        return self.lattice.flatten(-self.dims - 1)

    @property
    def batch(self) -> torch.Size:
        return self.lattice.shape[: -self.dims - 1]

    @property
    def dims(self) -> int:
        return self.lattice.shape[-1]


@dataclass(frozen=True, eq=False, repr=False)
class PiecewiseAffine(_PointPairs):
    """An affine map of its own on each triangle of a mesh; outside every triangle, out of bounds.

    The corner ``target_points[i]`` of the output reads ``source_points[..., i, :]``. Where triangles
    overlap, the first counts.

    Args:
        target_points: (K, 2), normalised, x first. No gradient.
        triangles: (T, 3), integers: the corners of each triangle, in any order. An index of none of the K points is
            an IndexError on the CPU, at the first use; on CUDA a failed assertion, after which no kernel runs.
        source_points: (N, K, 2), or (N, M, K, 2) for M maps per image. May require grad.

    Raises:
        TypeError: points that are not floating-point tensors, or triangles that are not integers.
        ValueError: their shapes do not fit, or target_points requires grad.
    """

    target_points: Tensor
    triangles: Tensor
    source_points: Tensor

    def __post_init__(self) -> None:
        targets = _check_constant(self.target_points, "PiecewiseAffine", "target_points")
        sources = check_floating(self.source_points, "PiecewiseAffine", "source_points")
        if not isinstance(self.triangles, Tensor) or self.triangles.dtype not in (torch.int32, torch.int64):
            raise TypeError("PiecewiseAffine takes triangles as a torch.Tensor of int64 or int32.")
        if targets.dim() != 2 or targets.shape[1] != 2 or self.triangles.dim() != 2 or self.triangles.shape[1] != 3:
            raise ValueError(
                "PiecewiseAffine takes target_points (K, 2) and triangles (T, 3); got "
                f"{tuple(targets.shape)} and {tuple(self.triangles.shape)}."
            )
        _check_points("PiecewiseAffine", targets, sources)
        check_devices("PiecewiseAffine", target_points=targets, triangles=self.triangles, source_points=sources)

    @property
    def kind(self) -> str:
        return f"piecewise_affine[{self.triangles.shape[0]}]"

    @property
    def parameters(self) -> Tensor:
        corners = self.target_points.detach().double()[self.triangles]  # (T, 3, 2)
        columns = torch.cat([corners, torch.ones_like(corners[..., :1])], -1).mT
        shares = torch.linalg.inv_ex(columns)[0].flatten(-2)  # (T, 9); a flat triangle holds no point
        sources = self.source_points.double()[..., self.triangles, :].flatten(-2)
        return torch.cat([shares.expand(*self.batch, -1, 9), sources], -1).flatten(-2)


@dataclass(frozen=True, eq=False, repr=False)
class LinearBasis(Transform):
    """The paper's general class T = M_θ B: for an output pixel p, ``x_k(p) = Σ_b coefficients[k, b] basis[b, p]``.

    Args:
        coefficients: (N, d, B), or (N, K, d, B) for K maps per image. x first. May require grad.
        basis: (B, *size), any strides, read where it lies: B functions of the output pixel. May require grad.

    Raises:
        TypeError: one of them is not a floating-point tensor.
        ValueError: their shapes do not fit.

    Source: Jaderberg et al. 2015, section 3.2.
    """

    coefficients: Tensor
    basis: Tensor

    def __post_init__(self) -> None:
        coefficients = check_floating(self.coefficients, "LinearBasis", "coefficients")
        basis = check_floating(self.basis, "LinearBasis", "basis")
        fits = coefficients.dim() in (3, 4) and 2 <= basis.dim() <= 4
        if not fits or coefficients.shape[-2:] != (basis.dim() - 1, basis.shape[0]):
            raise ValueError(
                "LinearBasis takes coefficients (N, d, B) or (N, K, d, B) and a basis (B, *size) of d dimensions; got "
                f"{tuple(coefficients.shape)} and {tuple(basis.shape)}."
            )
        check_devices("LinearBasis", coefficients=coefficients, basis=basis)

    @property
    def kind(self) -> str:
        return f"linear_basis[{self.basis.shape[0]}]"

    @property
    def parameters(self) -> Tensor:
        return self.coefficients.flatten(-2)

    @property
    def auxiliary(self) -> Tensor:
        return self.basis.movedim(0, -1)[(None,) * len(self.batch)]

    @property
    def batch(self) -> torch.Size:
        return self.coefficients.shape[:-2]

    @property
    def dims(self) -> int:
        return self.basis.dim() - 1

    @property
    def size(self) -> torch.Size:
        return self.basis.shape[1:]


class Compose(Transform):
    """Several maps in one pass: ``Compose(a, b)`` reads the input at b(a(p)).

    Nothing in between is stored. Neighbouring affine and projective maps become one matrix. A field in the
    chain, a `Displacement` or `Grid`, is itself read bilinearly where the maps before it look, and beyond
    its border as at the border. It may have any size, but that of the first map is the output's. One field at
    most; join two first: the displacement of "f, then g" is ``f + warp(g, Displacement(f))``, fields as images.

    Args:
        *transforms: two or more, all for the same number of dimensions, each for N or (N, K) maps; one map serves
            any number. A `LinearBasis` has to be the first.

    Raises:
        TypeError: something is not a transform.
        ValueError: they do not fit together.
    """

    def __init__(self, *transforms: Transform) -> None:
        if not transforms:
            raise ValueError("Compose takes one transform or more; got none.")
        for t in transforms:
            if not isinstance(t, Transform):
                raise TypeError(f"Compose takes transforms such as tri_stn.Affine(theta); got {type(t).__name__}.")
        if len({t.dims for t in transforms}) > 1:
            raise ValueError(f"Compose takes maps of the same dimensions; got {[t.dims for t in transforms]}.")
        if any(t._device != transforms[0]._device for t in transforms):
            devices = [f"{type(t).__name__} on {t._device}" for t in transforms]
            raise ValueError(f"Compose takes maps on one device; got {', '.join(devices)}. Move one with .to().")
        parts = _parts(transforms)
        fields = [t for t in parts if _has_field(t)]
        if len(fields) > 1:
            raise ValueError(
                f"Compose takes one field; got {' and '.join(type(t).__name__ for t in fields)}. Join them first: the "
                "displacement of f, then g is f + warp(g, Displacement(f)), with fields as images."
            )
        empty = [t for t in parts[1:] if isinstance(t, _Dense) and 0 in t.size]
        if empty:
            raise ValueError(
                f"A field that is read in a Compose has at least one pixel; got a {type(empty[0]).__name__} of size "
                f"{tuple(empty[0].size)}."
            )
        if any(isinstance(t, LinearBasis) for t in parts[1:]):
            raise ValueError("A LinearBasis has its numbers at output pixels: it has to be the first of a Compose.")
        ranks = max(len(t.batch) for t in parts)
        shapes = [(*t.batch, *(1,) * (ranks - len(t.batch))) for t in parts]
        try:
            batch = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            raise ValueError(
                f"Compose takes maps with the same batch (N,) or (N, K), or 1; got {[tuple(t.batch) for t in parts]}."
            ) from None
        object.__setattr__(self, "_batch", torch.Size(batch))
        object.__setattr__(self, "transforms", tuple(parts if _are_matrices(parts) else _joined(parts)))

    transforms: tuple[Transform, ...]
    """The maps; among others, neighbouring matrices are a `Compose` of their own, which is one matrix."""
    _batch: torch.Size

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.transforms))})"

    @property
    def kind(self) -> str:
        kinds = [t.kind for t in self.transforms]
        if _are_matrices(self.transforms):
            return "projective" if "projective" in kinds else "affine"
        return "+".join(kinds)

    @property
    def parameters(self) -> Tensor:
        if len(self.transforms) == 1:
            return self.transforms[0].parameters
        if _are_matrices(self.transforms):
            return matrices.compose(*(t.parameters for t in self.transforms))
        numbers = [self._spread(t, t._numbers) for t in self.transforms]
        wide = functools.reduce(torch.promote_types, (n.dtype for n in numbers))
        return torch.cat([n.expand(*self.batch, -1).to(wide) for n in numbers], -1)

    @property
    def auxiliary(self) -> Tensor | None:
        if len(self.transforms) == 1:
            return self.transforms[0].auxiliary
        for t in self.transforms:
            if _has_field(t) and (field := t._field) is not None:
                return self._spread(t, field)
        return None

    def _spread(self, transform: Transform, tensor: Tensor) -> Tensor:
        """A part's tensor with the axes of the whole chain's batch."""
        return tensor if len(transform.batch) == len(self.batch) else tensor.unsqueeze(1)

    @property
    def batch(self) -> torch.Size:
        return self._batch

    @property
    def _device(self) -> torch.device:
        return self.transforms[0]._device

    @property
    def dims(self) -> int:
        return self.transforms[0].dims

    @property
    def size(self) -> torch.Size | None:
        return self.transforms[0].size

    @property
    def align_corners(self) -> bool | None:
        return next((t.align_corners for t in self.transforms if t.align_corners is not None), None)

    def inverse(self) -> Transform:
        """The inverses in the opposite order; an iterated one, of a `Displacement`, by default settings."""
        return Compose(*(t.inverse() for t in reversed(self.transforms)))


_MATRICES = ("affine", "projective")


def _are_matrices(transforms: Sequence[Transform]) -> bool:
    return all(t.kind in _MATRICES for t in transforms)


def _parts(transforms: Sequence[Transform]) -> list[Transform]:
    """The maps of a chain, one by one."""
    return [part for t in transforms for part in (_parts(t.transforms) if isinstance(t, Compose) else [t])]


def _joined(parts: Sequence[Transform]) -> list[Transform]:
    """Neighbouring matrices as one map."""
    joined: list[Transform] = []
    for t in parts:
        if joined and _are_matrices([joined[-1], t]):
            joined[-1] = Compose(joined[-1], t)
        else:
            joined.append(t)
    return joined


def _has_field(transform: Transform) -> bool:
    """Whether it reads a field as a link of a chain, which takes a while to make for some."""
    return isinstance(transform, (_Dense, LinearBasis))


def _check_constant(tensor: object, name: str, argument: str) -> Tensor:
    tensor = check_floating(tensor, name, argument)
    if tensor.requires_grad:
        raise ValueError(f"{name} has no gradient for {argument}; got one that requires grad. Give it detached.")
    return tensor


def _check_points(name: str, targets: Tensor, sources: Tensor) -> None:
    if sources.dim() not in (3, 4) or sources.shape[-2:] != targets.shape:
        raise ValueError(
            f"{name} takes source_points (N, {len(targets)}, 2) or (N, M, {len(targets)}, 2) with these "
            f"target_points; got {tuple(sources.shape)}."
        )


def _check_unit(name: str, unit: object) -> None:
    if unit not in ("normalized", "pixel"):
        raise ValueError(f"{name} takes unit 'normalized' or 'pixel'; got {unit!r}.")


def _displacement_kind(unit: str) -> str:
    return "displacement" if unit == "normalized" else "pixel_displacement"


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 or wider, to compute in and round once."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
