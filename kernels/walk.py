"""The backward pass from the input's side: one pass, no atomics, the same bits every run.

    grad_input[q]     = Σ_p  weight(x(p), q) · grad_output[p]
    grad_coefficients = Σ_q Σ_p  x_vjp(p) · weight_vjp(x(p), q) · ⟨grad_output[p], input[q]⟩_channels

n: image; m: map; q: input pixel; p: output pixel, a candidate for touching q; c: channel.

One program owns a tile of *input* pixels and a block of channels, and visits the output pixels that
can touch them: for each map a few rows, for each row a few columns, bounded on the device by the
transform's inverse. Every candidate is weighted by the forward's own expression, so exactly the
pixels that the forward read take part. Both sums come out of the same visit.

Usually each lane owns one pixel q and visits its candidates one by one. Where a map magnifies so
much that the candidates span more rows than the tile has lanes, few pixels own nearly everything;
there all lanes take turns at one pixel after another and share out its rows. The device chooses,
per map and tile.

Under a padding mode that folds, the walk takes the samples strictly inside the image; the others
have been scattered into grad_input before, and the walk starts from what lies there.
"""

import triton
import triton.language as tl

from . import tuples
from .coordinates import block_offset, centred, lanes, offset, tile_count, tile_index
from .interpolation import product, product_vjp, touches
from .padding import strictly_inside


@triton.jit(do_not_specialize=["maps"])
def walk_kernel(
    grad_input_ptr, gradients_ptr, grad_output_ptr, input_ptr, scattered_ptr, parameters_ptr,
    output_size, input_size, channels, maps,
    gradients_stride_n, gradients_stride_k, gradients_stride_slot,
    parameters_stride_n, parameters_stride_k,
    grad_input_stride_n, grad_input_stride_c, grad_input_strides,
    grad_output_stride_n, grad_output_stride_c, grad_output_strides,
    input_stride_n, input_stride_c, input_strides,
    LOAD: tl.constexpr, LOAD_VJP: tl.constexpr, TRANSFORM: tl.constexpr, TRANSFORM_VJP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, TAPS: tl.constexpr, FOLDS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, CHANNELS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    tl.static_assert(CHANNELS_PER_PROGRAM == UNROLL * BLOCK_C, "a walk holds its channels in registers")
    LANES: tl.constexpr = lanes(BLOCK)
    RADIUS: tl.constexpr = TAPS // 2 if TAPS > 1 else 1
    lane = tl.arange(0, LANES)
    tiles = tile_count(input_size, BLOCK)
    tile = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles).to(tl.int64)
    q, mask = tile_index(tile, lane, input_size, BLOCK)

    input_ptr += n * input_stride_n
    grad_input_ptr += n * grad_input_stride_n
    grad_input = tuples.zeros(UNROLL, (LANES, BLOCK_C), COMPUTE)
    if FOLDS:
        scattered = scattered_ptr + n * grad_input_stride_n
        pixel_offset = offset(q, grad_input_strides, INDEX)
        grad_input = _load_channels(
            scattered, pixel_offset, grad_input_stride_c, mask, channels, BLOCK_C, UNROLL, COMPUTE
        )

    for k in range(maps):
        m = n * maps + k
        parameters = parameters_ptr + n * parameters_stride_n + k * parameters_stride_k
        coefficients = LOAD(parameters, None, None, None, input_size, output_size, ALIGN_CORNERS, COMPUTE, INDEX)
        gradients = tuples.zeros(len(coefficients), (LANES,), COMPUTE)

        first_row, last_row = ROWS(coefficients, tuples.to(q, COMPUTE), input_size, output_size, RADIUS)
        tile_rows, _ = _count_rows(first_row, last_row, mask)
        wide = tile_rows > LANES
        for turn in range(tl.where(tile_rows > 0, tl.where(wide, LANES, 1), 0)):
            # The pixel that each lane works for: its own, or the same for all.
            pixel, pixel_mask = tile_index(tile, tl.where(wide, turn, lane), input_size, BLOCK)
            position = tuples.to(pixel, COMPUTE)
            first_row, last_row = ROWS(coefficients, position, input_size, output_size, RADIUS)
            rows, shape = _count_rows(first_row, last_row, pixel_mask)
            values = ()
            if NEED_PARAMETERS:
                pixel_offset = offset(pixel, input_strides, INDEX)
                values = _load_channels(
                    input_ptr, pixel_offset, input_stride_c, pixel_mask, channels, BLOCK_C, UNROLL, COMPUTE
                )
            collected = tuples.zeros(UNROLL, (LANES, BLOCK_C), COMPUTE)
            for r in range(0, rows, tl.where(wide, LANES, 1)):
                row, in_row = _unravel_row(tl.where(wide, r + lane, r), first_row, last_row, shape)
                in_row &= pixel_mask
                u_row = centred(row, output_size[1:], COMPUTE)
                first, last = COLUMNS(coefficients, u_row, position, input_size, output_size, RADIUS)
                for step in range(tl.max(tl.where(in_row, last - first + 1, 0))):
                    column = first + step
                    u = centred((column,), output_size, COMPUTE) + u_row
                    x = TRANSFORM(coefficients, u)
                    hit = in_row & (column <= last)
                    for axis in tl.static_range(len(BLOCK)):
                        hit &= touches(x[axis], position[axis], TAPS)
                        if FOLDS and TAPS <= 2:
                            hit &= strictly_inside(x[axis], input_size[axis])
                    grad_output = _load_channels(
                        grad_output_ptr + m * grad_output_stride_n,
                        offset((column,) + row, grad_output_strides, INDEX),
                        grad_output_stride_c, hit, channels, BLOCK_C, UNROLL, COMPUTE,
                    )  # fmt: skip
                    weights, slopes = _weigh(x, position, hit, WEIGHT, WEIGHT_VJP)
                    collected = _add_scaled(collected, product(weights), grad_output)
                    if NEED_PARAMETERS:
                        # A pixel that was not read may hold infinity, and grad_output's 0 would not hide it.
                        dot = tl.where(hit, _dot(grad_output, values), 0.0)
                        grad_x = product_vjp(weights, slopes, dot)
                        gradients = tuples.add(gradients, TRANSFORM_VJP(coefficients, u, grad_x))
            if wide:
                collected = _hand_over(collected, lane == turn)
            grad_input = tuples.add(grad_input, collected)

        if NEED_PARAMETERS:
            slot = tile * tl.num_programs(1) + tl.program_id(1)
            at = gradients_ptr + n * gradients_stride_n + k * gradients_stride_k + slot * gradients_stride_slot
            LOAD_VJP(at, gradients, None, None, None, input_size, output_size, ALIGN_CORNERS, COMPUTE, INDEX)

    pixel_offset = offset(q, grad_input_strides, INDEX)
    for block in tl.static_range(UNROLL):
        c = _channels(block, BLOCK_C, UNROLL)
        tl.store(
            grad_input_ptr + block_offset(pixel_offset, c, grad_input_stride_c),
            grad_input[block].to(grad_input_ptr.dtype.element_ty),
            mask=mask[:, None] & (c < channels)[None, :],
        )


