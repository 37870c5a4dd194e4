"""Matrices for `Affine`: built from angles, scales and boxes, and converted from other libraries' pixel matrices.

What a builder describes happens to the picture's *content*; what it returns is the inverse of that,
normalised and x first, because a transform sends output points to input points. Everything here is
plain torch on small tensors: differentiable, batched, in the dtype and on the device of the tensors
given (computed in fp32 or wider, rounded once), without waiting for the device. Numbers that are not
tensors give tensors of torch's default dtype, on its default device.

A pixel of an axis of n pixels is at x = 0 … n - 1, and normalised at u = (x - c) / h, where
c = (n - 1) / 2 is the middle for both values of ``align_corners`` and h = n / 2, or (n - 1) / 2 where
it is True. An axis of one pixel then has h = 0, which nothing can be divided by; h = 1 / 2 stands
for it. That is exact for an output, whose only pixel is at u = 0, and without consequence for an
input: `warp` reads its only pixel there, whatever u.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import axis_names, check_floating, check_size

Number = float | Tensor
"""A number for all maps, a 0-d tensor, or one number per map: a tensor (N,) or (N, K)."""
Point = Sequence[Number] | Tensor
"""A sequence of one `Number` per axis, x first, or a tensor (d,), (N, d) or (N, K, d)."""


def rotation(
    angle: Number,
    *,
    degrees: bool = False,
    axis: Point | None = None,
    center: Point | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Turn the content by ``angle``: counter-clockwise as seen in 2-D, right-handed about ``axis`` in 3-D.

    Normalised coordinates stretch an image to a square, in which a turn of one that is not square is
    no longer rigid: give its ``size``. The sign in 2-D is that of `cv2.getRotationMatrix2D`, PIL, kornia and
    skimage. In 3-D it is that of a rotation vector in (x, y, z), as in
    `scipy.spatial.transform.Rotation.from_rotvec`; y points down, so the axis (0, 0, -1) turns every slice as
    the rotation in 2-D does.

    Args:
        angle: a number, or a tensor (), (N,) or (N, K); in radians.
        degrees: angle is in degrees.
        axis: the direction (x, y, z) that a volume turns about, of any length but 0; None in 2-D.
        center: the point (x, y) or (x, y, z) that stays: normalised, or in pixels if there is a size, where
            pixel centres are integers. By default the middle of the image.
        size: ([D,] H, W) of the image, in pixels, which are as wide as high; of the output, if it has another
            aspect, as the content is first stretched to that. None takes the image for a square.
        align_corners: as in `warp`; matters only together with size.

    Returns:
        theta for `Affine`, (N, d, d+1) or (N, K, d, d+1); N = 1 where only numbers were given.

    Raises:
        TypeError: an argument is of another type, or a tensor is not floating-point.
        ValueError: shapes or devices do not fit together.
    """
    if axis is None and size is not None and _length("size", size) == 3:
        raise ValueError(f"A rotation of a volume needs its axis, (x, y, z); got size {tuple(size)} and no axis.")
    dims = 2 if axis is None else 3
    (angles, direction, middle), dtype = _batched(
        _number("angle", angle), _point("axis", axis, dims), _point("center", center, dims)
    )
    radians = angles[0] * (math.pi / 180) if degrees else angles[0]
    cos, sin = radians.cos(), radians.sin()
    if axis is None:
        linear = [[cos, -sin], [sin, cos]]
    else:
        length = (direction[0] ** 2 + direction[1] ** 2 + direction[2] ** 2).sqrt()
        x, y, z = (component / length for component in direction)
        rest = 1 - cos
        # Rodrigues' formula with the other sign of the angle, as theta is the inverse.
        linear = [
            [cos + rest * x * x, rest * x * y + sin * z, rest * x * z - sin * y],
            [rest * y * x - sin * z, cos + rest * y * y, rest * y * z + sin * x],
            [rest * z * x + sin * y, rest * z * y - sin * x, cos + rest * z * z],
        ]
    return _about(linear, middle, size, align_corners, dtype)


