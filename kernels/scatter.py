"""The backward pass from the output's side.

One program owns a tile of output pixels of one map. It adds grad_input by atomics, and reduces the
gradient of the transform's coefficients to one partial sum. It serves what the walk does not:

    FOLDED_ONLY  samples that a padding mode folds back into the image, before the walk
    otherwise    the transform's gradient alone, a pure reduction with NEED_INPUT off

Atomics are fp32 or fp64, never 16-bit: those become compare-and-swap loops on every architecture.
"""

import triton
import triton.language as tl

from . import tuples
from .coordinates import block_offset, centred, lanes, offset, tile_count, tile_index
from .interpolation import axis_taps, corner, product, product_vjp
from .padding import strictly_inside


@triton.jit(do_not_specialize=["maps"])
def scatter_kernel(
    grad_input_ptr, gradients_ptr, grad_output_ptr, input_ptr, parameters_ptr,
    output_size, input_size, channels, maps,
    gradients_stride_n, gradients_stride_k, gradients_stride_slot, gradients_strides,
    parameters_stride_n, parameters_stride_k, parameters_strides,
    grad_input_stride_n, grad_input_stride_c, grad_input_strides,
    grad_output_stride_n, grad_output_stride_c, grad_output_strides,
    input_stride_n, input_stride_c, input_strides,
    LOAD: tl.constexpr, LOAD_VJP: tl.constexpr, TRANSFORM: tl.constexpr, TRANSFORM_VJP: tl.constexpr,
    PADDING: tl.constexpr, PADDING_VJP: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, TAPS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    FOLDED_ONLY: tl.constexpr, NEED_INPUT: tl.constexpr, NEED_PARAMETERS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, CHANNELS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = lanes(BLOCK)
    tiles = tile_count(output_size, BLOCK)
    tile = tl.program_id(0) % tiles
    m = (tl.program_id(0) // tiles).to(tl.int64)
    n = m // maps
    p, mask = tile_index(tile, tl.arange(0, LANES), output_size, BLOCK)
    u = centred(p, output_size, COMPUTE)
    parameters_ptr += n * parameters_stride_n + (m % maps) * parameters_stride_k
    coefficients = LOAD(
        parameters_ptr, parameters_strides, p, mask, input_size, output_size, ALIGN_CORNERS, COMPUTE, INDEX
    )
    x = TRANSFORM(coefficients, u)

    wanted = mask
    if FOLDED_ONLY and TAPS <= 2:
        inside = mask
        for axis in tl.static_range(len(BLOCK)):
            inside &= strictly_inside(x[axis], input_size[axis])
        wanted &= ~inside
    taps = ()
    for axis in tl.static_range(len(BLOCK)):
        taps = taps + (axis_taps(x[axis], input_size[axis], PADDING, ALIGN_CORNERS, WEIGHT, WEIGHT_VJP, TAPS, INDEX),)

    input_ptr += n * input_stride_n
    grad_output_ptr += m * grad_output_stride_n
    grad_x = tuples.zeros(len(BLOCK), (LANES,), COMPUTE)
    start = tl.program_id(1) * CHANNELS_PER_PROGRAM
    stop = tl.minimum(start + CHANNELS_PER_PROGRAM, channels)
    # Most tiles hold no folded sample at all.
    for first in range(start, tl.where(tl.max(wanted.to(tl.int32)) > 0, stop, start), UNROLL * BLOCK_C):
        for block in tl.static_range(UNROLL):
            c = first + block * BLOCK_C + tl.arange(0, BLOCK_C)
            in_channels = (c < channels)[None, :]
            grad_output = tl.load(
                grad_output_ptr + block_offset(offset(p, grad_output_strides, INDEX), c, grad_output_stride_c),
                mask=wanted[:, None] & in_channels,
                other=0.0,
            ).to(COMPUTE)  # [LANES, BLOCK_C]
            for corner_id in tl.static_range(TAPS ** len(BLOCK)):
                weights, slopes, pixel, inside, direct = corner(taps, corner_id, TAPS)
                if FOLDED_ONLY and TAPS > 2:  # a cubic sample folds tap by tap
                    inside &= ~direct
                corner_mask = (inside & wanted)[:, None] & in_channels
                if NEED_INPUT:
                    own = block_offset(offset(pixel, grad_input_strides, INDEX), c, grad_input_stride_c)
                    tl.atomic_add(
                        grad_input_ptr + n * grad_input_stride_n + own,
                        product(weights)[:, None] * grad_output,
                        mask=corner_mask,
                        sem="relaxed",
                    )
                if NEED_PARAMETERS:
                    value = tl.load(
                        input_ptr + block_offset(offset(pixel, input_strides, INDEX), c, input_stride_c),
                        mask=corner_mask,
                        other=0.0,
                    )
                    dot = tl.sum(value.to(COMPUTE) * grad_output, axis=1)
                    grad_x = tuples.add(grad_x, product_vjp(weights, slopes, dot))

    if NEED_PARAMETERS:
        slot = tile * tl.num_programs(1) + tl.program_id(1)
        grad_unpadded = ()
        for axis in tl.static_range(len(BLOCK)):
            if TAPS <= 2:
                factor = PADDING_VJP(x[axis], input_size[axis], ALIGN_CORNERS)
                grad_unpadded = grad_unpadded + (grad_x[axis] * factor,)
            else:
                grad_unpadded = grad_unpadded + (grad_x[axis],)
        gradients = TRANSFORM_VJP(coefficients, u, grad_unpadded)
        gradients_ptr += n * gradients_stride_n + (m % maps) * gradients_stride_k + slot * gradients_stride_slot
        LOAD_VJP(
            gradients_ptr, gradients, gradients_strides, p, mask, input_size, output_size, ALIGN_CORNERS, COMPUTE, INDEX
        )
