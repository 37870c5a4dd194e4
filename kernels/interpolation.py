"""Interpolation kernels, and the pixels that they touch; below each kernel, its derivative.

``f(x, q)`` is the weight of pixel ``q`` for a sample at ``x`` (both in pixels), ``f_vjp(x, q)`` the
derivative of that weight with respect to ``x``, its slope, and ``f_curvature(x, q)`` the slope's.
Both the gather, which asks from the sample's side, and the walk, which asks from the pixel's,
evaluate these same functions. ORDER says how many derivatives a kernel needs: 0, 1 or 2.

A kernel with ``TAPS`` taps per axis touches the pixels ``first_tap(x) … first_tap(x) + TAPS - 1``.
"""

import triton
import triton.language as tl

from .padding import zeros


@triton.jit
def nearest(x, q):
    return tl.where(_round(x) == q, 1.0, 0.0).to(x.dtype)


@triton.jit
def nearest_vjp(x, q):
    return tl.zeros_like(x)


@triton.jit
def nearest_curvature(x, q):
    return tl.zeros_like(x)


@triton.jit
def linear(x, q):
    return 1.0 - tl.abs(x - q)


@triton.jit
def linear_vjp(x, q):
    # A sample on a pixel has that pixel as its first tap: the slope to the right of it, as ATen's.
    return tl.where(x < q, 1.0, -1.0).to(x.dtype)


@triton.jit
def linear_curvature(x, q):
    return tl.zeros_like(x)


@triton.jit
def cubic(x, q):
    """Cubic convolution (Keys 1981) with a = -0.75, as torch's bicubic."""
    d = tl.abs(x - q)
    near = (1.25 * d - 2.25) * d * d + 1.0
    far = ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0
    return tl.where(d <= 1, near, far)


@triton.jit
def cubic_vjp(x, q):
    d = tl.abs(x - q)
    near = (3.75 * d - 4.5) * d
    far = (-2.25 * d + 7.5) * d - 6.0
    return tl.where(x < q, -1.0, 1.0) * tl.where(d <= 1, near, far)


@triton.jit
def cubic_curvature(x, q):
    d = tl.abs(x - q)
    return tl.where(d <= 1, 7.5 * d - 4.5, -4.5 * d + 7.5)