def scaling(
    scale: Number | Sequence[Number],
    *,
    center: Point | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Make the content ``scale`` times as large: 2 zooms in, 0.5 shrinks, -1 mirrors.

    Args:
        scale: a number, or a tensor () or (N,), for all axes alike; or one per axis, x first: a sequence of
            d of these, or a tensor (N, d) or (N, K, d). Where it is 0, theta is infinite or NaN.
        center, size, align_corners: as in `rotation`. A scaling in 3-D shows that by either of them, or
            by a scale per axis; else it is in 2-D.

    Returns:
        theta for `Affine`, (N, d, d+1) or (N, K, d, d+1).

    Raises:
        TypeError, ValueError: as `rotation`.
    """
    if isinstance(scale, Sequence) or (isinstance(scale, Tensor) and scale.dim() > 1):
        dims = _length("scale", scale)
        numbers = _point("scale", scale, dims)
    else:
        shape = size if size is not None else center
        dims = 2 if shape is None else _length("center" if size is None else "size", shape)
        numbers = _number("scale", scale) * dims
    (scales, middle), dtype = _batched(numbers, _point("center", center, dims))
    linear = [[1 / scales[i] if i == j else 0.0 for j in range(dims)] for i in range(dims)]
    return _about(linear, middle, size, align_corners, dtype)


def translation(shift: Point, *, size: Sequence[int] | None = None, align_corners: bool = False) -> Tensor:
    """Move the content by ``shift``, to the right and downwards: in pixels if there is a size, else normalised.

    Args:
        shift: (x, y), or in 1-D (x,), in 3-D (x, y, z): a sequence of numbers and tensors (), (N,) or (N, K), or
            a tensor (d,), (N, d) or (N, K, d). The width of an image is 2 in normalised units.
        size, align_corners: as in `rotation`.

    Returns:
        theta for `Affine`, (N, d, d+1) or (N, K, d, d+1).

    Raises:
        TypeError, ValueError: as `rotation`.
    """
    dims = _length("shift", shift)
    (shifts,), dtype = _batched(_point("shift", shift, dims))
    half = _units("size", size, dims, align_corners).half
    return _diagonal([1.0] * dims, [-s / h for s, h in zip(shifts, half, strict=True)], dtype)


def shear(
    shear: Point,
    *,
    center: Point | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Slide the content's rows to the right by ``x`` for each unit further down, its columns down by ``y``.

    In pixels, the content moves by the forward matrix [[1, x], [y, 1]], kornia's; in 2-D only. For
    an angle give its tangent: the top of the picture leans to the right by a for x = -tan(a).

    Args:
        shear: (x, y), factors, as in `translation`. Where x · y is 1, theta is infinite or NaN.
        center, size, align_corners: as in `rotation`.

    Returns:
        theta for `Affine`, (N, 2, 3) or (N, K, 2, 3).

    Raises:
        TypeError, ValueError: as `rotation`.
    """
    ((x, y), middle), dtype = _batched(_point("shear", shear, 2), _point("center", center, 2))
    determinant = 1 - x * y
    linear = [[1 / determinant, -x / determinant], [-y / determinant, 1 / determinant]]
    return _about(linear, middle, size, align_corners, dtype)


def crop_box(box: Point) -> Tensor:
    """Show one box of the input, and only that: the output's corners look at the corners of the box.

    The box is normalised, and means for the input what ``align_corners`` says: its corners are edges of
    pixels (False) or centres of pixels (True). For boxes in pixels see `boxes`.

    Args:
        box: (x1, y1, x2, y2), in 1-D (x1, x2), in 3-D (x1, y1, z1, x2, y2, z2): a sequence of numbers and tensors
            (), (N,) or (N, K), or a tensor (2d,), (N, 2d) or (N, K, 2d). (-1, -1, 1, 1) is the whole image;
            with x2 < x1 it is shown mirrored.

    Returns:
        theta for `Affine`, (N, d, d+1) or (N, K, d, d+1).

    Raises:
        TypeError, ValueError: as `rotation`.
    """
    length = _length("box", box, (2, 4, 6))
    dims = length // 2
    (corners,), dtype = _batched(_point("box", box, length))
    lows, highs = corners[:dims], corners[dims:]
    scales = [(high - low) / 2 for low, high in zip(lows, highs, strict=True)]
    return _diagonal(scales, [(low + high) / 2 for low, high in zip(lows, highs, strict=True)], dtype)


def boxes(
    boxes: Tensor,
    input_size: Sequence[int],
    output_size: Sequence[int],
    *,
    aligned: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """Crop boxes given in pixels and resize each to ``output_size``, as RoIAlign does (He et al. 2017).

    A box's corners are edges of pixels, as in `image[y1:y2, x1:x2]`: the whole image is (0, 0, W, H). For
    boxes inside the image, with K boxes for each of N images::

        theta = tri_stn.boxes(boxes, (H, W), (h, w))
        tri_stn.warp(image, tri_stn.Affine(theta), (h, w), padding_mode="border")  # (N, K, C, h, w)

    is `torchvision.ops.roi_align` with ``aligned=True, sampling_ratio=1``. ``sampling_ratio=s`` averages
    s × s points for each pixel: warp to (h·s, w·s), with that as the output_size, and then
    `F.avg_pool2d(output.flatten(0, 1), s)`. Boxes of a picture are boxes of its feature map after
    multiplication by the ratio of their sizes, torchvision's ``spatial_scale``.

    Args:
        boxes: (N, K, 4) or (N, 4), each x1, y1, x2, y2 in pixels of the input; in 1-D and 3-D as in
            `crop_box`. Any float dtype; may require grad.
        input_size: ([D,] H, W) of the image that is read, in pixels.
        output_size: ([D,] h, w) of each crop.
        aligned: False is torchvision's older convention, which is its default: everything is read half a pixel
            further right and down, and a box is at least one pixel wide and high.
        align_corners: as it will be given to `warp`; the crop is the same for both values.

    Returns:
        theta for `Affine`, (N, K, d, d+1) or (N, d, d+1).

    Raises:
        TypeError: boxes is not a floating-point tensor.
        ValueError: a shape or size is not one of these.
    """
    check_floating(boxes, "boxes", "boxes")
    dims = _length("input_size", input_size)
    if boxes.dim() not in (2, 3) or boxes.shape[-1] != 2 * dims:
        raise ValueError(
            f"boxes takes boxes of shape (N, {2 * dims}) or (N, K, {2 * dims}) for input_size {tuple(input_size)}; got "
            f"{tuple(boxes.shape)}."
        )
    (corners,), dtype = _batched(_point("boxes", boxes, 2 * dims))
    half_in, middle_in = _units("input_size", input_size, dims, align_corners)
    half_out, _ = _units("output_size", output_size, dims, align_corners)
    scales, offsets = [], []
    for i, (low, high, pixels) in enumerate(zip(corners[:dims], corners[dims:], reversed(output_size), strict=True)):
        width = high - low if aligned else (high - low).clamp(min=1)
        middle = low + width / 2 - 0.5 * aligned  # as a pixel index: the left edge of pixel 0 is at -0.5
        scales.append(width * (half_out[i] / (pixels * half_in[i])))
        offsets.append((middle - middle_in[i]) / half_in[i])
    return _diagonal(scales, offsets, dtype)


def compose(*matrices: Tensor) -> Tensor:
    """One map for several: with ``compose(a, b)`` the input is read at b(a(p)) for the output point p.

    So ``compose(a, b)`` shows what ``warp(warp(image, b), a)`` does, with one reading: what happens to
    the content first stands last. As matrices it is b @ a.

    Args:
        matrices: one or more, each (…, d, d+1), affine, or (…, d+1, d+1), projective. Leading axes broadcast from
            the left: N maps (N, 2, 3) go with K maps per image (N, K, 2, 3).

    Returns:
        (…, d, d+1) where all are affine, else (…, d+1, d+1), in the widest of the dtypes.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: there is none, or shapes or devices do not fit together.
    """
    if not matrices:
        raise ValueError("compose takes one matrix or more; got none.")
    dims = _check_matrix("compose", matrices[0])
    if any(_check_matrix("compose", matrix) != dims for matrix in matrices):
        shapes = " and ".join(str(tuple(matrix.shape)) for matrix in matrices)
        raise ValueError(f"compose takes matrices of one dimension, all of d + 1 columns; got shapes {shapes}.")
    dtype = _common_dtype(matrices)
    wide = torch.promote_types(dtype, torch.float32)
    affine = all(matrix.shape[-2] == dims for matrix in matrices)
    axes = max(matrix.dim() for matrix in matrices)
    squares = [
        _square(matrix.to(wide)).reshape(*matrix.shape[:-2], *(1,) * (axes - matrix.dim()), dims + 1, dims + 1)
        for matrix in matrices
    ]
    _common_shape([square.shape[:-2] for square in squares])
    product = squares[0]
    for square in squares[1:]:
        product = _times(square, product)
    return (product[..., :dims, :] if affine else product).to(dtype)


def invert(matrix: Tensor) -> Tensor:
    """The inverse map, of affine or projective matrices.

    What is singular has no inverse and gives infinities and NaN, or numbers that are huge where rounding hid it:
    there is no error, as to raise one would mean to wait for the device.

    Args:
        matrix: (…, d, d+1), affine, or (…, d+1, d+1), projective, with d = 1, 2 or 3; any float dtype.

    Returns:
        The same shape and dtype.

    Raises:
        TypeError: matrix is not a floating-point tensor.
        ValueError: matrix has another shape.
    """
    dims = _check_matrix("invert", matrix)
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if matrix.shape[-2] == dims + 1:
        return _inverse(wide).to(matrix.dtype)
    linear = _inverse(wide[..., :dims])
    return torch.cat([linear, -_times(linear, wide[..., dims:])], -1).to(matrix.dtype)


def from_pixel_matrix(
    matrix: Tensor,
    input_size: Sequence[int],
    output_size: Sequence[int],
    *,
    inverse: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """OpenCV's, kornia's or skimage's matrix in pixels, as the normalised map that a transform takes.

    By default the matrix sends pixels of the input to pixels of the output, as `cv2.warpAffine`,
    `cv2.warpPerspective` and their namesakes in kornia take it. ``inverse=True`` is for the other way: a matrix
    used with `cv2.WARP_INVERSE_MAP`, for `skimage.transform.warp(image, inverse_map)`, or
    for scipy's `affine_transform`, with rows and columns brought from (y, x) into (x, y).

    Args:
        matrix: (…, d, d+1), affine, or (…, d+1, d+1), projective; x first, the centres of pixels at
            integers. May require grad. From numpy by `torch.from_numpy`.
        input_size: ([D,] H, W) of the image that is read, in pixels.
        output_size: ([D,] H, W) of the output; in OpenCV ``dsize``, but that is (W, H).
        inverse: the matrix sends the output's pixels to the input's.
        align_corners: as it will be given to `warp`; the result is the same picture for both values.

    Returns:
        theta for `Affine`, (…, d, d+1), or from a square matrix one, (…, d+1, d+1), from the output's
        homogeneous normalised points to the input's. One matrix without a batch becomes a batch of one.
        A forward matrix that is singular gives infinities and NaN, as in `invert`.

    Raises:
        TypeError: matrix is not a floating-point tensor.
        ValueError: a shape or size is not one of these.
    """
    dims = _check_matrix("from_pixel_matrix", matrix)
    matrix = matrix if matrix.dim() > 2 else matrix.unsqueeze(0)
    output_units = _units("output_size", output_size, dims, align_corners)
    input_units = _units("input_size", input_size, dims, align_corners)
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # A forward matrix is inverted in normalised coordinates, where it is well conditioned.
    if inverse:
        return _change_units(wide, output_units, input_units).to(matrix.dtype)
    return invert(_change_units(wide, input_units, output_units)).to(matrix.dtype)


def to_pixel_matrix(
    matrix: Tensor,
    input_size: Sequence[int],
    output_size: Sequence[int],
    *,
    inverse: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """The inverse of `from_pixel_matrix`: what OpenCV, kornia or skimage would take for the same map.

    Args:
        matrix: theta, (…, d, d+1), or projective, (…, d+1, d+1).
        input_size, output_size, inverse, align_corners: as in `from_pixel_matrix`.

    Returns:
        The same shape and dtype: input's pixels to output's pixels, or with inverse output's to input's.

    Raises:
        TypeError, ValueError: as `from_pixel_matrix`.
    """
    dims = _check_matrix("to_pixel_matrix", matrix)
    output_units = _units("output_size", output_size, dims, align_corners).inverse()
    input_units = _units("input_size", input_size, dims, align_corners).inverse()
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if inverse:
        return _change_units(wide, output_units, input_units).to(matrix.dtype)
    return _change_units(invert(wide), input_units, output_units).to(matrix.dtype)


# --- from arguments to tensors ---------------------------------------------------------------------


def _number(name: str, value: object) -> list[Number]:
    """A list of one, checked."""
    if isinstance(value, Real):
        return [float(value)]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a tensor (), (N,) or (N, K); got {type(value).__name__}.")
    if check_floating(value, "This builder", name).dim() > 2:
        raise ValueError(f"{name} must be a number or a tensor (), (N,) or (N, K); got shape {tuple(value.shape)}.")
    return [value]


def _length(name: str, value: object, allowed: Sequence[int] = (1, 2, 3)) -> int:
    """How many numbers a point has."""
    if isinstance(value, Tensor):
        length = value.shape[-1] if value.dim() else 0
    elif isinstance(value, Sequence) and not isinstance(value, str):
        length = len(value)
    else:
        raise TypeError(
            f"{name} must be a sequence of numbers, or a tensor where it may be one; got {type(value).__name__}."
        )
    if all(length != n for n in allowed):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{length} numbers"
        raise ValueError(f"{name} must have {' or '.join(map(str, allowed))} numbers; got {got}.")
    return length


def _point(name: str, value: Point | None, length: int) -> list[Number]:
    """The numbers of a point, checked; none for None."""
    if value is None:
        return []
    _length(name, value, (length,))
    if not isinstance(value, Tensor):
        return [number for i, component in enumerate(value) for number in _number(f"{name}[{i}]", component)]
    if check_floating(value, "This builder", name).dim() > 3:
        raise ValueError(
            f"{name} must be a tensor ({length},), (N, {length}) or (N, K, {length}); got shape {tuple(value.shape)}."
        )
    return list(value.unbind(-1))


def _batched(*groups: list[Number]) -> tuple[list[list[Tensor]], torch.dtype]:
    """The same groups as tensors of one shape, (N,) or (N, K), wide enough to compute in; the result's dtype."""
    numbers = [number for group in groups for number in group]
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    if tensors:
        dtype = _common_dtype(tensors)
        wide, device = torch.promote_types(dtype, torch.float32), tensors[0].device
    else:
        dtype, wide, device = torch.get_default_dtype(), torch.float64, None
    axes = max([1, *(tensor.dim() for tensor in tensors)])
    # From the left, as everywhere: (N,) goes with the N of (N, K).
    shapes = [(*tensor.shape, *(1,) * (axes - tensor.dim())) for tensor in tensors]
    shape = _common_shape(shapes or [(1,)])

    def batch(number: Number) -> Tensor:
        if not isinstance(number, Tensor):
            return torch.full(shape, number, dtype=wide, device=device)
        return number.to(wide).reshape(*number.shape, *(1,) * (axes - number.dim())).expand(shape)

    return [[batch(number) for number in group] for group in groups], dtype


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"All tensors must be on one device; got {tensors[0].device} and {tensor.device}. Move one with .to()."
            )
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _common_shape(shapes: Sequence[Sequence[int]]) -> torch.Size:
    try:
        return torch.broadcast_shapes(*map(tuple, shapes))
    except RuntimeError as error:
        got = " and ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"All arguments must have the same batch size, or 1; got batches of {got}.") from error


class _Units(NamedTuple):
    """Of each axis, x first: a place x is at u in normalised units, x = half · u + middle."""

    half: list[float]
    middle: list[float]

    def inverse(self) -> _Units:
        """From normalised units to pixels: u = x / half - middle / half."""
        return _Units([1 / h for h in self.half], [-m / h for h, m in zip(self.half, self.middle, strict=True)])


def _units(name: str, size: Sequence[int] | None, dims: int, align_corners: bool) -> _Units:
    """Those of an image of a size, in pixels; without a size, lengths are normalised already."""
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners must be True or False; got {align_corners!r}.")
    if size is None:
        return _Units([1.0] * dims, [0.0] * dims)
    size = check_size(name, size, dims)
    if len(size) != dims or any(n < 1 for n in size):
        raise ValueError(
            f"{name} must be ({axis_names(dims)}), at least one pixel each, for {dims}-D maps; got {size}."
        )
    pixels = list(reversed(size))
    return _Units([(n - align_corners) / 2 or 0.5 for n in pixels], [(n - 1) / 2 for n in pixels])


def _check_matrix(name: str, matrix: object) -> int:
    """The dimension d of a matrix (…, d, d+1) or (…, d+1, d+1)."""
    matrix = check_floating(matrix, name, "matrices")
    rows, columns = matrix.shape[-2:] if matrix.dim() >= 2 else (0, 0)
    # Not with `in`, which is false under torch.compile where a size is a symbol.
    if not 2 <= columns <= 4 or not columns - 1 <= rows <= columns:
        raise ValueError(
            f"{name} takes matrices (…, 2, 3), affine, or (…, 3, 3), projective, with 2 or 4 columns for 1-D or 3-D; "
            f"got shape {tuple(matrix.shape)}."
        )
    return columns - 1


# --- small matrices, as tensors (…, rows, columns) -------------------------------------------------


def _about(
    linear: Sequence[Sequence[Tensor | float]],
    center: list[Tensor],
    size: Sequence[int] | None,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Theta of a linear map, of pixels if there is a size, that keeps the center; by default the middle."""
    dims = len(linear)
    half, middle = _units("size", size, dims, align_corners)
    rows = [[entry * (half[j] / half[i]) for j, entry in enumerate(row)] for i, row in enumerate(linear)]
    if not center:
        return _stack([[*row, 0.0] for row in rows], dtype)
    fixed = [(c - m) / h for c, m, h in zip(center, middle, half, strict=True)]
    moved = [sum((entry * f for entry, f in zip(row, fixed, strict=True)), start=0.0) for row in rows]
    return _stack([[*row, f - m] for row, f, m in zip(rows, fixed, moved, strict=True)], dtype)


def _diagonal(scales: Sequence[Tensor | float], offsets: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Theta of a map that takes each axis by itself: scale · u + offset."""
    dims = len(offsets)
    return _stack([[scales[i] if i == j else 0.0 for j in range(dims)] + [offsets[i]] for i in range(dims)], dtype)


def _stack(rows: list[list[Tensor | float]], dtype: torch.dtype) -> Tensor:
    """Rows of numbers, (N,) or (N, K) each, as matrices (N, [K,] rows, columns)."""
    like = next(entry for row in rows for entry in row if isinstance(entry, Tensor))
    tensors = [[e if isinstance(e, Tensor) else torch.full_like(like, e) for e in row] for row in rows]
    return torch.stack([torch.stack(row, -1) for row in tensors], -2).to(dtype)


def _change_units(matrix: Tensor, source: _Units, target: _Units) -> Tensor:
    """A map in units of pixels as one in normalised units, from those of the source to those of the target."""
    dims = len(source.half)
    *columns, offset = _square(matrix).unbind(-1)
    for i in range(dims):
        offset = offset + columns[i] * source.middle[i]
        columns[i] = columns[i] * source.half[i]
    *rows, last = torch.stack([*columns, offset], -1).unbind(-2)
    for i in range(dims):
        rows[i] = (rows[i] - last * target.middle[i]) / target.half[i]
    return torch.stack([*rows, last][: matrix.shape[-2]], -2)


def _square(matrix: Tensor) -> Tensor:
    """With the row (0, …, 0, 1) that an affine matrix leaves out."""
    if matrix.shape[-2] == matrix.shape[-1]:
        return matrix
    first = matrix[..., :1, :]
    last = torch.cat([torch.zeros_like(first[..., 1:]), torch.ones_like(first[..., :1])], -1)
    return torch.cat([matrix, last], -2)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, but never in TF32 or, under autocast, in 16 bits."""
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def _inverse(matrix: Tensor) -> Tensor:
    """By cofactors: for matrices this small exact enough, and `torch.linalg.inv` waits for the device to raise."""
    rows = [list(row.unbind(-1)) for row in matrix.unbind(-2)]
    n = len(rows)
    if n == 1:
        return 1 / matrix
    cofactors = [[(-1) ** (i + j) * _determinant(_minor(rows, i, j)) for j in range(n)] for i in range(n)]
    terms = [entry * cofactor for entry, cofactor in zip(rows[0], cofactors[0], strict=True)]
    adjugate = torch.stack([torch.stack(row, -1) for row in cofactors], -1)  # transposed
    return adjugate / sum(terms[1:], start=terms[0])[..., None, None]


def _determinant(rows: list[list[Tensor]]) -> Tensor:
    if len(rows) == 1:
        return rows[0][0]
    terms = [(-1) ** j * entry * _determinant(_minor(rows, 0, j)) for j, entry in enumerate(rows[0])]
    return sum(terms[1:], start=terms[0])


def _minor(rows: list[list[Tensor]], i: int, j: int) -> list[list[Tensor]]:
    """Without row i and column j."""
    return [row[:j] + row[j + 1 :] for k, row in enumerate(rows) if k != i]
