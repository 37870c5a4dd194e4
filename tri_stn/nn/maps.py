"""Which numbers make which map: from a localisation network's output to a transform.

Each class says how many numbers one map takes and which of them are the identity. What is not learned (control
points, triangles) is a buffer that follows the module to its device and stays out of the state dict, so it comes back
by itself where a module is built on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_floating
from ..transforms import (
    Affine,
    Attention,
    FreeForm,
    LinearBasis,
    PiecewiseAffine,
    Projective,
    Similarity,
    ThinPlateSpline,
    Transform,
)


class Constants(nn.Module):
    """A module with settings that are tensors: buffers outside the state dict, which `to_empty` leaves without numbers.

    They are kept as they were given too, and put back when the module leaves the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, Tensor] = {}

    def register_constant(self, name: str, value: Tensor | None, learnable: bool = False) -> None:
        if value is not None:
            self._constants[name] = value
            if torch.get_default_device().type == "meta":
                value = value.to("meta")
        if learnable and value is not None:
            self.register_parameter(name, nn.Parameter(value.clone()))
        else:
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Put back what this module was given as tensors, as torch's own modules do: FSDP and others call it.

        Raises:
            ValueError: one was given on the meta device.
        """
        for name, value in self._constants.items():
            own = getattr(self, name)
            if not value.is_meta:
                own.copy_(value)
            elif not own.is_meta and not isinstance(own, nn.Parameter):
                raise ValueError(
                    f"The {name} of this {type(self).__name__} was given on the meta device, where tensors have no "
                    "numbers. Give it on another one: the module follows the default device by itself."
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        on_meta = [name for name, buffer in self.named_buffers(recurse=False) if buffer.is_meta]
        super()._apply(fn, recurse)
        if on_meta and not getattr(self, on_meta[0]).is_meta:  # which to_empty alone can do
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: Mapping, prefix: str, local_metadata: dict, *more: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)
        if local_metadata.get("assign_to_params_buffers"):  # what is learned leaves the meta device by this alone
            for name, value in self._constants.items():
                if name in self._buffers and getattr(self, name).is_meta:
                    self._buffers[name] = value.to(getattr(self, name).dtype)


def real_device() -> torch.device:
    """Where new tensors go, but the CPU for the meta device: it holds no numbers."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


