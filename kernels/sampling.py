"""Where output pixels look: the steps that the gather and the scatter share."""

import triton
import triton.language as tl

from . import tuples
from .coordinates import centred, from_finer, image_start, middle
from .padding import pass_padding
from .transforms import samples_for, squared_length


@triton.jit
def load_once(
    numbers, parameters_strides, output_size, input_size, units,
    LOAD: tl.constexpr, ONCE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The coefficients of a map that has the same for all pixels; of others none."""
    if ONCE:
        return LOAD(
            numbers, parameters_strides[2:], None, None,
            None, None, input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX, False,
        )  # fmt: skip
    else:
        return ()


@triton.jit
def look(
    numbers, parameters_tangent_ptr, links, chain, n, k, coefficients, p, u, mask, output_size, input_size, units,
    parameters_tangent_batch, parameters_strides, parameters_tangent_strides,
    LOAD: tl.constexpr, TRANSFORM: tl.constexpr, TRANSFORM_JVP: tl.constexpr, PADDING_VJP: tl.constexpr,
    TAPS: tl.constexpr, TANGENT: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """For places p in the output of map k of image n, which has these numbers, u measured from the middle: the map's
    coefficients, as they are if they have been loaded, and their tangents, the source coordinates before padding and,
    with TANGENT, the change of those after it.
    """
    chain = map_chain(chain, numbers, n, k)
    if len(coefficients) == 0:
        coefficients = LOAD(
            numbers, parameters_strides[2:], links, chain,
            p, mask, input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX, False,
        )  # fmt: skip
    x = TRANSFORM(coefficients, u, input_size)
    tangents = ()
    t = ()
    if TANGENT:
        start = image_start(parameters_tangent_ptr, n, parameters_tangent_batch, parameters_tangent_strides)
        tangents = LOAD(
            start + k * parameters_tangent_strides[1], parameters_tangent_strides[2:], links, chain,
            p, mask, input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX, True,
        )  # fmt: skip
        t = pass_padding(TRANSFORM_JVP(coefficients, tangents, u), x, input_size, PADDING_VJP, TAPS, ALIGN_CORNERS)
    return coefficients, tangents, x, t


@triton.jit
def samples_per_axis(
    numbers, links, chain, n, k, p, mask, output_size, input_size, units, parameters_strides,
    LOAD: tl.constexpr, TRANSFORM: tl.constexpr, SHRINK: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """How many samples along each axis make output pixels p, so many as the map shrinks: one number for the
    whole map where that is the same everywhere, else one for each lane.
    """
    if SHRINK is not None:
        return SHRINK(
            LOAD(
                numbers, parameters_strides[2:], None, None,
                p, mask, input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX, False,
            )
        )  # fmt: skip
    else:
        chain = map_chain(chain, numbers, n, k)
        u = centred(p, output_size, COMPUTE)
        longest = u[0] * 0
        for axis in tl.static_range(len(p)):
            ends = ()
            for side in tl.static_range(2):
                place = ()
                for other in tl.static_range(len(p)):
                    place = place + (u[other] + (side - 0.5 if other == axis else 0.0),)
                coefficients = LOAD(
                    numbers, parameters_strides[2:], links, chain, uncentred(place, output_size, COMPUTE),
                    mask, input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX, False,
                )  # fmt: skip
                ends = ends + (TRANSFORM(coefficients, place, input_size),)
            step = ()
            for other in tl.static_range(len(p)):
                step = step + (ends[1][other] - ends[0][other],)
            longest = tl.maximum(longest, squared_length(step))
        return samples_for(longest)


@triton.jit
def sample_place(p, sample, per_axis, output_size, COMPUTE: tl.constexpr):
    """One of the per_axis ** d samples of output pixels p, measured from the middle: it lies on a pixel of a finer
    output, where the walk finds it by the same arithmetic.
    """
    fine = ()
    for axis in tl.static_range(len(p)):
        fine = fine + (p[axis] * per_axis + sample % per_axis,)
        sample = sample // per_axis
    return from_finer(centred(fine, tuples.scale(output_size, per_axis), COMPUTE), per_axis)


@triton.jit
def uncentred(u, size, COMPUTE: tl.constexpr):
    """The same places, measured from the first pixel."""
    result = ()
    for axis in tl.static_range(len(u)):
        result = result + (u[axis] + middle(size[axis], COMPUTE),)
    return result


@triton.jit
def power(n, EXPONENT: tl.constexpr):
    result = n
    for _ in tl.static_range(EXPONENT - 1):
        result = result * n
    return result


@triton.jit
def with_fields(chain, field_ptr, grad_field_ptr):
    """A chain as a launch passes it → the same, with the fields that it reads and adds to."""
    if len(chain) == 0:
        return chain
    else:
        field = ()
        grad_field = ()
        if field_ptr is not None:
            field = (field_ptr,) + chain[1]
        if grad_field_ptr is not None:
            grad_field = (grad_field_ptr,) + chain[2]
        return chain[0], field, grad_field


@triton.jit
def map_chain(chain, numbers, n, k):
    """A chain with its fields → the same for map k of image n, with its numbers."""
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
