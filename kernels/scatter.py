"""The backward pass from the output's side, and its change along a direction.

One program owns a tile of output pixels of one map. It adds grad_input by atomics, and reduces the
gradient of the transform's coefficients to one partial sum. With LOOP, it owns every so many-th tile of a
map, and adds all of them up in registers: so one slot for each program stays small, and sums over lanes are few.
It serves what the walk does not:

    FOLDED_ONLY  samples that a padding mode folds back into the image, before the walk
    otherwise    maps that no walk serves; and the transform's gradient alone, a pure reduction with NEED_INPUT off

With fill, what weighs outside the image has the value fill[c]. That changes the transform's gradient alone:
there the image counts as input - fill, and the fill's part of it is that of the sample's coverage.

With SUPERSAMPLE other than 1, a program takes one sample of all its pixels after the other.

With TANGENT, instead, what both gradients change by where the parameters move by
parameters_tangent and, with INPUT_TANGENT, the input by input_tangent: a second derivative.

Where lanes side by side have corners in common, one of them adds what falls there for both.

Atomics are fp32 or fp64, never 16-bit: those become compare-and-swap loops on every architecture.
With FIXED they are 64-bit integers, multiples of 1 / scale[n]: integer sums do not depend on their order.
With MEASURE nothing is added: scale[n] becomes the largest magnitude of what would be.
"""

import triton
import triton.language as tl

from . import launch, tuples
from .coordinates import (
    block_mask,
    centred,
    corner_pointers,
    exactly,
    image_start,
    lanes,
    load_block,
    load_fill,
    tile_count,
    tile_index,
)
from .division import quotient
from .interpolation import corner, coverage, loops, product, product_jvp, product_vjp, product_vjp_jvp, taps_along
from .padding import pass_padding, strictly_inside
from .sampling import load_once, look, map_chain, power, sample_place, samples_per_axis, uncentred, with_fields


