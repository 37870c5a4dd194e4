"""Where an output pixel looks: the inverse maps, each with its derivative below it.

A transform is five device functions:

    load(parameters_ptr, …)     parameters → coefficients, once per program, with the change from
                                normalised units to pixels folded in
    load_vjp(gradients, …)      gradients of the coefficients → gradients of the parameters
    map(coefficients, u)        centred output index u → source pixel coordinate
    map_vjp(coefficients, u, g) gradient g of that coordinate → gradients of the coefficients
    rows / columns(…)           the output pixels that can touch a given input pixel

Axes are x first. ``rows`` bounds the preimage along every axis but x; ``columns`` bounds it along x
for a given row. The bounds may be too wide, never too narrow: each candidate is then tested by the
forward's own expression.
"""

import triton
import triton.language as tl

from .coordinates import middle, pixels_per_unit


@triton.jit
def affine_load(parameters_ptr, input_size, output_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """theta, (d, d+1) → the same matrix from centred output indices to source pixels."""
    dims: tl.constexpr = len(input_size)
    coefficients = ()
    for a in tl.static_range(dims):
        for b in tl.static_range(dims + 1):
            theta = tl.load(parameters_ptr + a * (dims + 1) + b).to(COMPUTE)
            scale = _affine_scale(input_size, output_size, a, b, ALIGN_CORNERS, COMPUTE)
            if b < dims:
                coefficients = coefficients + (theta * scale,)
            else:
                coefficients = coefficients + (tl.fma(theta, scale, middle(input_size[a], COMPUTE)),)
    return coefficients


@triton.jit
def affine_load_vjp(gradients, input_size, output_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    dims: tl.constexpr = len(input_size)
    result = ()
    for a in tl.static_range(dims):
        for b in tl.static_range(dims + 1):
            scale = _affine_scale(input_size, output_size, a, b, ALIGN_CORNERS, COMPUTE)
            result = result + (gradients[a * (dims + 1) + b] * scale,)
    return result


@triton.jit
def _affine_scale(
    input_size, output_size, a: tl.constexpr, b: tl.constexpr, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr
):
    """What entry (a, b) of theta is multiplied by to act on pixels."""
    scale = pixels_per_unit(input_size[a], ALIGN_CORNERS, COMPUTE)
    if b < len(input_size):
        # A quotient, not a product with a reciprocal: equal sizes must give exactly 1.
        per_unit = pixels_per_unit(output_size[b], ALIGN_CORNERS, COMPUTE)
        scale = tl.where(per_unit > 0, scale / tl.where(per_unit > 0, per_unit, 1.0), 0.0)
    return scale


@triton.jit
def affine(coefficients, u):
    dims: tl.constexpr = len(u)
    x = ()
    for a in tl.static_range(dims):
        s = coefficients[a * (dims + 1) + dims]
        # x comes last: a loop along a row then costs one multiply-add per axis.
        for b in tl.static_range(dims):
            s = tl.fma(coefficients[a * (dims + 1) + dims - 1 - b], u[dims - 1 - b], s)
        x = x + (s,)
    return x


@triton.jit
def affine_vjp(coefficients, u, g):
    dims: tl.constexpr = len(u)
    gradients = ()
    for a in tl.static_range(dims):
        for b in tl.static_range(dims):
            gradients = gradients + (g[a] * u[b],)
        gradients = gradients + (g[a],)
    return gradients


@triton.jit
def affine_rows(coefficients, q, input_size, output_size, RADIUS: tl.constexpr):
    """First and last row, along y and on, whose pixels can come within RADIUS of source pixel q."""
    dims: tl.constexpr = len(input_size)
    tl.static_assert(dims <= 2, "the walk's row bounds are written for one and two dimensions")
    if dims == 1:
        return (), ()
    a, b, c, d, e, f = coefficients
    # Solve A u = q - t for u_y. Everything is conditioned by the determinant; where it vanishes
    # the bounds become infinite or NaN, and clamping makes them the whole axis.
    determinant = a * e - b * d
    centre = (a * (q[1] - f) - d * (q[0] - c)) / determinant
    reach_x = RADIUS + _affine_margin(coefficients, 0, input_size, output_size)
    reach_y = RADIUS + _affine_margin(coefficients, 1, input_size, output_size)
    reach = (tl.abs(a) * reach_y + tl.abs(d) * reach_x) / tl.abs(determinant)
    # Rounding of the determinant and of the numerator, amplified by the division.
    cancellation = (tl.abs(a * e) + tl.abs(b * d)) / tl.abs(determinant)
    reach += cancellation * output_size[1] * _EPSILON
    centre += middle(output_size[1], centre.dtype)
    first, last = _clamp_interval(centre - reach, centre + reach, output_size[1])
    # A map that is not finite lands nowhere; its bounds would be the whole output for every q.
    finite = (a * 0 + b * 0 + c * 0 + d * 0 + e * 0 + f * 0) == 0
    return (first,), (tl.where(finite, last, -1),)


@triton.jit
def affine_columns(coefficients, row, q, input_size, output_size, RADIUS: tl.constexpr):
    """First and last column of a row (centred indices along y and on) that can touch pixel q."""
    dims: tl.constexpr = len(input_size)
    first = 0
    last = output_size[0] - 1
    for a in tl.static_range(dims):
        s = coefficients[a * (dims + 1) + dims] - q[a]
        for b in tl.static_range(1, dims):
            s = tl.fma(coefficients[a * (dims + 1) + b], row[b - 1], s)
        slope = coefficients[a * (dims + 1)]
        reach = RADIUS + _affine_margin(coefficients, a, input_size, output_size)
        centre = middle(output_size[0], slope.dtype) - s / slope
        half = reach / tl.abs(slope)
        first_a, last_a = _clamp_interval(centre - half, centre + half, output_size[0])
        # Where x does not matter, the row is in reach as a whole or not at all.
        flat = tl.abs(slope) < 1e-30
        first = tl.maximum(first, tl.where(flat, 0, first_a))
        last = tl.minimum(last, tl.where(flat, tl.where(tl.abs(s) <= reach, output_size[0] - 1, -1), last_a))
    return first, last


@triton.jit
def _affine_margin(coefficients, a: tl.constexpr, input_size, output_size):
    """A bound, in source pixels, on the rounding of the coordinate along axis a."""
    dims: tl.constexpr = len(input_size)
    size = tl.abs(coefficients[a * (dims + 1) + dims]) + input_size[a]
    for b in tl.static_range(dims):
        size += tl.abs(coefficients[a * (dims + 1) + b]) * output_size[b]
    return size * _EPSILON


# 2 ** -20, eight roundings of fp32; an fp64 walk only gets bounds a little wider than it needs.
_EPSILON = tl.constexpr(2.0**-20)


@triton.jit
def _clamp_interval(first, last, size):
    """The integers of [first, last] within an axis, empty as (size, …) or (…, -1).

    Written with comparisons, so that a NaN bound becomes the end of the axis and infinities never
    reach the conversion to integers.
    """
    n = size.to(first.dtype)
    first = tl.where(first > 0, tl.where(first < n, first, n), 0.0)
    last = tl.where(last < n - 1, tl.where(last > -1, last, -1.0), n - 1)
    return tl.ceil(first).to(tl.int32), tl.floor(last).to(tl.int32)


@triton.jit
def store_gradients(
    ptr, gradients, LOAD_VJP: tl.constexpr, input_size, output_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr
):
    """Reduce the lanes' coefficient gradients and store them as one program's parameter gradients."""
    totals = ()
    for i in tl.static_range(len(gradients)):
        totals = totals + (tl.sum(gradients[i]),)
    parameters = LOAD_VJP(totals, input_size, output_size, ALIGN_CORNERS, COMPUTE)
    for i in tl.static_range(len(parameters)):
        tl.store(ptr + i, parameters[i])
