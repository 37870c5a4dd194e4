"""Where an output pixel looks: the inverse maps, each with its derivative below it.

A transform is these device functions:

    load(parameters_ptr, …)     parameters → coefficients, with the change from normalised units to
                                pixels folded in: once per program, or for each pixel of a dense map;
                                with TANGENT, a change of the parameters → that of the coefficients
    load_vjp(gradients_ptr, …)  gradients of the coefficients → gradients of the parameters, stored
    map(coefficients, u, …)     centred output index u → source pixel coordinate
    map_jvp(coefficients, t, u) tangents t of the coefficients → tangent of that coordinate
    map_vjp(coefficients, u, g) gradient g of that coordinate → gradients of the coefficients
    map_vjp_jvp(coefficients, t, u, g)  what map_vjp changes by, with g held, where the coefficients move by
                                t; none for a map that is linear in them
    bounds(coefficients, …)     what these two take, once per map:
    box / columns(…)            the output pixels that can touch a given input pixel
    meets(coefficients, …)      whether the output can touch any pixel of a box of the input
    shrink(coefficients)        samples along each axis that leave no source pixel out, where it is the same
                                everywhere; elsewhere differences of the map tell
    refine(coefficients, n)     the coefficients for an output of n pixels, along each axis, for one

Axes are x first. ``box`` bounds the preimage along every axis by itself; ``columns`` bounds it along x
for a given row. The bounds may be too wide, never too narrow: each candidate is then tested by the
forward's own expression. A dense map has no such bounds: its adjoint scatters.
"""

import triton
import triton.language as tl

from . import tuples
from .coordinates import centred, middle, offset, pixels_per_unit
from .matrix import divide, divide_vjp, rows, rows_vjp


