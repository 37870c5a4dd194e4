"""The forward pass: read the input where the transform looks.

    output[m, c, p] = Σ_q  Π_axis weight(x(p), q) · input[m // maps, c, q],   x = padding(T_m(p))

m: map, one per output image; maps: maps per input image; c: channel; p: output pixel; q: input
pixel, one of the TAPS ** dims that x touches.

One program owns a tile of output pixels of one map and walks over channels: coordinates, weights
and offsets are computed once. No coordinate is ever stored.
"""

import triton
import triton.language as tl

from . import launch, stages, tiling
from .coordinates import block_offset, centred, lanes, offset, tile_count, tile_index
from .interpolation import axis_taps, corner, product


@triton.jit(do_not_specialize=["maps"])
def gather_kernel(
    output_ptr, input_ptr, parameters_ptr,
    output_size, input_size, channels, maps,
    parameters_stride_n, parameters_stride_k, parameters_strides,
    output_stride_n, output_stride_c, output_strides,
    input_stride_n, input_stride_c, input_strides,
    LOAD: tl.constexpr, TRANSFORM: tl.constexpr,
    PADDING: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, TAPS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, CHANNELS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    tiles = tile_count(output_size, BLOCK)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    p, mask = tile_index(tl.program_id(0) % tiles, tl.arange(0, lanes(BLOCK)), output_size, BLOCK)

    parameters_ptr += (m // maps) * parameters_stride_n + (m % maps) * parameters_stride_k
    coefficients = LOAD(
        parameters_ptr, parameters_strides, p, mask, input_size, output_size, ALIGN_CORNERS, COMPUTE, INDEX
    )
    x = TRANSFORM(coefficients, centred(p, output_size, COMPUTE))
    taps = ()
    for axis in tl.static_range(len(BLOCK)):
        taps = taps + (axis_taps(x[axis], input_size[axis], PADDING, ALIGN_CORNERS, WEIGHT, WEIGHT_VJP, TAPS, INDEX),)

    input_ptr += (m // maps) * input_stride_n
    output_ptr += m * output_stride_n
    start = tl.program_id(1) * CHANNELS_PER_PROGRAM
    for first in range(start, tl.minimum(start + CHANNELS_PER_PROGRAM, channels), UNROLL * BLOCK_C):
        for block in tl.static_range(UNROLL):
            c = first + block * BLOCK_C + tl.arange(0, BLOCK_C)
            in_channels = (c < channels)[None, :]
            output = 0.0  # [LANES, BLOCK_C]
            for corner_id in tl.static_range(TAPS ** len(BLOCK)):
                weights, _, pixel, inside, _ = corner(taps, corner_id, TAPS)
                value = tl.load(
                    input_ptr + block_offset(offset(pixel, input_strides, INDEX), c, input_stride_c),
                    mask=(inside & mask)[:, None] & in_channels,
                    other=0.0,
                )
                output += product(weights)[:, None] * value.to(COMPUTE)
            tl.store(
                output_ptr + block_offset(offset(p, output_strides, INDEX), c, output_stride_c),
                output.to(output_ptr.dtype.element_ty),
                mask=mask[:, None] & in_channels,
            )


def gather(output, input, parameters, *, kind, mode, padding_mode, align_corners):
    """Fill output (M * K, C, *size) from input (M, C, *input_size) and parameters (M, K, …)."""
    taps = stages.INTERPOLATIONS[mode].taps
    parameters = launch.packed(parameters, stages.TRANSFORMS[kind].dense)
    tile = tiling.gather_tile(input.dim() - 2, input.shape[1], launch.is_channels_last(input), input.dtype, taps)
    gather_kernel[tile.grid(output.shape[0], output.shape[1], output.shape[2:])](
        output, input, parameters,
        launch.size(output), launch.size(input), output.shape[1], parameters.shape[1],
        *launch.parameter_strides(parameters),
        *launch.strides(output), *launch.strides(input),
        **stages.gather(kind, mode, padding_mode),
        ALIGN_CORNERS=align_corners, **launch.constants(input, output, parameters=parameters), **tile.constants(),
    )  # fmt: skip