@triton.jit
def _channels(block: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr):
    """The program's channels, [BLOCK_C] of them at a time."""
    return (tl.program_id(1) * UNROLL + block) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _load_channels(
    ptr, pixel, stride_c, mask, channels, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, COMPUTE: tl.constexpr
):
    """The program's channels of some pixels: UNROLL blocks [LANES, BLOCK_C], 0 where masked."""
    blocks = ()
    for block in tl.static_range(UNROLL):
        c = _channels(block, BLOCK_C, UNROLL)
        value = tl.load(ptr + block_offset(pixel, c, stride_c), mask=mask[:, None] & (c < channels)[None, :], other=0.0)
        blocks = blocks + (value.to(COMPUTE),)
    return blocks


@triton.jit
def _add_scaled(total, scale, blocks):
    result = ()
    for block in tl.static_range(len(total)):
        result = result + (total[block] + scale[:, None] * blocks[block],)
    return result


@triton.jit
def _dot(x, y):
    """Sum over all channels, [LANES]."""
    result = tl.sum(x[0] * y[0], axis=1)
    for block in tl.static_range(1, len(x)):
        result += tl.sum(x[block] * y[block], axis=1)
    return result


@triton.jit
def _hand_over(collected, owner):
    """What all lanes collected together, given to the one lane that owns the pixel."""
    result = ()
    for block in tl.static_range(len(collected)):
        total = tl.sum(collected[block], axis=0)
        result = result + (tl.where(owner[:, None], total[None, :], 0.0),)
    return result


@triton.jit
def _count_rows(first, last, mask):
    """How many rows any of the lanes may need: in all, and along each axis (y first)."""
    count = tl.max(mask.to(tl.int32))
    shape = ()
    for axis in tl.static_range(len(first)):
        most = tl.max(tl.where(mask, last[axis] - first[axis] + 1, 0))
        count *= tl.maximum(most, 0)
        shape = shape + (most,)
    return count, shape


@triton.jit
def _unravel_row(r, first, last, shape):
    """Each lane's r-th row, as indices along y and on, and whether the lane has that many."""
    row = ()
    exists = r >= 0
    for axis in tl.static_range(len(first)):
        along = first[axis] + (r if axis == len(first) - 1 else r % shape[axis])
        exists = exists & (along <= last[axis])
        row = row + (along,)
        r = r // shape[axis]
    return row, exists


@triton.jit
def _weigh(x, q, hit, WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr):
    """Pixel q's weight and slope along each axis for a sample at x; something finite where no hit."""
    weights = ()
    slopes = ()
    for axis in tl.static_range(len(x)):
        at = tl.where(hit, x[axis], q[axis])
        weights = weights + (WEIGHT(at, q[axis]),)
        slopes = slopes + (WEIGHT_VJP(at, q[axis]),)
    return weights, slopes