@triton.jit
def affine_load(
    parameters_ptr, strides, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """theta, (d, d+1) → the same matrix from centred output indices to centred source pixels."""
    return _load_matrix(parameters_ptr, len(input_size), input_size, output_size, units, ALIGN_CORNERS, COMPUTE)


@triton.jit
def affine_load_vjp(
    gradients_ptr, gradients, strides, parameters_ptr, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """One program's share: the sum over its lanes."""
    _store_matrix_vjp(
        gradients_ptr, gradients, len(input_size), input_size, output_size, units, ALIGN_CORNERS, COMPUTE
    )  # fmt: skip


@triton.jit
def affine(coefficients, u, input_size):
    x = ()
    s = rows(coefficients, u)
    for a in tl.static_range(len(u)):
        # The middle comes last: what is added before rounds at its own, smaller magnitude.
        x = x + (s[a] + middle(input_size[a], s[a].dtype),)
    return x


@triton.jit
def affine_jvp(coefficients, t, u):
    return rows(t, u)


@triton.jit
def affine_vjp(coefficients, u, g):
    return rows_vjp(g, u)


@triton.jit
def affine_bounds(coefficients, input_size, output_size, RADIUS: tl.constexpr):
    """Whether a map is finite, so that it lands anywhere; what `box` and `columns` take of it: divisions, once for all
    pixels; how many columns a row's candidates of a pixel span at most, 0 where that must be asked of the
    pixels themselves; and whether its box has no more, so that rows need not be asked.

    A box is conditioned by the determinant; where it vanishes, its bounds become infinite or NaN, and clamping makes
    them the whole axis.
    """
    dims: tl.constexpr = len(input_size)
    nothing = coefficients[0] * 0
    places = ()
    margins = ()
    for a in tl.static_range(dims):
        translation = coefficients[a * (dims + 1) + dims]
        places = places + (translation + middle(input_size[a], translation.dtype),)
        margins = margins + (RADIUS + _affine_margin(coefficients, a, input_size, output_size),)
        for b in tl.static_range(dims + 1):
            nothing += coefficients[a * (dims + 1) + b] * 0
    rows_of_inverse = ()
    reaches = ()
    for b in tl.static_range(dims):
        # Solve A u = q - t for u_b by Cramer's rule.
        determinant, determinant_size, reach = 0.0, 0.0, 0.0
        cofactors = ()
        for a in tl.static_range(dims):
            cofactor, cofactor_size = _cofactor(coefficients, a, b, dims)
            entry = coefficients[a * (dims + 1) + b]
            determinant += entry * cofactor
            determinant_size += tl.abs(entry) * cofactor_size
            reach += tl.abs(cofactor) * margins[a]
            # Rounding of the cofactor, of the product and of the sum, amplified by the division.
            reach += cofactor_size * (tl.abs(coefficients[a * (dims + 1) + dims]) + input_size[a]) * _EPSILON
            cofactors = cofactors + (cofactor,)
        reach += determinant_size * output_size[b] * _EPSILON
        inverse = 1.0 / determinant
        reach *= tl.abs(inverse)
        rows_of_inverse = rows_of_inverse + (tuples.scale(cofactors, inverse),)
        reaches = reaches + (reach,)
    steps = ()
    halves = ()
    width = tl.cast(output_size[0], coefficients[0].dtype)
    half = width
    for a in tl.static_range(dims):
        slope = coefficients[a * (dims + 1)]
        # Where x does not matter, the row is in reach as a whole or not at all, which a tiny slope says as well.
        step = 1.0 / tl.where(tl.abs(slope) < 1e-25, 1e-25, slope)
        steps = steps + (step,)
        halves = halves + (margins[a] * tl.abs(step),)
        half = tl.minimum(half, halves[a])
    # An interval of 2.0001 holds three columns at most, and two nearly everywhere.
    most = tl.minimum(width, tl.floor(2 * half) + 1)
    certain = (most == tl.minimum(width, tl.floor(2 * half - 0.02) + 1)) & (most <= _FEW)
    upright = (reaches[0] - half < 0.01) | (certain & (tl.floor(2 * reaches[0]) + 1 == most))
    return (
        nothing == 0,
        (places, rows_of_inverse, reaches, steps, halves),
        tl.where(certain, most, 0.0).to(tl.int32),
        upright,
    )


@triton.jit
def affine_box(bounds, q, output_size):
    """First and last index along each axis of the pixels that can touch source pixel q."""
    places, rows_of_inverse, reaches, _steps, _halves = bounds
    firsts = ()
    lasts = ()
    for b in tl.static_range(len(q)):
        centre = middle(output_size[b], q[0].dtype)
        for a in tl.static_range(len(q)):
            centre += rows_of_inverse[b][a] * (q[a] - places[a])
        first, last = _clamp_interval(centre - reaches[b], centre + reaches[b], output_size[b])
        firsts = firsts + (first,)
        lasts = lasts + (last,)
    return firsts, lasts


@triton.jit
def affine_columns(bounds, coefficients, row, q, output_size):
    """First and last column of a row (centred indices along y and on) that can touch pixel q."""
    dims: tl.constexpr = len(q)
    places, _rows_of_inverse, _reaches, steps, halves = bounds
    first = tl.zeros_like(q[0])
    last = first + (output_size[0] - 1)
    for a in tl.static_range(dims):
        s = places[a] - q[a]
        for b in tl.static_range(1, dims):
            s = tl.fma(coefficients[a * (dims + 1) + b], row[b - 1], s)
        centre = middle(output_size[0], s.dtype) - s * steps[a]
        first = tl.maximum(first, centre - halves[a])  # a number wins over NaN
        last = tl.minimum(last, centre + halves[a])
    return _clamp_interval(first, last, output_size[0])


@triton.jit
def affine_meets(coefficients, first, last, input_size, output_size, RADIUS: tl.constexpr):
    """Whether the whole output's bounding box in the input reaches the pixels from first to last; false for NaN."""
    dims: tl.constexpr = len(input_size)
    meets = True
    for a in tl.static_range(dims):
        translation = coefficients[a * (dims + 1) + dims]
        centre = translation + middle(input_size[a], translation.dtype)
        reach = RADIUS + _affine_margin(coefficients, a, input_size, output_size)
        for b in tl.static_range(dims):
            reach += tl.abs(coefficients[a * (dims + 1) + b]) * (output_size[b] * 0.5)
        meets &= (centre - reach <= last[a]) & (centre + reach >= first[a])
    return meets


@triton.jit
def affine_shrink(coefficients):
    dims: tl.constexpr = 1 if len(coefficients) == 2 else (2 if len(coefficients) == 6 else 3)
    longest = coefficients[0] * 0
    for b in tl.static_range(dims):
        column = ()
        for a in tl.static_range(dims):
            column = column + (coefficients[a * (dims + 1) + b],)
        longest = tl.maximum(longest, squared_length(column))
    return samples_for(longest)


@triton.jit
def affine_refine(coefficients, per_axis):
    dims: tl.constexpr = 1 if len(coefficients) == 2 else (2 if len(coefficients) == 6 else 3)
    step = 1.0 / tl.cast(per_axis, coefficients[0].dtype)
    result = ()
    for i in tl.static_range(dims * (dims + 1)):
        result = result + (coefficients[i] if i % (dims + 1) == dims else coefficients[i] * step,)
    return result


@triton.jit
def squared_length(v):
    # Written out with fused products: every kernel rounds alike, and so takes as many samples.
    result = v[0] * v[0]
    for a in tl.static_range(1, len(v)):
        result = tl.fma(v[a], v[a], result)
    return result


@triton.jit
def samples_for(squared_step):
    """How many samples along each axis an output pixel takes whose step spans so many source pixels, squared.

    One per source pixel, where 0.01 is left to rounding: a step of 2 takes 2; never more than 16. One for NaN.
    """
    step = tl.sqrt(tl.where(squared_step > 1.0, tl.where(squared_step < 256.0, squared_step, 256.0), 1.0))
    return tl.maximum(tl.ceil(step - 0.01), 1.0).to(tl.int32)


@triton.jit
def _cofactor(coefficients, a: tl.constexpr, b: tl.constexpr, dims: tl.constexpr):
    """The cofactor of entry (a, b) of the linear part, and the sum of its terms' magnitudes."""
    if dims == 1:
        return tl.cast(1.0, coefficients[0].dtype), tl.cast(1.0, coefficients[0].dtype)
    elif dims == 2:
        opposite = coefficients[(1 - a) * 3 + (1 - b)]
        return (opposite if a == b else -opposite), tl.abs(opposite)
    else:
        # Cyclic neighbours carry the sign along.
        c: tl.constexpr = (a + 1) % 3
        e: tl.constexpr = (a + 2) % 3
        f: tl.constexpr = (b + 1) % 3
        g: tl.constexpr = (b + 2) % 3
        plus = coefficients[c * 4 + f] * coefficients[e * 4 + g]
        minus = coefficients[c * 4 + g] * coefficients[e * 4 + f]
        return plus - minus, tl.abs(plus) + tl.abs(minus)


@triton.jit
def _affine_margin(coefficients, a: tl.constexpr, input_size, output_size):
    """A bound, in source pixels, on the rounding of the coordinate along axis a."""
    dims: tl.constexpr = len(input_size)
    size = tl.abs(coefficients[a * (dims + 1) + dims]) + input_size[a]
    for b in tl.static_range(dims):
        size += tl.abs(coefficients[a * (dims + 1) + b]) * output_size[b]
    return size * _EPSILON


_FEW = tl.constexpr(16)
"""Columns up to which every pixel may take as many as any; with more, most of them would be none of its own."""
# 2 ** -20, eight roundings of fp32; an fp64 walk only gets bounds a little wider than it needs.
_EPSILON = tl.constexpr(2.0**-20)


@triton.jit
def _clamp_interval(first, last, size):
    """The integers of [first, last] within an axis, empty as (size, …) or (…, -1).

    Numbers win over NaN, so that such a bound becomes the end of the axis, and infinities never reach the conversion
    to integers.
    """
    n = tl.cast(size, first.dtype)
    first = tl.minimum(tl.maximum(first, 0.0), n)
    last = tl.maximum(tl.minimum(last, n - 1), -1.0)
    return tl.ceil(first).to(tl.int32), tl.floor(last).to(tl.int32)


@triton.jit
def projective_load(
    parameters_ptr, strides, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """A homogeneous matrix, (d+1, d+1) → the same from centred output indices to centred source pixels."""
    return _load_matrix(parameters_ptr, len(input_size) + 1, input_size, output_size, units, ALIGN_CORNERS, COMPUTE)


@triton.jit
def projective_load_vjp(
    gradients_ptr, gradients, strides, parameters_ptr, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """One program's share: the sum over its lanes."""
    _store_matrix_vjp(
        gradients_ptr, gradients, len(input_size) + 1, input_size, output_size, units, ALIGN_CORNERS, COMPUTE
    )  # fmt: skip


@triton.jit
def projective(coefficients, u, input_size):
    _, offset_from_middle, ahead = divide(coefficients, u)
    x = ()
    for a in tl.static_range(len(u)):
        # At or behind infinity: out of bounds, wherever that is.
        x = x + (tl.where(ahead, offset_from_middle[a] + middle(input_size[a], u[a].dtype), -(2.0**30)),)
    return x


@triton.jit
def projective_jvp(coefficients, t, u):
    dims: tl.constexpr = len(u)
    inverse, y, ahead = divide(coefficients, u)
    changes = rows(t, u)
    x = ()
    for a in tl.static_range(dims):
        x = x + (tl.where(ahead, (changes[a] - y[a] * changes[dims]) * inverse, 0.0),)
    return x


@triton.jit
def projective_vjp(coefficients, u, g):
    inverse, y, ahead = divide(coefficients, u)
    return rows_vjp(divide_vjp(inverse, y, ahead, g), u)


@triton.jit
def projective_vjp_jvp(coefficients, t, u, g):
    dims: tl.constexpr = len(u)
    inverse, y, ahead = divide(coefficients, u)
    changes = rows(t, u)
    inverse_change = -inverse * inverse * changes[dims]
    scaled = ()
    last = tl.zeros_like(inverse)
    for a in tl.static_range(dims):
        y_change = (changes[a] - y[a] * changes[dims]) * inverse
        row = tl.where(ahead, g[a] * inverse_change, 0.0)
        scaled = scaled + (row,)
        last -= row * y[a] + tl.where(ahead, g[a] * inverse * y_change, 0.0)
    return rows_vjp(scaled + (last,), u)


@triton.jit
def _load_matrix(
    ptr, ROWS: tl.constexpr, input_size, output_size, units, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr
):
    """A matrix (ROWS, d+1) that acts on normalised coordinates → one that acts on pixels."""
    columns: tl.constexpr = len(input_size) + 1
    matrix = ()
    for a in tl.static_range(ROWS):
        for b in tl.static_range(columns):
            entry = tl.load(ptr + a * columns + b).to(COMPUTE)
            matrix = matrix + (entry * _unit(units, input_size, output_size, a, b, ALIGN_CORNERS, COMPUTE),)
    return matrix


@triton.jit
def _store_matrix_vjp(
    ptr, gradients, ROWS: tl.constexpr, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = len(input_size) + 1
    for a in tl.static_range(ROWS):
        for b in tl.static_range(columns):
            scale = _unit(units, input_size, output_size, a, b, ALIGN_CORNERS, COMPUTE)
            tl.store(ptr + (a * columns + b), tl.sum(gradients[a * columns + b]) * scale)


@triton.jit
def _unit(
    units, input_size, output_size, a: tl.constexpr, b: tl.constexpr, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr
):
    """What entry (a, b) of a homogeneous matrix is multiplied by to act on pixels; a last row makes a divisor, which
    has no unit. The host has worked that out, but for fp64, as Triton passes no float of 64 bits.
    """
    dims: tl.constexpr = len(input_size)
    if units is not None:
        return units[a * (dims + 1) + b]
    else:
        scale = tl.cast(1.0, COMPUTE)
        if a < dims:
            scale = pixels_per_unit(input_size[a], ALIGN_CORNERS, COMPUTE)
        if b < dims:
            per_unit = pixels_per_unit(output_size[b], ALIGN_CORNERS, COMPUTE)
            scale = tl.where(per_unit > 0, scale / tl.where(per_unit > 0, per_unit, 1.0), 0.0)
        return scale


@triton.jit
def grid_load(
    parameters_ptr, strides, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """An explicit grid, (*size, d), normalised → each lane's source pixel, in ATen's expression: a grid
    that lands on a pixel there lands on it here.
    """
    x = ()
    for axis in tl.static_range(len(p)):
        value = _load_component(parameters_ptr, strides, p, mask, axis, COMPUTE, INDEX)
        per_unit = pixels_per_unit(input_size[axis], ALIGN_CORNERS, COMPUTE)
        if TANGENT:
            x = x + (value * per_unit,)
        elif ALIGN_CORNERS:
            x = x + ((value + 1) * per_unit,)
        else:
            x = x + (tl.fma(value + 1, per_unit, -0.5),)
    return x


@triton.jit
def grid_load_vjp(
    gradients_ptr, gradients, strides, parameters_ptr, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    scaled = ()
    for axis in tl.static_range(len(p)):
        scaled = scaled + (gradients[axis] * pixels_per_unit(input_size[axis], ALIGN_CORNERS, COMPUTE),)
    pixel_displacement_load_vjp(
        gradients_ptr, scaled, strides, parameters_ptr, links, chain, p, mask, input_size, output_size, units,
        ALIGN_CORNERS, COMPUTE, INDEX,
    )  # fmt: skip


@triton.jit
def displacement_load(
    parameters_ptr, strides, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """The identity and a field, (*size, d), normalised → each lane's source pixel.

    The identity is added here, in fp32: a 16-bit field loses nothing of it.
    """
    x = grid_load(
        parameters_ptr, strides, links, chain, p, mask, input_size, output_size, units,
        ALIGN_CORNERS, COMPUTE, INDEX, True,
    )  # fmt: skip
    return x if TANGENT else _add_identity(x, p, input_size, output_size, units, ALIGN_CORNERS, COMPUTE)


@triton.jit
def pixel_displacement_load(
    parameters_ptr, strides, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """The identity and a field, (*size, d), in pixels of the input → each lane's source pixel."""
    x = ()
    for axis in tl.static_range(len(p)):
        x = x + (_load_component(parameters_ptr, strides, p, mask, axis, COMPUTE, INDEX),)
    return x if TANGENT else _add_identity(x, p, input_size, output_size, units, ALIGN_CORNERS, COMPUTE)


@triton.jit
def pixel_displacement_load_vjp(
    gradients_ptr, gradients, strides, parameters_ptr, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    for axis in tl.static_range(len(p)):
        at = gradients_ptr + _component_offset(strides, p, axis, INDEX)
        tl.store(at, gradients[axis].to(gradients_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_identity(x, p, input_size, output_size, units, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """Displacements in source pixels, added to where the identity looks."""
    u = centred(p, output_size, COMPUTE)
    result = ()
    for axis in tl.static_range(len(p)):
        scale = _unit(units, input_size, output_size, axis, axis, ALIGN_CORNERS, COMPUTE)
        result = result + (tl.fma(u[axis], scale, middle(input_size[axis], COMPUTE)) + x[axis],)
    return result


@triton.jit
def dense(coefficients, u, input_size):
    """The coefficients of a dense map are each lane's source pixel already."""
    return coefficients


@triton.jit
def dense_jvp(coefficients, t, u):
    return t


@triton.jit
def dense_vjp(coefficients, u, g):
    return g


@triton.jit
def _load_component(parameters_ptr, strides, p, mask, axis: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr):
    at = parameters_ptr + _component_offset(strides, p, axis, INDEX)
    return tl.load(at, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _component_offset(strides, p, axis: tl.constexpr, INDEX: tl.constexpr):
    """Where one component of a field lies; the strides are the pixels', x first, then the component's."""
    return offset(p, strides, INDEX) + axis * strides[len(p)]
