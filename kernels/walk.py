"""The backward pass from the input's side, and its change along a direction: one pass, no atomics,
the same bits every run.

    grad_input[q]     = Σ_p  weight(x(p), q) · grad_output[p]
    grad_coefficients = Σ_q Σ_p  x_vjp(p) · weight_vjp(x(p), q) · ⟨grad_output[p], input[q]⟩_channels

n: image; m: map; q: input pixel; p: output pixel, a candidate for touching q; c: channel.

One program owns a tile of *input* pixels, or several where an image has one map, and a block of channels. It visits
the output pixels that can touch them: for each map that reaches the tile a few rows, for each row a few columns,
bounded on the device by the transform's inverse. Every candidate is weighted by the forward's own expression, so
exactly the pixels that the forward read take part. Both sums come out of the same visit.

Usually each lane owns one pixel q and visits its candidates one by one, as many columns of a row as the map lets
any pixel have, or as its lanes ask for. Where a map magnifies so much that the candidates span more rows than the
tile has lanes, few pixels own nearly everything; there all lanes take turns at one pixel after another and share out
its rows. The device chooses, per map and tile.

With TANGENT, instead, what both gradients change by where the parameters move by
parameters_tangent and, with INPUT_TANGENT, the input by input_tangent: a second derivative.

With SUPERSAMPLE other than 1, the walk visits the pixels of a finer output, which are the samples; each takes
its share of the gradient of the pixel that it is in.

With fill, what weighs outside the image has the value fill[c]: the transform's gradient reads input - fill.

Under a padding mode that folds, the walk takes the samples strictly inside the image; the others
have been scattered into grad_input before, and the walk starts from what lies there.
"""

import triton
import triton.language as tl

from . import launch, tuples
from .coordinates import (
    block_mask,
    block_offset,
    centred,
    exactly,
    from_finer,
    image_start,
    lanes,
    load_block,
    load_fill,
    tile_count,
    tile_index,
)
from .division import quotient
from .interpolation import product, product_jvp, product_vjp, product_vjp_jvp, touches
from .padding import strictly_inside


