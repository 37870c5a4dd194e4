"""Where output pixels look: the steps that the gather and the scatter share."""

import triton
import triton.language as tl

from .coordinates import centred, image_start
from .padding import pass_padding


@triton.jit
def look(
    parameters_ptr, parameters_tangent_ptr, links, chain, m, maps, p, mask, output_size, input_size,
    parameters_batch, parameters_tangent_batch, parameters_strides, parameters_tangent_strides,
    LOAD: tl.constexpr, TRANSFORM: tl.constexpr, TRANSFORM_JVP: tl.constexpr, PADDING_VJP: tl.constexpr,
    TAPS: tl.constexpr, TANGENT: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """For output pixels p of map m: the map's coefficients and their tangents, p measured from the middle,
    the source coordinates before padding and, with TANGENT, the change of those after it.
    """
    n = m // maps
    k = m % maps
    u = centred(p, output_size, COMPUTE)
    numbers = image_start(parameters_ptr, n, parameters_batch, parameters_strides) + k * parameters_strides[1]
    chain = map_chain(chain, numbers, n, k)
    coefficients = LOAD(
        numbers, parameters_strides[2:], links, chain,
        p, mask, input_size, output_size, ALIGN_CORNERS, COMPUTE, INDEX, False,
    )  # fmt: skip
    x = TRANSFORM(coefficients, u, input_size)
    tangents = ()
    t = ()
    if TANGENT:
        start = image_start(parameters_tangent_ptr, n, parameters_tangent_batch, parameters_tangent_strides)
        tangents = LOAD(
            start + k * parameters_tangent_strides[1], parameters_tangent_strides[2:], links, chain,
            p, mask, input_size, output_size, ALIGN_CORNERS, COMPUTE, INDEX, True,
        )  # fmt: skip
        t = pass_padding(TRANSFORM_JVP(coefficients, tangents, u), x, input_size, PADDING_VJP, TAPS, ALIGN_CORNERS)
    return coefficients, tangents, u, x, t


@triton.jit
def map_chain(chain, numbers, n, k):
    """A chain as a launch passes it → the same for map k of image n, with its numbers."""
    if len(chain) == 0:
        return chain
    else:
        field = ()
        grad_field = ()
        if len(chain[1]) > 0:
            ptr, strides, size, batch = chain[1]
            field = (image_start(ptr, n, batch, strides) + k * strides[1], strides[2:], size)
            if len(chain[2]) > 0:
                grad_ptr, grad_strides = chain[2]
                start = image_start(grad_ptr, n, batch, grad_strides) + k * grad_strides[1]
                grad_field = (start, grad_strides[2:])
        return chain[0], field, grad_field, numbers