@triton.jit
def first_tap(x, TAPS: tl.constexpr):
    """The first pixel, as a float, of the TAPS that a sample at x touches."""
    if TAPS == 1:
        return _round(x)
    else:
        return tl.floor(x) - (TAPS // 2 - 1)


@triton.jit
def touches(x, q, TAPS: tl.constexpr):
    """Whether pixel q is among the taps of x; false for NaN."""
    # Not by the distance x - q: it rounds, and would add a pixel that the sample did not read. Nor by two comparisons:
    # LLVM packs those of two axes into a vector of bits, in ten instructions.
    if TAPS == 1:
        return _round(x) == q
    else:
        return tl.abs(tl.floor(x) - (q - 0.5)) < TAPS // 2


@triton.constexpr_function
def loops(dims, taps):
    """Whether the last axis' taps are visited in a loop: 64 corners of a tricubic sample, written
    out, take a minute to compile and do not fit in the registers.
    """
    return int(taps**dims > 16)


@triton.jit
def taps_along(
    x, size, first, PADDING: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr,
    TAPS: tl.constexpr, COUNT: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Each axis' taps, COUNT of them from the one numbered `first` on, as a tuple over axes."""
    taps = ()
    for axis in tl.static_range(len(x)):
        taps = taps + (
            _axis_taps(
                x[axis], size[axis], first, PADDING, ALIGN_CORNERS,
                WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, COUNT, ORDER,
            ),
        )  # fmt: skip
    return taps


@triton.jit
def _axis_taps(
    x, size, first, PADDING: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr,
    TAPS: tl.constexpr, COUNT: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """For each tap its weight and ORDER derivatives, pixel index, whether that is in the image, and
    whether it was before padding.

    Padding moves the sample, but for cubic the taps: that is what torch does.
    """
    if TAPS <= 2:
        x = PADDING(x, size, ALIGN_CORNERS)
    else:
        x = _clamp_to_integers(x)
    q0 = first_tap(x, TAPS)
    if COUNT < TAPS:
        q0 += first
    weights = ()
    slopes = ()
    curvatures = ()
    pixels = ()
    insides = ()
    directs = ()
    for tap in tl.static_range(COUNT):
        q = q0 + tap if tap > 0 else q0
        weights = weights + (WEIGHT(x, q),)
        if ORDER >= 1:
            slopes = slopes + (WEIGHT_VJP(x, q),)
        if ORDER >= 2:
            curvatures = curvatures + (WEIGHT_CURVATURE(x, q),)
        # Padding, or the clamp, has left numbers that 32 bits can hold.
        pixel = q0.to(tl.int32) + tap
        directs = directs + (_is_index(pixel, size),)
        if TAPS > 2:
            pixel = PADDING(q, size, ALIGN_CORNERS).to(tl.int32)
        inside = _is_index(pixel, size)
        insides = insides + (inside,)
        # Two taps need none: what is masked is not read.
        pixels = pixels + (pixel if TAPS == 2 else tl.where(inside, pixel, 0),)
    return weights, slopes, curvatures, pixels, insides, directs


@triton.jit
def _is_index(q, size):
    """0 <= q < size in one comparison, as negative numbers are large ones without their sign."""
    return q.to(tl.uint32) < tl.cast(size, tl.uint32)


@triton.constexpr_function
def _tap(corner_id, axis, taps):
    """Which tap along an axis a corner has."""
    return corner_id // taps**axis % taps


@triton.jit
def corner(taps, corner_id: tl.constexpr, TAPS: tl.constexpr, ORDER: tl.constexpr, wanted=True):
    """One of the TAPS ** dims pixels: along each axis its weight and ORDER derivatives; where it lies; of the samples
    that are wanted, whether it is inside, and whether it is so unfolded.

    Where: an index, and how many pixels beyond it. That is the same index for all corners unless padding has moved
    each by itself, so that they share an address.
    """
    weights = ()
    slopes = ()
    curvatures = ()
    index = ()
    beyond = ()
    inside = wanted
    direct = wanted
    for axis in tl.static_range(len(taps) - 1, -1, -1):
        inside = inside & taps[axis][4][_tap(corner_id, axis, TAPS)]
        direct = direct & taps[axis][5][_tap(corner_id, axis, TAPS)]
    for axis in tl.static_range(len(taps)):
        weights = weights + (taps[axis][0][_tap(corner_id, axis, TAPS)],)
        if ORDER >= 1:
            slopes = slopes + (taps[axis][1][_tap(corner_id, axis, TAPS)],)
        if ORDER >= 2:
            curvatures = curvatures + (taps[axis][2][_tap(corner_id, axis, TAPS)],)
        index = index + (taps[axis][3][0 if TAPS <= 2 else _tap(corner_id, axis, TAPS)],)
        beyond = beyond + (_tap(corner_id, axis, TAPS) if TAPS <= 2 else 0,)
    return weights, slopes, curvatures, (index, beyond), inside, direct


@triton.jit
def coverage(
    x, size, WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr,
    TAPS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """The share of a sample's weight that lies inside the image, x as it was before padding: its factor
    along each axis, and ORDER derivatives. It is what a corner of value 1 at every pixel would add up to,
    but exactly 1, without slope, where all taps are inside.
    """
    weights = ()
    slopes = ()
    curvatures = ()
    for axis in tl.static_range(len(x)):
        taps = _axis_taps(x[axis], size[axis], 0, zeros, False, WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, TAPS, ORDER)
        weights = weights + (_sum_inside(taps[0], taps[4], 1.0),)
        if ORDER >= 1:
            slopes = slopes + (_sum_inside(taps[1], taps[4], 0.0),)
        if ORDER >= 2:
            curvatures = curvatures + (_sum_inside(taps[2], taps[4], 0.0),)
    return weights, slopes, curvatures


@triton.jit
def _sum_inside(values, insides, all_of_them):
    """The sum of the values whose tap is inside; `all_of_them`, to which they add up but for rounding, if all are."""
    total = tl.where(insides[0], values[0], 0.0)
    whole = insides[0]
    for tap in tl.static_range(1, len(values)):
        total += tl.where(insides[tap], values[tap], 0.0)
        whole &= insides[tap]
    return tl.where(whole, all_of_them, total)


@triton.jit
def product(weights):
    """A pixel's weight from its weights along each axis."""
    result = weights[0]
    for axis in tl.static_range(1, len(weights)):
        result = result * weights[axis]
    return result


@triton.jit
def product_vjp(weights, slopes, g):
    """Gradient g of that weight → gradients of the coordinate along each axis."""
    result = ()
    for axis in tl.static_range(len(weights)):
        result = result + (_product_but(weights, axis, -1, g * slopes[axis]),)
    return result


@triton.jit
def product_jvp(weights, slopes, t):
    """Tangents t of the coordinate along each axis → the tangent of that weight."""
    result = _product_but(weights, 0, -1, t[0] * slopes[0])
    for axis in tl.static_range(1, len(weights)):
        result += _product_but(weights, axis, -1, t[axis] * slopes[axis])
    return result


@triton.jit
def product_vjp_jvp(weights, slopes, curvatures, t, g):
    """What product_vjp changes by, with g held, where the coordinate moves by t."""
    result = ()
    for axis in tl.static_range(len(weights)):
        change = _product_but(weights, axis, -1, g * curvatures[axis] * t[axis])
        for other in tl.static_range(len(weights)):
            if other != axis:
                change += _product_but(weights, axis, other, g * slopes[axis] * slopes[other] * t[other])
        result = result + (change,)
    return result


@triton.jit
def _product_but(weights, a: tl.constexpr, b: tl.constexpr, g):
    """g times the weights along every axis but a and b."""
    for axis in tl.static_range(len(weights)):
        if axis != a and axis != b:
            g = g * weights[axis]
    return g


@triton.jit
def _clamp_to_integers(x):
    """x where neighbouring integers are exact in fp32; beyond, and NaN, the end of that range."""
    return tl.where(x > -16777208.0, tl.where(x < 16777208.0, x, 16777208.0), -16777208.0)


@triton.jit
def _round(x):
    """Round half to even, as torch does."""
    below = tl.floor(x)
    above_half = x - below > 0.5
    tie_to_odd = (x - below == 0.5) & (below - 2 * tl.floor(below * 0.5) > 0)
    return below + tl.where(above_half | tie_to_odd, 1.0, 0.0).to(x.dtype)
