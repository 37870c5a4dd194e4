"""Displacement fields that are made of others: inverses, and the flows of velocity fields.

A field is read at displaced places by `warp`, as an image whose channels are its components. So no
grid is made here either, and autograd keeps the fields alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .functional import warp
from .transforms import Displacement, _check_unit, _Dense, _displacement_kind, _wide

_MOST_STEPS = 100
"""fp32 has smaller numbers still."""


@dataclass(frozen=True, eq=False, repr=False)
class Velocity(_Dense):
    """The flow of a velocity field after one unit of time: a smooth map with a smooth inverse, exp(field).

    By scaling and squaring: the field over 2 ** steps is a first displacement u, and u(p) + u(p + u(p)) the one of
    twice the time, ``steps`` times over. Between pixels, fields are read bilinearly; beyond the outermost, as they
    are. Forward and backward pass make no grid, and autograd keeps ``steps`` fields. All this at each use: for
    several images, make a displacement of it once, ``Displacement(flow.parameters, flow.unit)``.

    Args:
        field: (N, *size, d) for d-dimensional images, d = 1, 2 or 3, or (N, K, *size, d) for K maps
            per image; any float dtype and strides. x first. May require grad.
        steps: how often the time is doubled, 0 to 100. The error of the first displacement falls by half with
            each.
        unit: "normalized", where the image spans two units, or "pixel": of the field, for images of
            its size.
        align_corners: as it will be given to `warp`, which refuses the other.

    Raises:
        TypeError: field is not a floating-point tensor, steps not an integer, or align_corners not a bool.
        ValueError: field has another shape, steps is none of these, or unit is neither.

    Source: Arsigny et al. 2006, "A log-Euclidean framework for statistics on diffeomorphisms"; as in VoxelMorph.
    """

    field: Tensor
    steps: int = 7
    unit: str = "normalized"
    align_corners: bool = False  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_unit("Velocity", self.unit)
        _check_count("steps", self.steps)
        if self.steps > _MOST_STEPS:
            raise ValueError(
                f"steps must be at most {_MOST_STEPS}, as they halve the field so often before doubling it; got "
                f"{self.steps}. 7 are usual."
            )
        _check_align_corners(self.align_corners)

    @property
    def kind(self) -> str:
        return _displacement_kind(self.unit)

    @property
    def parameters(self) -> Tensor:
        """The displacement that the flow amounts to, in the field's unit; fp32 for a 16-bit field."""
        moved = _wide(self.field) / 2**self.steps
        for _ in range(self.steps):
            moved = moved + _read_at(moved, moved, self.unit, self.align_corners)
        return moved

    def inverse(self) -> Velocity:
        """The flow backwards in time: of the negative field."""
        return Velocity(-self.field, self.steps, self.unit, self.align_corners)


def invert_displacement(transform: Displacement, iterations: int, align_corners: bool) -> Tensor:
    """The field of `Displacement.inverse`."""
    _check_count("iterations", iterations)
    _check_align_corners(align_corners)
    field = _wide(transform.field)
    moved = -field
    for _ in range(iterations):
        moved = -_read_at(field, moved, transform.unit, align_corners)
    return moved.to(transform.field.dtype)


def _read_at(field: Tensor, displacement: Tensor, unit: str, align_corners: bool) -> Tensor:
    """The field, (N, *size, d) or (N, K, *size, d), read where the displacement of the same shape leads."""
    dims = field.shape[-1]
    if 0 in field.shape[-dims - 1 : -1]:  # no pixels, which `warp` refuses to read
        return field
    image, moved = (t.flatten(0, -dims - 2) for t in (field, displacement))
    output = warp(image.movedim(-1, 1), Displacement(moved, unit), padding_mode="border", align_corners=align_corners)
    return output.movedim(1, -1).view(field.shape)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}.")
    if value < 0:
        raise ValueError(f"{name} must not be negative; got {value}.")


def _check_align_corners(value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"align_corners must be True or False; got {value!r}.")