@triton.jit(do_not_specialize=launch.COUNTS)
def walk_kernel(
    grad_input_ptr, scattered_ptr, gradients_ptr, grad_output_ptr,
    input_ptr, input_tangent_ptr, parameters_ptr, parameters_tangent_ptr, fill_ptr,
    output_size, input_size, units, divisors, channels, maps,
    grad_output_batch, input_batch, input_tangent_batch, parameters_batch, parameters_tangent_batch,
    grad_input_strides, gradients_strides, gradients_stride_slot, grad_output_strides,
    input_strides, input_tangent_strides, parameters_strides, parameters_tangent_strides,
    LOAD: tl.constexpr, LOAD_VJP: tl.constexpr, SHRINK: tl.constexpr, REFINE: tl.constexpr,
    TRANSFORM: tl.constexpr, TRANSFORM_JVP: tl.constexpr, TRANSFORM_VJP: tl.constexpr,
    BOUNDS: tl.constexpr, BOX: tl.constexpr, COLUMNS: tl.constexpr, MEETS: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr, TAPS: tl.constexpr,
    FOLDS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr, TANGENT: tl.constexpr, INPUT_TANGENT: tl.constexpr, SUPERSAMPLE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, CHANNELS_PER_PROGRAM: tl.constexpr,
    WHOLE: tl.constexpr, TILES: tl.constexpr, ONE_MAP: tl.constexpr,
):  # fmt: skip
    tl.static_assert(ONE_MAP or TILES == 1, "a tile's sums over maps are held in registers")
    tl.static_assert(CHANNELS_PER_PROGRAM == UNROLL * BLOCK_C, "a walk holds its channels in registers")
    LANES: tl.constexpr = lanes(BLOCK)
    RADIUS: tl.constexpr = TAPS // 2 if TAPS > 1 else 1
    FEW: tl.constexpr = BLOCK_C == 1 and UNROLL <= 4  # channels; many have no registers for what speeds these up
    lane = tl.arange(0, LANES)
    programs = tl.cdiv(tile_count(input_size, BLOCK), TILES)
    n = quotient(tl.program_id(0), divisors[0])
    program = tl.program_id(0) - n * programs
    first_tile = program * TILES
    n = n.to(tl.int64)
    input_ptr = image_start(input_ptr, n, input_batch, input_strides)
    input_tangent_ptr = image_start(input_tangent_ptr, n, input_tangent_batch, input_tangent_strides)
    parameters_ptr = image_start(parameters_ptr, n, parameters_batch, parameters_strides)
    parameters_tangent_ptr = image_start(
        parameters_tangent_ptr, n, parameters_tangent_batch, parameters_tangent_strides
    )
    grad_input_ptr += n * grad_input_strides[0]
    if FOLDS:
        scattered_ptr += n * grad_input_strides[0]
    if NEED_PARAMETERS:
        slot = tl.cast(program, INDEX) * tl.num_programs(1) + tl.program_id(1)
        gradients_ptr += n * gradients_strides[0] + slot * gradients_stride_slot
    if not ONE_MAP:
        q, mask = tile_index(first_tile, lane, input_size, divisors[1:], BLOCK)
        grad_input = _start(
            scattered_ptr, q, mask, channels, grad_input_strides, FOLDS, LANES, BLOCK_C, UNROLL, WHOLE, INDEX, COMPUTE
        )

    # Of many maps few reach a tile: lanes ask one each, and the walk goes from one that does to the next.
    for first_map in range(0, 1 if ONE_MAP else maps, LANES):
        own = first_map + lane
        meets, meeting = lane == 0, 1
        if not ONE_MAP:
            exists = own < maps
            meets = exists & MEETS(
                LOAD(
                    parameters_ptr + tl.minimum(own, maps - 1) * parameters_strides[1],
                    None, None, None, None, None, input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX, False,
                ),
                tile_index(first_tile, first_tile * 0, input_size, divisors[1:], BLOCK)[0],
                tile_index(first_tile, first_tile * 0 + LANES - 1, input_size, divisors[1:], BLOCK)[0],
                input_size, output_size, RADIUS,
            )  # fmt: skip
            meeting = tl.sum(meets.to(tl.int32))
            for i in tl.static_range(len(BLOCK) * (len(BLOCK) + 1) if NEED_PARAMETERS else 0):
                at = gradients_ptr + tl.cast(own, INDEX) * gradients_strides[1] + i
                tl.store(at, tl.zeros((LANES,), COMPUTE), mask=exists & ~meets)
        k = first_map - 1
        for _map in range(meeting):
            k = 0 if ONE_MAP else tl.min(tl.where(meets & (own > k), own, maps))
            coefficients = LOAD(
                parameters_ptr + k * parameters_strides[1],
                None, None, None, None, None, input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX, False,
            )  # fmt: skip
            tangents = ()
            if TANGENT:
                tangents = LOAD(
                    parameters_tangent_ptr + k * parameters_tangent_strides[1],
                    None, None, None, None, None, input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX, True,
                )  # fmt: skip
            per_axis = 1
            share = 1.0
            fine, fine_size = coefficients, output_size
            if SUPERSAMPLE != 1:
                per_axis = SHRINK(coefficients) if SUPERSAMPLE == 0 else SUPERSAMPLE
                fine, fine_size = REFINE(coefficients, per_axis), tuples.scale(output_size, per_axis)
                for _axis in tl.static_range(len(BLOCK)):
                    share = share / tl.cast(per_axis, COMPUTE)
            gradients = tuples.zeros(len(coefficients), (LANES,), COMPUTE)
            grad_output_map = image_start(grad_output_ptr, n * maps + k, grad_output_batch, grad_output_strides)
            lands, bounds, most_columns, upright = BOUNDS(fine, input_size, fine_size, RADIUS)
            upright &= FEW
            for tile in range(first_tile, first_tile + TILES):
                if ONE_MAP:
                    q, mask = tile_index(tile, lane, input_size, divisors[1:], BLOCK)
                    grad_input = _start(
                        scattered_ptr, q, mask, channels, grad_input_strides,
                        FOLDS, LANES, BLOCK_C, UNROLL, WHOLE, INDEX, COMPUTE,
                    )  # fmt: skip
                grad_input, gradients = _walk_tile(
                    grad_input, gradients, tile, q, mask, grad_output_map, input_ptr, input_tangent_ptr, fill_ptr,
                    coefficients, tangents, fine, fine_size, per_axis, share, lands, bounds, most_columns, upright,
                    input_size, divisors, channels, grad_output_strides, input_strides, input_tangent_strides,
                    TRANSFORM, TRANSFORM_JVP, TRANSFORM_VJP, BOX, COLUMNS, WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS,
                    FOLDS, COMPUTE, INDEX, NEED_PARAMETERS, TANGENT, INPUT_TANGENT, SUPERSAMPLE, FEW,
                    BLOCK, BLOCK_C, UNROLL, WHOLE,
                )  # fmt: skip
                if ONE_MAP:
                    _finish(
                        grad_input_ptr, grad_input, q, mask, channels, grad_input_strides, BLOCK_C, UNROLL, WHOLE, INDEX
                    )

            if NEED_PARAMETERS:
                if SUPERSAMPLE != 1:
                    gradients = tuples.scale(gradients, share)
                LOAD_VJP(
                    gradients_ptr + tl.cast(k, INDEX) * gradients_strides[1],
                    gradients, None, None, None, None, None, None,
                    input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX,
                )  # fmt: skip

    if not ONE_MAP:
        _finish(grad_input_ptr, grad_input, q, mask, channels, grad_input_strides, BLOCK_C, UNROLL, WHOLE, INDEX)


