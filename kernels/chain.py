"""A chain of links as a transform: the stages `load` and `load_vjp` of every map that is not in pixels.

An output pixel is turned into a normalised point, passed from link to link, and turned into a source
pixel: that is the coefficient of its lane, as for a dense map. On the way back the points are computed
again, and each link adds the gradient of its own numbers to the program's slot.

A link is (f, f_vjp, numbers per map, or 0 for one that reads a table). A chain, for one map, is what its links read:
(sizes of each link, field, its gradient, the map's numbers), where a link's sizes begin with the place of its
numbers, and a field is (pointer, strides, size) or, for none, empty. Two tuples, since Triton assigns no tuple
that holds functions.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .coordinates import centred, middle, pixels_per_unit


@triton.jit
def chain_load(
    parameters_ptr, strides, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """Each lane's source pixel; with TANGENT, of one link that is linear in its numbers, their part of it."""
    v = _normalized(p, output_size, ALIGN_CORNERS, COMPUTE)
    for i in tl.static_range(len(links)):
        v = _follow(links, chain, i, parameters_ptr, v, p, mask, input_size, ALIGN_CORNERS, COMPUTE, INDEX, TANGENT)
    x = ()
    for a in tl.static_range(len(p)):
        pixels = v[a] * pixels_per_unit(input_size[a], ALIGN_CORNERS, COMPUTE)
        x = x + (pixels if TANGENT else pixels + middle(input_size[a], COMPUTE),)
    return x


@triton.jit
def chain_load_vjp(
    gradients_ptr, gradients, strides, parameters_ptr, links, chain, p, mask, input_size, output_size, units,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """One program's share, added to its slot; a field's gradient, to where it belongs."""
    v = _normalized(p, output_size, ALIGN_CORNERS, COMPUTE)
    points = (v,)
    for i in tl.static_range(len(links) - 1):
        v = _follow(links, chain, i, parameters_ptr, v, p, mask, input_size, ALIGN_CORNERS, COMPUTE, INDEX, False)
        points = points + (v,)
    g = ()
    for a in tl.static_range(len(p)):
        g = g + (tl.where(mask, gradients[a] * pixels_per_unit(input_size[a], ALIGN_CORNERS, COMPUTE), 0.0),)
    for j in tl.static_range(len(points)):
        g = _back(
            links, chain, len(points) - 1 - j, parameters_ptr, gradients_ptr, points[len(points) - 1 - j],
            g, p, mask, input_size, ALIGN_CORNERS, COMPUTE, INDEX,
        )  # fmt: skip


@triton.jit
def _normalized(p, output_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    u = centred(p, output_size, COMPUTE)
    v = ()
    for a in tl.static_range(len(p)):
        per_unit = pixels_per_unit(output_size[a], ALIGN_CORNERS, COMPUTE)
        v = v + (u[a] / tl.where(per_unit > 0, per_unit, 1.0),)
    return v


@triton.jit
def _table(chain, i: tl.constexpr, parameters_ptr, gradients_ptr):
    sizes = chain[0][i]
    numbers = parameters_ptr + sizes[0]
    return numbers, gradients_ptr + sizes[0], sizes[1:], chain[1], chain[2], chain[3] + sizes[0]


@triton.jit
def _numbers(ptr, COUNT: tl.constexpr, COMPUTE: tl.constexpr):
    theta = ()
    for i in tl.static_range(COUNT):
        theta = theta + (tl.load(ptr + i).to(COMPUTE),)
    return theta


@triton.jit
def _follow(
    links, chain, i: tl.constexpr, parameters_ptr, v, p, mask, input_size,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """The i-th link, taken."""
    table = _table(chain, i, parameters_ptr, parameters_ptr)
    if links[i][2] > 0:
        return links[i][0](_numbers(table[0], links[i][2], COMPUTE), v)
    else:
        return links[i][0](table, v, p, mask, input_size, ALIGN_CORNERS, COMPUTE, INDEX, TANGENT)


@triton.jit
def _back(
    links, chain, i: tl.constexpr, parameters_ptr, gradients_ptr, v, g, p, mask, input_size,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The way back over the i-th link; nobody asks for the gradient of where the first one starts."""
    table = _table(chain, i, parameters_ptr, gradients_ptr)
    if links[i][2] > 0:
        gradients, back = links[i][1](_numbers(table[0], links[i][2], COMPUTE), v, g)
        for k in tl.static_range(links[i][2]):
            tl.atomic_add(table[1] + k, tl.sum(tl.where(mask, gradients[k], 0.0)), sem="relaxed")
        return back
    else:
        return links[i][1](table, v, g, p, mask, input_size, ALIGN_CORNERS, COMPUTE, INDEX, i > 0)


@triton.jit
def try_kernel(out_ptr, theta_ptr, points_ptr, gradient_ptr, COUNT: tl.constexpr, DIMS: tl.constexpr,
             MAP: tl.constexpr, MAP_VJP: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """A registered link by itself: out (2 d + COUNT, LANES), the points that it gives and both gradients."""
    lane = tl.arange(0, LANES)
    theta = _numbers(theta_ptr, COUNT, tl.float32)
    v = ()
    g = ()
    for a in tl.static_range(DIMS):
        v = v + (tl.load(points_ptr + a * LANES + lane),)
        g = g + (tl.load(gradient_ptr + a * LANES + lane),)
    result = MAP(theta, v)
    gradients, back = MAP_VJP(theta, v, g)
    for a in tl.static_range(DIMS):
        tl.store(out_ptr + a * LANES + lane, result[a])
        tl.store(out_ptr + (DIMS + a) * LANES + lane, back[a])
    for k in tl.static_range(COUNT):
        tl.store(out_ptr + (2 * DIMS + k) * LANES + lane, gradients[k])


def try_link(map, map_vjp, theta, points, gradient):
    """What a link gives for points (d, LANES), the gradients of them, and of theta lane by lane, in one tensor."""
    dims, lanes = points.shape
    out = torch.empty((2 * dims + len(theta), lanes), dtype=theta.dtype, device=theta.device)
    try_kernel[(1,)](out, theta, points, gradient, len(theta), dims, map, map_vjp, lanes, **launch.OPTIONS)
    return out
