"""Interpolation kernels, and the pixels that they touch; below each kernel, its derivative.

``f(x, q)`` is the weight of pixel ``q`` for a sample at ``x`` (both in pixels) and ``f_vjp(x, q)``
the derivative of that weight with respect to ``x``. Both the gather, which asks from the sample's
side, and the walk, which asks from the pixel's, evaluate these same two functions.

A kernel with ``TAPS`` taps per axis touches the pixels ``first_tap(x) … first_tap(x) + TAPS - 1``.
"""

import triton
import triton.language as tl


@triton.jit
def nearest(x, q):
    return tl.where(_round(x) == q, 1.0, 0.0).to(x.dtype)


@triton.jit
def nearest_vjp(x, q):
    return tl.zeros_like(x)


@triton.jit
def linear(x, q):
    return 1.0 - tl.abs(x - q)


@triton.jit
def linear_vjp(x, q):
    # A sample on a pixel has that pixel as its first tap: the slope to the right of it, as ATen's.
    return tl.where(x < q, 1.0, -1.0).to(x.dtype)


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
    # Not by the distance x - q: it rounds, and would add a pixel that the sample did not read.
    first = first_tap(x, TAPS)
    return (q >= first) & (q <= first + (TAPS - 1))


@triton.jit
def axis_taps(x, size, WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, TAPS: tl.constexpr, INDEX: tl.constexpr):
    """One axis' taps: for each its weight, slope, pixel index and whether that is in the image."""
    first = first_tap(x, TAPS)
    last = (size - 1).to(x.dtype)
    weights = ()
    slopes = ()
    pixels = ()
    insides = ()
    for tap in tl.static_range(TAPS):
        q = first + tap
        # Compared as floats: converting an out-of-range float to an integer is undefined.
        inside = (q >= 0) & (q <= last)
        weights = weights + (WEIGHT(x, q),)
        slopes = slopes + (WEIGHT_VJP(x, q),)
        pixels = pixels + (tl.where(inside, q, 0.0).to(INDEX),)
        insides = insides + (inside,)
    return weights, slopes, pixels, insides


@triton.jit
def corner(taps, corner_id: tl.constexpr, TAPS: tl.constexpr):
    """One of the TAPS ** dims pixels: its weight and slope along each axis, its index, if inside."""
    weights = ()
    slopes = ()
    pixel = ()
    inside = taps[0][3][corner_id % TAPS]
    for axis in tl.static_range(len(taps)):
        weights = weights + (taps[axis][0][corner_id // TAPS**axis % TAPS],)
        slopes = slopes + (taps[axis][1][corner_id // TAPS**axis % TAPS],)
        pixel = pixel + (taps[axis][2][corner_id // TAPS**axis % TAPS],)
        inside = inside & taps[axis][3][corner_id // TAPS**axis % TAPS]
    return weights, slopes, pixel, inside


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
        slope = g * slopes[axis]
        for other in tl.static_range(len(weights)):
            if other != axis:
                slope = slope * weights[other]
        result = result + (slope,)
    return result


@triton.jit
def _round(x):
    """Round half to even, as torch does."""
    below = tl.floor(x)
    above_half = x - below > 0.5
    tie_to_odd = (x - below == 0.5) & (below - 2 * tl.floor(below * 0.5) > 0)
    return below + tl.where(above_half | tie_to_odd, 1.0, 0.0).to(x.dtype)