@triton.jit(do_not_specialize=launch.COUNTS)
def scatter_kernel(
    grad_input_ptr, scale_ptr, gradients_ptr, grad_output_ptr,
    input_ptr, input_tangent_ptr, parameters_ptr, parameters_tangent_ptr, field_ptr, grad_field_ptr, fill_ptr,
    links, chain, output_size, input_size, units, divisors, channels, maps,
    grad_output_batch, input_batch, input_tangent_batch, parameters_batch, parameters_tangent_batch,
    grad_input_strides, gradients_strides, gradients_stride_slot, slots, grad_output_strides,
    input_strides, input_tangent_strides, parameters_strides, parameters_tangent_strides,
    LOAD: tl.constexpr, LOAD_VJP: tl.constexpr, ONCE: tl.constexpr, SHRINK: tl.constexpr,
    TRANSFORM: tl.constexpr, TRANSFORM_JVP: tl.constexpr, TRANSFORM_VJP: tl.constexpr,
    TRANSFORM_VJP_JVP: tl.constexpr,
    PADDING: tl.constexpr, PADDING_VJP: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr, TAPS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    FOLDED_ONLY: tl.constexpr, FIXED: tl.constexpr, MEASURE: tl.constexpr,
    NEED_INPUT: tl.constexpr, NEED_PARAMETERS: tl.constexpr,
    TANGENT: tl.constexpr, INPUT_TANGENT: tl.constexpr, SUPERSAMPLE: tl.constexpr, LOOP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, CHANNELS_PER_PROGRAM: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    ORDER: tl.constexpr = (1 if NEED_PARAMETERS else 0) + (1 if TANGENT else 0)
    VARIES: tl.constexpr = SUPERSAMPLE == 0 and SHRINK is None  # how many samples, from pixel to pixel
    # A chain adds the gradients of its numbers itself, sample by sample.
    SUMS: tl.constexpr = (SUPERSAMPLE != 1 or LOOP) and len(links) == 0
    COEFFICIENTS: tl.constexpr = len(BLOCK) * (len(BLOCK) + 1) if SHRINK is not None else (len(BLOCK) + 1) ** 2
    chain = with_fields(chain, field_ptr, grad_field_ptr)
    tiles = tile_count(output_size, BLOCK)
    programs = slots if LOOP else tiles  # each has a slot, but those of a chain
    m = quotient(tl.program_id(0), divisors[0])
    n = quotient(m, divisors[1])
    k = m - n * maps
    program = tl.program_id(0) - m * programs
    m, n, k = m.to(tl.int64), n.to(tl.int64), k.to(tl.int64)

    input_ptr = image_start(input_ptr, n, input_batch, input_strides)
    input_tangent_ptr = image_start(input_tangent_ptr, n, input_tangent_batch, input_tangent_strides)
    grad_output_ptr = image_start(grad_output_ptr, m, grad_output_batch, grad_output_strides)
    if NEED_INPUT and not MEASURE:
        grad_input_ptr += n * grad_input_strides[0]
    scale = tl.load(scale_ptr + n) if FIXED else 1.0
    largest = tl.zeros((lanes(BLOCK), BLOCK_C), COMPUTE)
    start = tl.program_id(1) * CHANNELS_PER_PROGRAM
    stop = tl.minimum(start + CHANNELS_PER_PROGRAM, channels)
    numbers = image_start(parameters_ptr, n, parameters_batch, parameters_strides) + k * parameters_strides[1]
    slot = program * tl.num_programs(1) + tl.program_id(1)
    if len(links) > 0:
        slot = slot % slots  # programs of a chain share them
    if NEED_PARAMETERS:
        gradients_ptr += n * gradients_strides[0] + k * gradients_strides[1] + slot * gradients_stride_slot
    if NEED_PARAMETERS and SUMS:
        gradients = tuples.zeros(COEFFICIENTS, (lanes(BLOCK),), COMPUTE)
    held = load_once(
        numbers, parameters_strides, output_size, input_size, units, LOAD, ONCE, ALIGN_CORNERS, COMPUTE, INDEX
    )
    for turn in range(tl.cdiv(tiles - program, programs) if LOOP else 1):
        # Not carried from turn to turn: Triton 3.6 would look for folded samples in the first tile alone.
        tile = program + turn * programs
        p, mask = tile_index(tile, tl.arange(0, lanes(BLOCK)), output_size, divisors[2:], BLOCK)
        per_axis = SUPERSAMPLE
        if SUPERSAMPLE == 0:
            per_axis = samples_per_axis(
                numbers, links, chain, n, k, p, mask, output_size, input_size, units,
                parameters_strides, LOAD, TRANSFORM, SHRINK, ALIGN_CORNERS, COMPUTE, INDEX,
            )  # fmt: skip
        count = power(per_axis, len(BLOCK)) if SUPERSAMPLE == 0 else SUPERSAMPLE ** len(BLOCK)
        share = 1.0 / tl.cast(count, COMPUTE)
        for sample in range(tl.max(count) if VARIES else count):
            place = p
            u = centred(p, output_size, COMPUTE) if SUPERSAMPLE == 1 else ()
            if SUPERSAMPLE != 1:
                u = sample_place(p, sample, per_axis, output_size, COMPUTE)
                place = uncentred(u, output_size, COMPUTE)
            coefficients, tangents, x, t = look(
                numbers, parameters_tangent_ptr, links, chain, n, k, held, place, u, mask,
                output_size, input_size, units,
                parameters_tangent_batch, parameters_strides, parameters_tangent_strides,
                LOAD, TRANSFORM, TRANSFORM_JVP, PADDING_VJP, TAPS, TANGENT, ALIGN_CORNERS, COMPUTE, INDEX,
            )  # fmt: skip
            wanted = mask & (sample < count) if VARIES else mask
            grad_x, held_grad_x, fill_dot, largest = _visit(
                grad_input_ptr, grad_output_ptr, input_ptr, input_tangent_ptr, fill_ptr, largest, scale,
                p, x, t, wanted, share, start, stop, channels, input_size,
                grad_input_strides, grad_output_strides, input_strides, input_tangent_strides,
                PADDING, WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, ALIGN_CORNERS, COMPUTE, INDEX,
                FOLDED_ONLY, FIXED, MEASURE, NEED_INPUT, NEED_PARAMETERS,
                TANGENT, TRANSFORM_VJP_JVP is not None, INPUT_TANGENT, VARIES, SUPERSAMPLE,
                BLOCK, BLOCK_C, UNROLL, WHOLE,
            )  # fmt: skip
            if NEED_PARAMETERS:
                if fill_ptr is not None:
                    weights, slopes, curvatures = coverage(
                        x, input_size, WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, ORDER
                    )
                    if TANGENT:
                        grad_x = tuples.add(grad_x, product_vjp_jvp(weights, slopes, curvatures, t, -fill_dot))
                        if TRANSFORM_VJP_JVP is not None:
                            held_grad_x = tuples.add(held_grad_x, product_vjp(weights, slopes, -fill_dot))
                    else:
                        grad_x = tuples.add(grad_x, product_vjp(weights, slopes, -fill_dot))
                grad_x = pass_padding(grad_x, x, input_size, PADDING_VJP, TAPS, ALIGN_CORNERS)
                change = TRANSFORM_VJP(coefficients, u, grad_x)
                if TANGENT and TRANSFORM_VJP_JVP is not None:
                    held_grad_x = pass_padding(held_grad_x, x, input_size, PADDING_VJP, TAPS, ALIGN_CORNERS)
                    change = tuples.add(change, TRANSFORM_VJP_JVP(coefficients, tangents, u, held_grad_x))
                if SUMS:
                    gradients = tuples.add(gradients, change)
                else:
                    LOAD_VJP(
                        gradients_ptr, change, gradients_strides[2:], numbers, links, map_chain(chain, numbers, n, k),
                        place, mask, input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX,
                    )  # fmt: skip

    if MEASURE:
        tl.atomic_max(scale_ptr + n, tl.max(largest))
    if NEED_PARAMETERS and SUMS:
        LOAD_VJP(
            gradients_ptr, gradients, gradients_strides[2:], numbers, links, chain,
            None, None, input_size, output_size, units, ALIGN_CORNERS, COMPUTE, INDEX,
        )  # fmt: skip


@triton.jit
def _visit(
    grad_input_ptr, grad_output_ptr, input_ptr, input_tangent_ptr, fill_ptr, largest, scale,
    p, x, t, wanted, share, start, stop, channels, input_size,
    grad_input_strides, grad_output_strides, input_strides, input_tangent_strides,
    PADDING: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr,
    TAPS: tl.constexpr, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    FOLDED_ONLY: tl.constexpr, FIXED: tl.constexpr, MEASURE: tl.constexpr,
    NEED_INPUT: tl.constexpr, NEED_PARAMETERS: tl.constexpr,
    TANGENT: tl.constexpr, HOLDS: tl.constexpr, INPUT_TANGENT: tl.constexpr,
    VARIES: tl.constexpr, SUPERSAMPLE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One sample of each pixel p, at x, channel by channel and corner by corner: what it gives to grad_input is added
    there, or measured, and the gradient of where it looks comes back, with HOLDS also that of where it is, what fill
    is worth in it, and the largest.
    """
    DIMS: tl.constexpr = len(p)
    LANES: tl.constexpr = p[0].shape[0]
    AXES: tl.constexpr = DIMS - loops(DIMS, TAPS)  # whose taps are all at hand
    ORDER: tl.constexpr = (1 if NEED_PARAMETERS else 0) + (1 if TANGENT else 0)
    taps = taps_along(
        x[:AXES], input_size, 0, PADDING, ALIGN_CORNERS,
        WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, TAPS, ORDER,
    )  # fmt: skip
    if FOLDED_ONLY and TAPS <= 2:
        wanted &= ~strictly_inside(x, input_size)
    # Where a lane's left corners are the right ones of the lane before it, it adds both: half the atomics. Lanes of a
    # warp pass numbers on in one instruction; those of longer rows would have to by shared memory.
    SHARES: tl.constexpr = (
        NEED_INPUT and not FIXED and not MEASURE and TAPS == 2 and BLOCK_C == 1 and BLOCK[0] > 1 and BLOCK[0] <= 32
    )
    takes, gives = wanted, wanted
    if SHARES:
        takes, gives = _shared(taps, wanted, BLOCK)
    grad_x = tuples.zeros(DIMS, (LANES,), COMPUTE)
    held_grad_x = grad_x  # of the samples where they are, for a map that bends
    fill_dot = tl.zeros((LANES,), COMPUTE)
    if FOLDED_ONLY:  # most tiles hold no such sample at all
        stop = tl.where(tl.max(wanted.to(tl.int32)) > 0, stop, start)
    # An atomic waits for what it adds, and all loads behind it wait with it. So all loads come before all atomics; of a
    # cubic sample's corners, so many that registers run out, behind them.
    READS_FIRST: tl.constexpr = TAPS <= 2
    # Of few corners, the products with grad_output are added up over all channels first: by each thread over those that
    # it loads at once, and over threads at the end.
    DOTS: tl.constexpr = TAPS <= 2 and NEED_PARAMETERS
    AT_ONCE: tl.constexpr = min(BLOCK_C, 128 // grad_output_ptr.dtype.element_ty.primitive_bitwidth)
    dots = tuples.zeros(TAPS**AXES if DOTS else 0, (LANES, BLOCK_C // AT_ONCE), COMPUTE)
    tangent_dots = dots if INPUT_TANGENT else ()
    for first in range(start, stop, UNROLL * BLOCK_C):
        grad_outputs = ()
        for block in tl.static_range(UNROLL):
            c = first + block * BLOCK_C + tl.arange(0, BLOCK_C)
            in_block = block_mask(wanted, c, channels, WHOLE)
            grad_output = load_block(grad_output_ptr, exactly(p), c, grad_output_strides, in_block, INDEX, COMPUTE)
            if VARIES:
                grad_output *= share[:, None]
            elif SUPERSAMPLE != 1:
                grad_output *= share
            grad_outputs = grad_outputs + (grad_output,)
        if NEED_INPUT and not READS_FIRST:
            largest = _add(
                grad_input_ptr, grad_outputs, largest, scale, x, t, taps, wanted, takes, gives, first, channels,
                input_size, grad_input_strides,
                PADDING, WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, ALIGN_CORNERS, INDEX,
                FOLDED_ONLY, FIXED, MEASURE, TANGENT, SHARES, AXES, ORDER, BLOCK, BLOCK_C, WHOLE,
            )  # fmt: skip
        for block in tl.static_range(UNROLL if NEED_PARAMETERS else 0):
            c = first + block * BLOCK_C + tl.arange(0, BLOCK_C)
            grad_output = grad_outputs[block]
            if fill_ptr is not None:
                fill_dot += tl.sum(load_fill(fill_ptr, c, channels, COMPUTE) * grad_output, axis=1)
            for plane in range(1 if DIMS == AXES else TAPS):
                last_taps = taps_along(
                    x[AXES:], input_size[AXES:], plane, PADDING, ALIGN_CORNERS,
                    WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, 1, ORDER,
                )  # fmt: skip
                for corner_id in tl.static_range(TAPS**AXES):
                    weights, slopes, curvatures, where, inside, direct = corner(
                        taps + last_taps, corner_id, TAPS, ORDER
                    )
                    if FOLDED_ONLY and TAPS > 2:  # a cubic sample folds tap by tap
                        inside &= ~direct
                    corner_mask = block_mask(inside & wanted, c, channels, WHOLE)
                    value = load_block(input_ptr, where, c, input_strides, corner_mask, INDEX, COMPUTE)
                    dot = _some(value * grad_output, AT_ONCE)
                    tangent_dot = dot
                    if INPUT_TANGENT:
                        value = load_block(
                            input_tangent_ptr, where, c, input_tangent_strides, corner_mask, INDEX, COMPUTE
                        )
                        tangent_dot = _some(value * grad_output, AT_ONCE)
                    if DOTS:
                        dots = _add_at(dots, corner_id, dot)
                        if INPUT_TANGENT:
                            tangent_dots = _add_at(tangent_dots, corner_id, tangent_dot)
                    else:
                        grad_x, held_grad_x = _slopes(
                            grad_x, held_grad_x, weights, slopes, curvatures, t, dot, tangent_dot,
                            TANGENT, HOLDS, INPUT_TANGENT,
                        )  # fmt: skip
        if NEED_INPUT and READS_FIRST:
            largest = _add(
                grad_input_ptr, grad_outputs, largest, scale, x, t, taps, wanted, takes, gives, first, channels,
                input_size, grad_input_strides,
                PADDING, WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, ALIGN_CORNERS, INDEX,
                FOLDED_ONLY, FIXED, MEASURE, TANGENT, SHARES, AXES, ORDER, BLOCK, BLOCK_C, WHOLE,
            )  # fmt: skip
    if DOTS:
        for corner_id in tl.static_range(TAPS**AXES):
            weights, slopes, curvatures, _where, _inside, _direct = corner(taps, corner_id, TAPS, ORDER)
            grad_x, held_grad_x = _slopes(
                grad_x, held_grad_x, weights, slopes, curvatures, t,
                dots[corner_id], tangent_dots[corner_id] if INPUT_TANGENT else dots[corner_id],
                TANGENT, HOLDS, INPUT_TANGENT,
            )  # fmt: skip
    return grad_x, held_grad_x, fill_dot, largest


@triton.jit
def _add(
    grad_input_ptr, grad_outputs, largest, scale, x, t, taps, wanted, takes, gives, first, channels,
    input_size, strides,
    PADDING: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr,
    TAPS: tl.constexpr, ALIGN_CORNERS: tl.constexpr, INDEX: tl.constexpr,
    FOLDED_ONLY: tl.constexpr, FIXED: tl.constexpr, MEASURE: tl.constexpr, TANGENT: tl.constexpr, SHARES: tl.constexpr,
    AXES: tl.constexpr, ORDER: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What a sample of each pixel gives to the channels of grad_input from the first on, added there corner by corner.
    The largest comes back: with MEASURE, which adds nothing, of those so far.
    """
    for block in tl.static_range(len(grad_outputs)):
        c = first + block * BLOCK_C + tl.arange(0, BLOCK_C)
        grad_output = grad_outputs[block]
        for plane in range(1 if len(x) == AXES else TAPS):
            last_taps = taps_along(
                x[AXES:], input_size[AXES:], plane, PADDING, ALIGN_CORNERS,
                WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, 1, ORDER,
            )  # fmt: skip
            for corner_id in tl.static_range(TAPS**AXES):
                weights, slopes, _, where, inside, direct = corner(taps + last_taps, corner_id, TAPS, ORDER)
                if FOLDED_ONLY and TAPS > 2:
                    inside &= ~direct
                weight = product_jvp(weights, slopes, t) if TANGENT else product(weights)
                added = weight[:, None] * grad_output
                if MEASURE:
                    size = tl.where(block_mask(inside & wanted, c, channels, WHOLE), tl.abs(added), 0.0)
                    largest = tl.maximum(largest, tl.where(size < float("inf"), size, float("inf")))
                else:
                    adds = wanted
                    if SHARES and corner_id % 2 == 0:
                        right, right_slopes, _, _where, _inside, _direct = corner(
                            taps + last_taps, corner_id + 1, TAPS, ORDER
                        )
                        weight = product_jvp(right, right_slopes, t) if TANGENT else product(right)
                        if TANGENT:  # which may not be finite where nothing is wanted
                            added = tl.where(wanted[:, None], added, 0.0)
                        passed = _neighbour(weight[:, None] * grad_output, -1, BLOCK)
                        added += tl.where(takes[:, None], passed, 0.0)
                        adds = wanted | takes
                    elif SHARES:
                        adds = wanted & ~gives
                    tl.atomic_add(
                        corner_pointers(grad_input_ptr, where, c, strides, INDEX),
                        tl.floor(added * scale + 0.5).to(tl.int64) if FIXED else added,
                        mask=block_mask(inside & adds, c, channels, WHOLE),
                        sem="relaxed",
                    )
    return largest


@triton.jit
def _add_at(numbers, place: tl.constexpr, more):
    """A tuple with more at one place."""
    result = ()
    for i in tl.static_range(len(numbers)):
        result = result + (numbers[i] + more if i == place else numbers[i],)
    return result


@triton.jit
def _some(x, AT_ONCE: tl.constexpr):
    """[LANES, BLOCK_C] → sums over so many neighbours."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // AT_ONCE, AT_ONCE)), axis=2)


@triton.jit
def _slopes(
    grad_x, held_grad_x, weights, slopes, curvatures, t, dot, tangent_dot,
    TANGENT: tl.constexpr, HOLDS: tl.constexpr, INPUT_TANGENT: tl.constexpr,
):  # fmt: skip
    """The gradients of where a sample looks, and with HOLDS of where it is, with those that come over one corner: dot
    is the corner's pixel times grad_output, by parts of the channels, tangent_dot that of the pixel's tangent.
    """
    dot = tl.sum(dot, axis=1)
    if INPUT_TANGENT:
        tangent_dot = tl.sum(tangent_dot, axis=1)
    if TANGENT:
        grad_x = tuples.add(grad_x, product_vjp_jvp(weights, slopes, curvatures, t, dot))
        if HOLDS:
            held_grad_x = tuples.add(held_grad_x, product_vjp(weights, slopes, dot))
    else:
        grad_x = tuples.add(grad_x, product_vjp(weights, slopes, dot))
    if INPUT_TANGENT:
        grad_x = tuples.add(grad_x, product_vjp(weights, slopes, tangent_dot))
    return grad_x, held_grad_x


@triton.jit
def _shared(taps, wanted, BLOCK: tl.constexpr):
    """Whether each lane's left corners are the right ones of the lane before it in its row, which wants them added,
    and whether its right ones are the left ones of the lane after it.
    """
    x = taps[0][3][0]
    column = tl.arange(0, x.shape[0]) % BLOCK[0]
    takes = (column > 0) & (_neighbour(x, -1, BLOCK) + 1 == x) & (_neighbour(wanted.to(tl.int32), -1, BLOCK) > 0)
    for axis in tl.static_range(1, len(taps)):
        y = taps[axis][3][0]
        takes &= _neighbour(y, -1, BLOCK) == y
    gives = (column < BLOCK[0] - 1) & (_neighbour(takes.to(tl.int32), 1, BLOCK) > 0)
    return takes, gives


@triton.jit
def _neighbour(x, step: tl.constexpr, BLOCK: tl.constexpr):
    """What the lane so many columns further has; of columns beyond the tile, what its last or first has."""
    rows = tl.reshape(x, (x.shape[0] // BLOCK[0], BLOCK[0]))
    column = tl.minimum(tl.maximum(tl.arange(0, BLOCK[0]) + step, 0), BLOCK[0] - 1)
    return tl.reshape(tl.gather(rows, tl.broadcast_to(column[None, :], rows.shape), 1), x.shape)