class ParametricMap(Constants):
    """A family of maps, each given by a few numbers. To bring your own, derive from it, or give it a function.

    Args:
        identity: (count,), the numbers of the map to start from, usually the identity.
        build: from parameters (N, count) or (N, K, count) to a transform; subclasses override `forward` instead.

    Example:
        A map that can only turn:

        >>> import torch, tri_stn
        >>> zero = torch.zeros(())
        >>> turn = tri_stn.nn.ParametricMap(torch.zeros(1), lambda p: tri_stn.Similarity(
        ...     torch.ones_like(p[..., 0]), p[..., 0], torch.zeros_like(p).repeat_interleave(2, -1)))
        >>> localisation = tri_stn.nn.FullyConnected(64, turn.count)
        >>> tri_stn.nn.SpatialTransformer(localisation, turn)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    identity: Tensor

    def __init__(self, identity: Tensor, build: Callable[[Tensor], Transform] | None = None) -> None:
        super().__init__()
        if not isinstance(identity, Tensor) or identity.dim() != 1 or not identity.is_floating_point():
            raise ValueError("A map's identity must be a floating-point tensor of shape (count,).")
        self.register_constant("identity", identity.detach())
        self._build = build

    @property
    def count(self) -> int:
        """Numbers of one map."""
        return self.identity.shape[0]

    def forward(self, parameters: Tensor) -> Transform:
        """(N, count) or (N, K, count) → the transform."""
        if self._build is None:
            raise NotImplementedError(f"{type(self).__name__} needs a build function, or a forward method of its own.")
        return self._build(parameters)


class AffineMap(ParametricMap):
    """d (d + 1) numbers, the rows of theta: six in 2-D.

    Example:
        >>> import tri_stn
        >>> tri_stn.nn.AffineMap().identity
        tensor([1., 0., 0., 0., 1., 0.])
    """

    def __init__(self, dims: int = 2) -> None:
        _check_dims("AffineMap", dims)
        super().__init__(torch.eye(dims, dims + 1, device=real_device()).flatten())
        self.dims = dims

    def forward(self, parameters: Tensor) -> Transform:
        return Affine(parameters.unflatten(-1, (self.dims, self.dims + 1)))


class AttentionMap(ParametricMap):
    """A window: its scale (or with ``per_axis`` one for each axis), then its centre.

    With ``inside``, the window never leaves the image: the numbers are then s and c with the scale
    ``smallest + (1 - smallest) sigmoid(s)`` and the centre ``(1 - scale) tanh(c)``. A window that fills the image is
    then out of reach (s would be infinite); it starts at the scale ``start``.

    Args:
        dims: 1, 2 or 3.
        per_axis: a scale for each axis.
        inside: keep the window in the image.
        smallest: with inside, the smallest scale.
        start: with inside, the scale to start at, between smallest and 1.

    Raises:
        ValueError: not 0 < smallest < start < 1.

    Example:
        >>> import torch, tri_stn
        >>> window = tri_stn.nn.AttentionMap(inside=True)(torch.tensor([[-3.0, 100.0, 0.0]]))
        >>> (window.scale + window.translation[:, 0]).item()  # its right edge is the image's
        1.0
    """

    def __init__(
        self, dims: int = 2, per_axis: bool = False, inside: bool = False, smallest: float = 0.1, start: float = 0.9
    ) -> None:
        _check_dims("AttentionMap", dims)
        if not 0 < smallest < start < 1:
            raise ValueError(f"AttentionMap takes 0 < smallest < start < 1; got {smallest} and {start}.")
        scales = dims if per_axis else 1
        share = (start - smallest) / (1 - smallest)
        scale = math.log(share / (1 - share)) if inside else 1.0
        super().__init__(torch.tensor([scale] * scales + [0.0] * dims, device=real_device()))
        self.dims, self.per_axis, self.inside, self.smallest = dims, per_axis, inside, smallest

    def forward(self, parameters: Tensor) -> Transform:
        scale, centre = parameters.split([self.count - self.dims, self.dims], -1)
        if self.inside:
            scale = self.smallest + (1 - self.smallest) * scale.sigmoid()
            centre = (1 - scale) * centre.tanh()
        return Attention(scale if self.per_axis else scale.squeeze(-1), centre)


class SimilarityMap(ParametricMap):
    """Four numbers: the logarithm of the scale, the angle in radians, the translation.

    Example:
        >>> import tri_stn
        >>> tri_stn.nn.SimilarityMap().identity
        tensor([0., 0., 0., 0.])
    """

    def __init__(self) -> None:
        super().__init__(torch.zeros(4, device=real_device()))

    def forward(self, parameters: Tensor) -> Transform:
        scale, angle = parameters[..., 0], parameters[..., 1]
        return Similarity(scale.exp(), angle, parameters[..., 2:])


class ProjectiveMap(ParametricMap):
    """(d + 1)² - 1 numbers, the rows of the matrix without its last entry, which is 1: eight in 2-D.

    Example:
        >>> import tri_stn
        >>> tri_stn.nn.ProjectiveMap().count
        8
    """

    def __init__(self, dims: int = 2) -> None:
        _check_dims("ProjectiveMap", dims, (2, 3))
        super().__init__(torch.eye(dims + 1, device=real_device()).flatten()[:-1])
        self.dims = dims

    def forward(self, parameters: Tensor) -> Transform:
        matrix = torch.cat([parameters, torch.ones_like(parameters[..., :1])], -1)
        return Projective(matrix.unflatten(-1, (self.dims + 1, self.dims + 1)))


class ThinPlateSplineMap(ParametricMap):
    """2 K numbers, the source points of K control points: at first, these points themselves.

    Args:
        target_points: (rows, columns) for a regular grid of them over the output, as in the paper (4 × 4); or a
            tensor (K, 2), normalised, x first.
        regularization: as of `ThinPlateSpline`.
        identity: (K, 2), the source points to start from, if not target_points.

    Example:
        >>> import tri_stn
        >>> tri_stn.nn.ThinPlateSplineMap().count
        32
    """

    target_points: Tensor

    def __init__(
        self, target_points: Sequence[int] | Tensor = (4, 4), regularization: float = 0.0,
        identity: Tensor | None = None,
    ) -> None:  # fmt: skip
        points = target_points if isinstance(target_points, Tensor) else _regular_points(target_points)
        points = points.detach().clone()
        ThinPlateSpline(points, points.unsqueeze(0), regularization)  # which says what does not fit
        super().__init__(points.flatten() if identity is None else _start("ThinPlateSplineMap", identity, points.shape))
        self.register_constant("target_points", points)
        self.regularization = regularization

    def forward(self, parameters: Tensor) -> Transform:
        return ThinPlateSpline(self.target_points, parameters.unflatten(-1, (-1, 2)), self.regularization)


class FreeFormMap(ParametricMap):
    """The displacements of a lattice of control points, at first 0: cubic B-splines.

    Args:
        lattice_size: control points along each axis, as in a shape (y before x), at least 4.

    Example:
        >>> import tri_stn
        >>> tri_stn.nn.FreeFormMap((5, 6)).count
        60
    """

    def __init__(self, lattice_size: Sequence[int] = (5, 5)) -> None:
        if not isinstance(lattice_size, Iterable) or not all(isinstance(n, Integral) for n in lattice_size):
            raise TypeError(f"FreeFormMap takes lattice_size as integers, one for each axis; got {lattice_size!r}.")
        lattice = torch.zeros(1, *lattice_size, len(lattice_size), device=real_device())
        FreeForm(lattice)  # which says what does not fit
        super().__init__(lattice.flatten())
        self.lattice_size = tuple(lattice_size)

    def forward(self, parameters: Tensor) -> Transform:
        return FreeForm(parameters.unflatten(-1, (*self.lattice_size, len(self.lattice_size))))


class PiecewiseAffineMap(ParametricMap):
    """2 K numbers, the source points of a regular mesh of K corners over the output: at first, themselves.

    Args:
        corners: (rows, columns) of the mesh; each of its cells is two triangles.

    Example:
        >>> import tri_stn
        >>> tri_stn.nn.PiecewiseAffineMap((3, 3)).count
        18
    """

    target_points: Tensor
    triangles: Tensor

    def __init__(self, corners: Sequence[int] = (4, 4)) -> None:
        points = _regular_points(corners)
        super().__init__(points.flatten())
        index = torch.arange(len(points), device=points.device).view(*corners)
        a, b, c, d = (t.flatten() for t in (index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]))
        self.register_constant("target_points", points)
        self.register_constant("triangles", torch.cat([torch.stack([a, b, c], -1), torch.stack([b, d, c], -1)]))

    def forward(self, parameters: Tensor) -> Transform:
        return PiecewiseAffine(self.target_points, self.triangles, parameters.unflatten(-1, (-1, 2)))


class LinearBasisMap(ParametricMap):
    """d B coefficients of a basis of B functions of the output pixel: the paper's T = M_θ B.

    Args:
        basis: (B, *size), which also is the output's size.
        learnable: whether the basis is learned too, as a parameter of this module.
        identity: (d, B), the coefficients to start from. By default those that give the identity (under
            align_corners=False), which the basis has to contain.

    Raises:
        ValueError: no coefficients give the identity.

    Example:
        >>> import torch, tri_stn
        >>> y, x = torch.meshgrid(*[torch.linspace(-7 / 8, 7 / 8, 8)] * 2, indexing="ij")
        >>> basis = torch.stack([torch.ones_like(x), x, y, x * y, x * x, y * y])
        >>> tri_stn.nn.LinearBasisMap(basis).count
        12
    """

    basis: Tensor

    def __init__(self, basis: Tensor, learnable: bool = False, identity: Tensor | None = None) -> None:
        basis = check_floating(basis, "LinearBasisMap", "basis")
        shape = torch.Size((max(basis.dim() - 1, 0), *basis.shape[:1]))
        LinearBasis(basis.new_empty(1, *shape), basis)  # which says what does not fit
        start = _identity_in(basis).flatten() if identity is None else _start("LinearBasisMap", identity, shape)
        super().__init__(start)
        self.register_constant("basis", basis.detach(), learnable)

    def forward(self, parameters: Tensor) -> Transform:
        return LinearBasis(parameters.unflatten(-1, (self.basis.dim() - 1, -1)), self.basis)


def _check_dims(name: str, dims: int, allowed: Sequence[int] = (1, 2, 3)) -> None:
    if not isinstance(dims, Integral) or dims not in allowed:
        raise ValueError(f"{name} takes dims {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}; got {dims!r}.")


def _start(name: str, identity: Tensor, shape: torch.Size) -> Tensor:
    """The numbers to start from, in one row."""
    identity = check_floating(identity, name, "identity")
    if identity.numel() != shape.numel():
        raise ValueError(f"{name} takes identity of shape {tuple(shape)} here; got {tuple(identity.shape)}.")
    return identity.flatten()


def _regular_points(counts: Sequence[int]) -> Tensor:
    """(rows, columns) → (rows × columns, 2) from -1 to 1, x first, row by row."""
    fits = isinstance(counts, Sized) and len(counts) == 2
    if not fits or not all(isinstance(n, Integral) and n >= 2 for n in counts):
        raise ValueError(f"A regular grid of control points is (rows, columns), at least 2 each; got {counts!r}.")
    y, x = (torch.linspace(-1, 1, n, device=real_device()) for n in counts)
    return torch.cartesian_prod(y, x).flip(-1).contiguous()


def _identity_in(basis: Tensor) -> Tensor:
    """Coefficients (d, B) that make the identity of a basis (B, *size)."""
    if basis.is_meta:
        raise ValueError(
            "The basis of LinearBasisMap is on the meta device, without numbers to find the identity in. Give a basis "
            "that is on another device, or the coefficients to start from as identity=."
        )
    size = basis.shape[1:]
    axes = [(torch.arange(n, dtype=torch.float64, device="cpu") * 2 + 1) / n - 1 for n in size]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).flip(0)  # (d, P), x first
    functions = basis.detach().double().cpu().flatten(1)  # (B, P)
    coefficients = torch.linalg.lstsq(functions.T, places.T, driver="gelsd").solution.T
    if (coefficients @ functions - places).abs().max() > 1e-4:  # of an fp32 basis, rounding leaves less than 1e-5
        raise ValueError(
            "The basis does not contain the identity: no combination of its functions gives each pixel's own place. "
            "Add x and y (and 1) to it, or give the coefficients to start from as identity=."
        )
    return coefficients.to(basis.dtype).to(basis.device)


NAMED: dict[str, Callable[[], ParametricMap]] = {
    "affine": AffineMap,
    "attention": AttentionMap,
    "similarity": SimilarityMap,
    "projective": ProjectiveMap,
    "thin_plate_spline": ThinPlateSplineMap,
    "free_form": FreeFormMap,
    "piecewise_affine": PiecewiseAffineMap,
}
"""What `SpatialTransformer` knows by name."""
