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
from .coordinates import along_channels, along_pixels, block_offset, centred, lanes, offset, tile_count, tile_index
from .interpolation import product, product_vjp, touches
from .transforms import store_gradients


@triton.jit(do_not_specialize=["output_size", "input_size", "maps", "slots", "first_slot"])
def walk_kernel(
    grad_input_ptr, partials_ptr, grad_output_ptr, input_ptr, scattered_ptr, parameters_ptr,
    output_size, input_size, channels, maps, slots, first_slot,
    grad_input_stride_n, grad_input_stride_c, grad_input_strides,
    grad_output_stride_n, grad_output_stride_c, grad_output_strides,
    input_stride_n, input_stride_c, input_strides,
    LOAD: tl.constexpr, LOAD_VJP: tl.constexpr, TRANSFORM: tl.constexpr, TRANSFORM_VJP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARAMETERS: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, TAPS: tl.constexpr, FOLDS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, CHANNELS_LAST: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    tl.static_assert(CHANNELS_PER_PROGRAM == BLOCK_C, "a walk holds its channels in registers")
    LANES: tl.constexpr = lanes(BLOCK)
    RADIUS: tl.constexpr = TAPS // 2 if TAPS > 1 else 1
    lane = tl.arange(0, LANES)
    tiles = tile_count(input_size, BLOCK)
    tile = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles).to(tl.int64)
    q, mask = tile_index(tile, lane, input_size, BLOCK)

    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = along_channels(c < channels, CHANNELS_LAST)
    own_mask = along_pixels(mask, CHANNELS_LAST) & in_channels  # [BLOCK_C, LANES], or transposed
    input_ptr += n * input_stride_n
    grad_input_ptr += n * grad_input_stride_n
    grad_input = tl.zeros(own_mask.shape, COMPUTE)
    if FOLDS:
        own = block_offset(offset(q, grad_input_strides, INDEX), c, grad_input_stride_c, CHANNELS_LAST)
        grad_input += tl.load(scattered_ptr + n * grad_input_stride_n + own, mask=own_mask, other=0.0).to(COMPUTE)

    for k in range(maps):
        m = n * maps + k
        coefficients = LOAD(parameters_ptr + m * PARAMETERS, input_size, output_size, ALIGN_CORNERS, COMPUTE)
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
            values = 0.0
            if NEED_PARAMETERS:
                values = tl.load(
                    input_ptr + block_offset(offset(pixel, input_strides, INDEX), c, input_stride_c, CHANNELS_LAST),
                    mask=along_pixels(pixel_mask, CHANNELS_LAST) & in_channels,
                    other=0.0,
                ).to(COMPUTE)
            collected = tl.zeros(own_mask.shape, COMPUTE)
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
                        if FOLDS:
                            hit &= (x[axis] > 0) & (x[axis] < (input_size[axis] - 1).to(COMPUTE))
                    p = offset((column,) + row, grad_output_strides, INDEX)
                    grad_output = tl.load(
                        grad_output_ptr
                        + m * grad_output_stride_n
                        + block_offset(p, c, grad_output_stride_c, CHANNELS_LAST),
                        mask=along_pixels(hit, CHANNELS_LAST) & in_channels,
                        other=0.0,
                    ).to(COMPUTE)
                    weights, slopes = _weigh(x, position, hit, WEIGHT, WEIGHT_VJP)
                    collected += along_pixels(product(weights), CHANNELS_LAST) * grad_output
                    if NEED_PARAMETERS:
                        dot = tl.sum(grad_output * values, axis=1 if CHANNELS_LAST else 0)
                        grad_x = product_vjp(weights, slopes, dot)
                        gradients = tuples.add(gradients, TRANSFORM_VJP(coefficients, u, grad_x))
            if wide:
                total = tl.sum(collected, axis=0 if CHANNELS_LAST else 1)
                theirs = along_pixels(lane == turn, CHANNELS_LAST)
                collected = tl.where(theirs, along_channels(total, CHANNELS_LAST), 0.0)
            grad_input += collected

        if NEED_PARAMETERS:
            slot = m * slots + first_slot + tile * tl.num_programs(1) + tl.program_id(1)
            partials = partials_ptr + slot * PARAMETERS
            store_gradients(partials, gradients, LOAD_VJP, input_size, output_size, ALIGN_CORNERS, COMPUTE)

    own = block_offset(offset(q, grad_input_strides, INDEX), c, grad_input_stride_c, CHANNELS_LAST)
    tl.store(grad_input_ptr + own, grad_input.to(grad_input_ptr.dtype.element_ty), mask=own_mask)


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