@triton.jit
def _walk_tile(
    grad_input, gradients, tile, q, mask, grad_output_ptr, input_ptr, input_tangent_ptr, fill_ptr,
    coefficients, tangents, fine, fine_size, per_axis, share, lands, bounds, most_columns, upright,
    input_size, divisors, channels, grad_output_strides, input_strides, input_tangent_strides,
    TRANSFORM: tl.constexpr, TRANSFORM_JVP: tl.constexpr, TRANSFORM_VJP: tl.constexpr,
    BOX: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr, TAPS: tl.constexpr,
    FOLDS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr, TANGENT: tl.constexpr, INPUT_TANGENT: tl.constexpr, SUPERSAMPLE: tl.constexpr,
    FEW: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What the candidates of one map add to both sums of a tile's pixels q."""
    LANES: tl.constexpr = lanes(BLOCK)
    # Candidates of a row, of which most maps have three, whose loads are under way together.
    AT_ONCE: tl.constexpr = 3 if FEW else 1
    lane = tl.arange(0, LANES)
    first, last = BOX(bounds, tuples.to(q, COMPUTE), fine_size)
    rows, shape = _count_rows(first[1:], last[1:], mask)
    wide = rows > LANES
    for turn in range(tl.where(lands & (rows > 0), tl.where(wide, LANES, 1), 0)):
        # The pixel that each lane works for: its own, or the same for all.
        pixel, pixel_mask = q, mask
        if wide:
            pixel, pixel_mask = tile_index(tile, lane * 0 + turn, input_size, divisors[1:], BLOCK)
            first, last = BOX(bounds, tuples.to(pixel, COMPUTE), fine_size)
            rows, shape = _count_rows(first[1:], last[1:], pixel_mask)
        position = tuples.to(pixel, COMPUTE)
        values = ()
        value_tangents = ()
        if NEED_PARAMETERS:
            values = _load_channels(
                input_ptr, exactly(pixel), input_strides, pixel_mask, channels,
                BLOCK_C, UNROLL, WHOLE, INDEX, COMPUTE,
            )  # fmt: skip
            if fill_ptr is not None:
                values = _subtract_fill(values, fill_ptr, channels, COMPUTE)
        if NEED_PARAMETERS and INPUT_TANGENT:
            value_tangents = _load_channels(
                input_tangent_ptr, exactly(pixel), input_tangent_strides, pixel_mask, channels,
                BLOCK_C, UNROLL, WHOLE, INDEX, COMPUTE,
            )  # fmt: skip
        collected = tuples.zeros(UNROLL, (LANES, BLOCK_C), COMPUTE)
        columns = most_columns
        if upright & (columns == 0):
            columns = tl.max(tl.where(pixel_mask, last[0] - first[0] + 1, 0))
        for r in range(0, rows, tl.where(wide, LANES, 1)):
            row, in_row = _unravel_row(tl.where(wide, r + lane, r), first[1:], last[1:], shape)
            in_row &= pixel_mask
            u_row = centred(row, fine_size[1:], COMPUTE)
            column, last_column = first[0], last[0]
            if not upright:
                column, last_column = COLUMNS(bounds, fine, u_row, position, fine_size)
            count = tl.where(in_row, last_column - column + 1, 0)
            steps = columns
            if (steps == 0) & (not upright):
                steps = tl.max(count)
            u_column = centred((column,), fine_size, COMPUTE)[0]
            start = 0
            for at_once in tl.static_range(AT_ONCE, 0, -2):  # by threes, then what is left one by one
                stop = steps // at_once * at_once
                for step in range(start, stop, at_once):
                    for further in tl.static_range(at_once):
                        collected, gradients = _visit(
                            collected, gradients, grad_output_ptr, column, count, row, u_column, u_row,
                            step, further, coefficients, tangents, position, values, value_tangents, per_axis,
                            input_size, channels, grad_output_strides,
                            TRANSFORM, TRANSFORM_JVP, TRANSFORM_VJP, WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS,
                            FOLDS, COMPUTE, INDEX, NEED_PARAMETERS, TANGENT, INPUT_TANGENT, SUPERSAMPLE,
                            BLOCK_C, UNROLL, WHOLE,
                        )  # fmt: skip
                start = stop
        if SUPERSAMPLE != 1:
            collected = tuples.scale(collected, share)
        if wide:
            collected = _hand_over(collected, lane == turn)
        grad_input = tuples.add(grad_input, collected)
    return grad_input, gradients


@triton.jit
def _visit(
    collected, gradients, grad_output_ptr, column, count, row, u_column, u_row,
    step, further: tl.constexpr, coefficients, tangents, position, values, value_tangents, per_axis,
    input_size, channels, grad_output_strides,
    TRANSFORM: tl.constexpr, TRANSFORM_JVP: tl.constexpr, TRANSFORM_VJP: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr, TAPS: tl.constexpr,
    FOLDS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr, TANGENT: tl.constexpr, INPUT_TANGENT: tl.constexpr, SUPERSAMPLE: tl.constexpr,
    BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What the candidate in column + step + further of each pixel's row adds to both sums."""
    DIMS: tl.constexpr = len(position)
    LANES: tl.constexpr = position[0].shape[0]
    u = (u_column + tl.cast(step + further, COMPUTE),) + u_row
    place = ((column,) + row, (tl.cast(step, tl.int64) + further,) + exactly(row)[1])
    if SUPERSAMPLE != 1:
        u = from_finer(u, per_axis)
        place = exactly(tuples.floor_divide((column + step + further,) + row, per_axis))
    x = TRANSFORM(coefficients, u, input_size)
    hit = step + further < count
    for axis in tl.static_range(DIMS):
        hit &= touches(x[axis], position[axis], TAPS)
    if FOLDS and TAPS <= 2:
        hit &= strictly_inside(x, input_size)
    grad_output = _load_channels(
        grad_output_ptr, place, grad_output_strides, hit, channels, BLOCK_C, UNROLL, WHOLE, INDEX, COMPUTE
    )
    # A candidate that is no hit gets numbers that are finite, and grad_output's 0.
    x = tuples.where(hit, x, position)
    weights, slopes = _along(x, position, WEIGHT), _along(x, position, WEIGHT_VJP)
    curvatures = ()
    t = ()
    weight = product(weights)
    if TANGENT:
        curvatures = _along(x, position, WEIGHT_CURVATURE)
        t = tuples.where(hit, TRANSFORM_JVP(coefficients, tangents, u), tuples.zeros(DIMS, (LANES,), COMPUTE))
        weight = product_jvp(weights, slopes, t)
    collected = _add_scaled(collected, weight, grad_output)
    if NEED_PARAMETERS:
        # A pixel that was not read may hold infinity, and grad_output's 0 would not hide it.
        dot = tl.where(hit, _dot(grad_output, values), 0.0)
        if TANGENT:
            grad_x = product_vjp_jvp(weights, slopes, curvatures, t, dot)
        else:
            grad_x = product_vjp(weights, slopes, dot)
        if INPUT_TANGENT:
            dot = tl.where(hit, _dot(grad_output, value_tangents), 0.0)
            grad_x = tuples.add(grad_x, product_vjp(weights, slopes, dot))
        gradients = tuples.add(gradients, TRANSFORM_VJP(coefficients, u, grad_x))
    return collected, gradients


@triton.jit
def _start(
    scattered_ptr, q, mask, channels, strides,
    FOLDS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What pixels q have before the walk: what was scattered there, or nothing."""
    if FOLDS:
        return _load_channels(
            scattered_ptr, exactly(q), strides, mask, channels, BLOCK_C, UNROLL, WHOLE, INDEX, COMPUTE
        )
    else:
        return tuples.zeros(UNROLL, (LANES, BLOCK_C), COMPUTE)


@triton.jit
def _finish(
    grad_input_ptr, grad_input, q, mask, channels, strides,
    BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    for block in tl.static_range(UNROLL):
        c = _channels(block, BLOCK_C, UNROLL)
        tl.store(
            grad_input_ptr + block_offset(q, c, strides, INDEX),
            grad_input[block].to(grad_input_ptr.dtype.element_ty),
            mask=block_mask(mask, c, channels, WHOLE),
        )


@triton.jit
def _channels(block: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr):
    """The program's channels, [BLOCK_C] of them at a time."""
    return (tl.program_id(1) * UNROLL + block) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _load_channels(
    ptr, place, strides, mask, channels,
    BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The program's channels of some pixels: UNROLL blocks [LANES, BLOCK_C], 0 where masked."""
    blocks = ()
    for block in tl.static_range(UNROLL):
        c = _channels(block, BLOCK_C, UNROLL)
        in_block = block_mask(mask, c, channels, WHOLE)
        channel_ptr = ptr
        if BLOCK_C == 1 and UNROLL > 4:
            # A pointer for all pixels and candidates, and no sum of offsets for each; of few channels that is no less.
            channel_ptr += (tl.program_id(1) * UNROLL + block).to(tl.int64) * strides[1]
            c *= 0
        blocks = blocks + (load_block(channel_ptr, place, c, strides, in_block, INDEX, COMPUTE),)
    return blocks


@triton.jit
def _subtract_fill(blocks, fill_ptr, channels, COMPUTE: tl.constexpr):
    result = ()
    for block in tl.static_range(len(blocks)):
        c = _channels(block, blocks[0].shape[1], len(blocks))
        result = result + (blocks[block] - load_fill(fill_ptr, c, channels, COMPUTE),)
    return result


@triton.jit
def _add_scaled(total, scale, blocks):
    result = ()
    for block in tl.static_range(len(total)):
        result = result + (total[block] + scale[:, None] * blocks[block],)
    return result


@triton.jit
def _dot(x, y):
    """Sum over all channels, [LANES]: over threads once, and not for each block."""
    result = x[0] * y[0]
    for block in tl.static_range(1, len(x)):
        result += x[block] * y[block]
    return tl.sum(result, axis=1)


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
    count = 1
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
    exists = True
    for axis in tl.static_range(len(first)):
        along = first[axis] + (r if axis == len(first) - 1 else r % shape[axis])
        exists = (along <= last[axis]) & exists
        row = row + (along,)
        r = r // shape[axis]
    return row, exists


@triton.jit
def _along(x, q, FUNCTION: tl.constexpr):
    """A weight or one of its derivatives along each axis."""
    result = ()
    for axis in tl.static_range(len(x)):
        result = result + (FUNCTION(x[axis], q[axis]),)
    return result
