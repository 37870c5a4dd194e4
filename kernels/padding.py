"""What a source pixel coordinate outside the image stands for; below each, the derivative.

``f(x, size)`` is the coordinate that is read instead of ``x`` (pixels, fp32 or fp64), and
``f_vjp(x, size)`` the factor that a gradient with respect to it takes on its way to ``x``. Ties
follow ATen's ``clip_coordinates_set_grad``: a coordinate on the edge counts as clipped. NaN reads
pixel 0 and passes no gradient, as ATen's CUDA forward does.
"""

import triton
import triton.language as tl

from .coordinates import middle


@triton.jit
def zeros(x, size, ALIGN_CORNERS: tl.constexpr):
    # NaN and infinities lie outside; a finite place there keeps them out of the weights.
    return tl.where(tl.abs(x) < 2.0**30, x, -4.0)


@triton.jit
def zeros_vjp(x, size, ALIGN_CORNERS: tl.constexpr):
    return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def border(x, size, ALIGN_CORNERS: tl.constexpr):
    last = tl.cast(size - 1, x.dtype)
    # Comparisons with NaN are false, so NaN falls through to 0.
    return tl.where(x > 0, tl.where(x < last, x, last), 0.0)


@triton.jit
def border_vjp(x, size, ALIGN_CORNERS: tl.constexpr):
    return tl.where(_strictly_inside(x, size), 1.0, 0.0).to(x.dtype)


@triton.jit
def strictly_inside(x, size):
    """Whether no padding moves a sample; one on an edge counts as moved, because its slope is."""
    inside = _strictly_inside(x[0], size[0])
    for axis in tl.static_range(1, len(x)):
        inside &= _strictly_inside(x[axis], size[axis])
    return inside


@triton.jit
def _strictly_inside(x, size):
    return (x > 0) & (x < tl.cast(size - 1, x.dtype))


@triton.jit
def pass_padding(g, x, size, PADDING_VJP: tl.constexpr, TAPS: tl.constexpr, ALIGN_CORNERS: tl.constexpr):
    """Tangents or gradients g on one side of the padding that moved x → on the other.

    For cubic it moved the taps, not the sample: they pass as they are.
    """
    if TAPS > 2:
        return g
    else:
        result = ()
        for axis in tl.static_range(len(x)):
            result = result + (g[axis] * PADDING_VJP(x[axis], size[axis], ALIGN_CORNERS),)
        return result


@triton.jit
def reflection(x, size, ALIGN_CORNERS: tl.constexpr):
    reflected, _ = _reflect(x, size, ALIGN_CORNERS)
    return border(reflected, size, ALIGN_CORNERS)


@triton.jit
def reflection_vjp(x, size, ALIGN_CORNERS: tl.constexpr):
    reflected, sign = _reflect(x, size, ALIGN_CORNERS)
    return sign * border_vjp(reflected, size, ALIGN_CORNERS)


@triton.jit
def _reflect(x, size, ALIGN_CORNERS: tl.constexpr):
    """Fold x into the image, about its outermost pixels' centres or edges; and the slope there."""
    # Distances from the middle keep an inside coordinate's bits: it must read as under zeros.
    centre = middle(size, x.dtype)
    radius = centre if ALIGN_CORNERS else centre + 0.5
    inside = tl.abs(x - centre) <= radius
    span = tl.where(radius > 0, 2 * radius, 1.0)
    from_edge = tl.abs(x - (centre - radius))
    flips = tl.floor(from_edge / span)
    extra = tl.fma(-flips, span, from_edge)
    # Odd without an integer conversion, which huge coordinates would overflow.
    odd = flips - 2 * tl.floor(flips * 0.5) > 0
    folded = tl.where(odd, span - extra, extra) + (centre - radius)
    sign = tl.where(odd, -1.0, 1.0) * tl.where(x < centre - radius, -1.0, 1.0)
    # One pixel under align_corners leaves nothing to fold about: everything reads it.
    folded = tl.where(radius > 0, folded, 0.0)
    return tl.where(inside, x, folded), tl.where(inside, 1.0, sign).to(x.dtype)
