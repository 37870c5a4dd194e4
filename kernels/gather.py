"""The forward pass, and its change along a direction: read the input where the transform looks.

    output[m, c, p] = Σ_q  Π_axis weight(x(p), q) · input[n, c, q],   x = padding(T_m(p))

n: image; m: map, one per output image, k the map's number among the `maps` of one image; c: channel;
p: output pixel; q: input pixel, one of the TAPS ** dims that x touches.

With fill, what weighs outside the image has the value fill[c]; with coverage, the share of the weights
that lies inside, before padding, is stored beside the output.

With TANGENT, instead, what the output changes by where the parameters move by parameters_tangent
and, with INPUT_TANGENT, the input by input_tangent.

With SUPERSAMPLE other than 1, an output pixel is the average of that many samples along each axis (0: as
many as the map shrinks). With PROJECT, it is the sum or the average of the samples of a volume along its
depth, or the index of the largest, and a program loops over the depth.

One program owns a tile of output pixels of one map and walks over channels, or TILES of them where it holds all of its
channels at once: coordinates, weights and offsets are computed once. No coordinate is ever stored.
"""

import triton
import triton.language as tl

from . import launch, stages, tiling, tuples
from .coordinates import (
    block_mask,
    block_offset,
    centred,
    image_start,
    lanes,
    load_block,
    load_fill,
    offset,
    tile_count,
    tile_index,
)
from .division import divisor, quotient
from .interpolation import corner, coverage, loops, product, product_jvp, taps_along
from .sampling import load_once, look, power, sample_place, samples_per_axis, uncentred, with_fields


@triton.jit(do_not_specialize=launch.COUNTS)
def gather_kernel(
    output_ptr, input_ptr, input_tangent_ptr, parameters_ptr, parameters_tangent_ptr, field_ptr, fill_ptr, coverage_ptr,
    links, chain, output_size, input_size, units, divisors, channels, maps,
    input_batch, input_tangent_batch, parameters_batch, parameters_tangent_batch,
    output_strides, input_strides, input_tangent_strides, parameters_strides, parameters_tangent_strides,
    coverage_strides,
    LOAD: tl.constexpr, ONCE: tl.constexpr, TRANSFORM: tl.constexpr, TRANSFORM_JVP: tl.constexpr, SHRINK: tl.constexpr,
    PADDING: tl.constexpr, PADDING_VJP: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr, TAPS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    TANGENT: tl.constexpr, INPUT_TANGENT: tl.constexpr, SUPERSAMPLE: tl.constexpr, PROJECT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, CHANNELS_PER_PROGRAM: tl.constexpr,
    WHOLE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    DIMS: tl.constexpr = len(input_size)
    AXES: tl.constexpr = DIMS - loops(DIMS, TAPS)  # whose taps are all at hand
    ORDER: tl.constexpr = 1 if TANGENT else 0
    PROJECTS: tl.constexpr = PROJECT != ""
    VARIES: tl.constexpr = SUPERSAMPLE == 0 and SHRINK is None  # from pixel to pixel
    COVERS: tl.constexpr = fill_ptr is not None or coverage_ptr is not None
    SINGLE: tl.constexpr = SUPERSAMPLE == 1 and not PROJECTS  # one sample makes a pixel
    chain = with_fields(chain, field_ptr, None)
    m = quotient(tl.program_id(0), divisors[0])
    n = quotient(m, divisors[1])
    k = m - n * maps
    first_tile = (tl.program_id(0) - m * tl.cdiv(tile_count(output_size, BLOCK), TILES)) * TILES
    m, n, k = m.to(tl.int64), n.to(tl.int64), k.to(tl.int64)
    input_ptr = image_start(input_ptr, n, input_batch, input_strides)
    input_tangent_ptr = image_start(input_tangent_ptr, n, input_tangent_batch, input_tangent_strides)
    output_ptr += m * output_strides[0]
    numbers = image_start(parameters_ptr, n, parameters_batch, parameters_strides) + k * parameters_strides[1]
    held = load_once(
        numbers, parameters_strides, output_size, input_size, units, LOAD, ONCE, ALIGN_CORNERS, COMPUTE, INDEX
    )
    start = tl.program_id(1) * CHANNELS_PER_PROGRAM
    # One block of channels, without a test whether it exists; in channels_last that costs registers.
    stop = start + 1
    if CHANNELS_PER_PROGRAM > UNROLL * BLOCK_C or BLOCK_C > 1:
        stop = tl.minimum(start + CHANNELS_PER_PROGRAM, channels)
    for tile in range(first_tile, first_tile + TILES):
        p, mask = tile_index(tile, tl.arange(0, lanes(BLOCK)), output_size, divisors[2:], BLOCK)

        if SINGLE:
            x, t, taps, covered = _aim(
                numbers, parameters_tangent_ptr, links, chain, n, k, held,
                p, centred(p, output_size, COMPUTE), mask, output_size, input_size, units,
                parameters_tangent_batch, parameters_strides, parameters_tangent_strides,
                LOAD, TRANSFORM, TRANSFORM_JVP, PADDING, PADDING_VJP, WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS,
                TANGENT, COVERS, ALIGN_CORNERS, COMPUTE, INDEX, AXES, ORDER,
            )  # fmt: skip

        for first in range(start, stop, UNROLL * BLOCK_C):
            outputs = tuples.zeros(UNROLL, (lanes(BLOCK), BLOCK_C), COMPUTE)
            largest = outputs
            indices = outputs
            inside_share = tl.zeros((lanes(BLOCK),), COMPUTE)
            outside = inside_share
            for z in range(output_size[DIMS - 1] if PROJECTS else 1):
                place = p
                if PROJECTS:
                    place = p + (p[0] * 0 + z,)
                if PROJECT == "argmax":
                    outputs = tuples.zeros(UNROLL, (lanes(BLOCK), BLOCK_C), COMPUTE)
                per_axis = SUPERSAMPLE
                if SUPERSAMPLE == 0:
                    per_axis = samples_per_axis(
                        numbers, links, chain, n, k, place, mask, output_size, input_size, units,
                        parameters_strides, LOAD, TRANSFORM, SHRINK, ALIGN_CORNERS, COMPUTE, INDEX,
                    )  # fmt: skip
                count = power(per_axis, DIMS) if SUPERSAMPLE == 0 else SUPERSAMPLE**DIMS
                share = 1.0 / tl.cast(count, COMPUTE)
                for sample in range(tl.max(count) if VARIES else count):
                    if not SINGLE:
                        u = sample_place(place, sample, per_axis, output_size, COMPUTE)
                        x, t, taps, covered = _aim(
                            numbers, parameters_tangent_ptr, links, chain, n, k, held,
                            uncentred(u, output_size, COMPUTE), u, mask, output_size, input_size, units,
                            parameters_tangent_batch, parameters_strides, parameters_tangent_strides,
                            LOAD, TRANSFORM, TRANSFORM_JVP, PADDING, PADDING_VJP, WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE,
                            TAPS, TANGENT, COVERS, ALIGN_CORNERS, COMPUTE, INDEX, AXES, ORDER,
                        )  # fmt: skip
                    wanted = mask & (sample < count) if VARIES else mask
                    if COVERS:
                        left = -covered if TANGENT else 1.0 - covered
                        if SUPERSAMPLE != 1:
                            covered *= share
                            left *= share
                        inside_share += tl.where(wanted, covered, 0.0)
                        outside += tl.where(wanted, left, 0.0)
                    totals = ()
                    for block in tl.static_range(UNROLL):
                        c = first + block * BLOCK_C + tl.arange(0, BLOCK_C)
                        output = outputs[block]
                        for plane in range(1 if DIMS == AXES else TAPS):
                            last_taps = taps_along(
                                x[AXES:], input_size[AXES:], plane, PADDING, ALIGN_CORNERS,
                                WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, 1, ORDER,
                            )  # fmt: skip
                            for corner_id in tl.static_range(TAPS**AXES):
                                weights, slopes, _, where, inside, _ = corner(
                                    taps + last_taps, corner_id, TAPS, ORDER, wanted
                                )
                                readable = block_mask(inside, c, channels, WHOLE)
                                weight = product_jvp(weights, slopes, t) if TANGENT else product(weights)
                                if SUPERSAMPLE != 1:
                                    weight *= share
                                value = load_block(input_ptr, where, c, input_strides, readable, INDEX, COMPUTE)
                                output += weight[:, None] * value
                                if INPUT_TANGENT:
                                    weight = product(weights)
                                    if SUPERSAMPLE != 1:
                                        weight *= share
                                    output += weight[:, None] * load_block(
                                        input_tangent_ptr, where, c, input_tangent_strides, readable, INDEX, COMPUTE
                                    )
                        totals = totals + (output,)
                    outputs = totals
                if PROJECT == "argmax":
                    larger, where = (), ()
                    for block in tl.static_range(UNROLL):
                        better = (outputs[block] > largest[block]) | (z == 0)
                        larger = larger + (tl.where(better, outputs[block], largest[block]),)
                        where = where + (tl.where(better, z, indices[block]),)
                    largest, indices = larger, where
            if PROJECT == "argmax":
                outputs = indices
            if coverage_ptr is not None:
                at = coverage_ptr + m * coverage_strides[0] + offset(p, coverage_strides[2:], INDEX)
                # Whatever the shares add up to, a pixel that lacks nothing is whole.
                inside_share = tl.where(outside == 0, 1.0, inside_share)
                if (tl.program_id(1) == 0) & (first == 0):  # the others hold more channels of the same pixels
                    tl.store(at, inside_share.to(coverage_ptr.dtype.element_ty), mask=mask)
            # Not sooner: loads of other channels behind a store would wait for the numbers that it stores.
            layers = tl.cast(output_size[DIMS - 1], COMPUTE) if PROJECT == "mean" else 1.0
            for block in tl.static_range(UNROLL):
                c = first + block * BLOCK_C + tl.arange(0, BLOCK_C)
                _store(
                    output_ptr, outputs[block], p, mask, c, channels, output_strides, fill_ptr, outside, layers,
                    COMPUTE, INDEX, WHOLE,
                )  # fmt: skip


@triton.jit
def _store(
    output_ptr, output, p, mask, c, channels, strides, fill_ptr, outside, layers,
    COMPUTE: tl.constexpr, INDEX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Some channels of the output, with what lies outside, averaged over layers."""
    if fill_ptr is not None:
        # Selected, as a fill that is not finite must not reach the pixels inside.
        filled = outside[:, None] * load_fill(fill_ptr, c, channels, COMPUTE)
        output += tl.where((outside != 0)[:, None], filled, 0.0)
    tl.store(
        output_ptr + block_offset(p, c, strides, INDEX),
        (output / layers).to(output_ptr.dtype.element_ty),
        mask=block_mask(mask, c, channels, WHOLE),
    )


@triton.jit
def _aim(
    numbers, parameters_tangent_ptr, links, chain, n, k, held, p, u, mask, output_size, input_size, units,
    parameters_tangent_batch, parameters_strides, parameters_tangent_strides,
    LOAD: tl.constexpr, TRANSFORM: tl.constexpr, TRANSFORM_JVP: tl.constexpr,
    PADDING: tl.constexpr, PADDING_VJP: tl.constexpr,
    WEIGHT: tl.constexpr, WEIGHT_VJP: tl.constexpr, WEIGHT_CURVATURE: tl.constexpr, TAPS: tl.constexpr,
    TANGENT: tl.constexpr, COVERS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    AXES: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Where samples look, the change of that after padding, the taps along the axes whose taps are all at hand and,
    with COVERS, how much of their weight lies inside, or what that changes by.
    """
    _coefficients, _tangents, x, t = look(
        numbers, parameters_tangent_ptr, links, chain, n, k, held, p, u, mask, output_size, input_size, units,
        parameters_tangent_batch, parameters_strides, parameters_tangent_strides,
        LOAD, TRANSFORM, TRANSFORM_JVP, PADDING_VJP, TAPS, TANGENT, ALIGN_CORNERS, COMPUTE, INDEX,
    )  # fmt: skip
    taps = taps_along(
        x[:AXES], input_size, 0, PADDING, ALIGN_CORNERS,
        WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, TAPS, ORDER,
    )  # fmt: skip
    covered = 0.0
    if COVERS:
        shares, share_slopes, _none = coverage(x, input_size, WEIGHT, WEIGHT_VJP, WEIGHT_CURVATURE, TAPS, ORDER)
        covered = product_jvp(shares, share_slopes, t) if TANGENT else product(shares)
    return x, t, taps, covered


def gather(
    output, input, parameters, auxiliary=None, fill=None, input_tangent=None, parameters_tangent=None,
    *, mask=None, kind, mode, padding_mode, align_corners, supersample=1, project="", depth=1,
):  # fmt: skip
    """Fill output (M * K, C, *size) from input (M, C, *input_size) and parameters (M, K, …).

    With parameters_tangent and, if wanted, input_tangent: fill it with what it changes by.
    A tensor whose batch is a divisor of M serves over and over. `fill` (C,) is what lies outside under
    zeros padding; `mask` (M * K, 1, *size) is filled with the share of each output pixel's weight that lies inside.
    With `project`, "sum", "mean" or "argmax", the output lacks the first of its size, `depth`; "argmax" fills it with
    int32.
    """
    dense = stages.transform(kind).dense
    parameters, parameters_tangent = launch.packed(dense, parameters, parameters_tangent)
    fill = launch.packed_fill(fill)
    tensors = output, input, input_tangent, parameters, parameters_tangent, auxiliary, fill, mask
    start = _launch(tensors, kind, mode, padding_mode, align_corners, supersample, project, depth)
    start(
        output, input, input if input_tangent is None else input_tangent,
        parameters, parameters if parameters_tangent is None else parameters_tangent, auxiliary, fill, mask,
    )  # fmt: skip


@launch.remembered
def _launch(
    output, input, input_tangent, parameters, parameters_tangent, auxiliary, fill, mask,
    kind, mode, padding_mode, align_corners, supersample, project, depth,
):  # fmt: skip
    """All that follows from the tensors' layouts and the options."""
    tangent, taps, channels = parameters_tangent is not None, stages.INTERPOLATIONS[mode].taps, input.shape[1]
    images, motions = (input, input_tangent or input), (parameters, parameters_tangent or parameters)
    size, depths, maps = output.shape[2:], (depth,) if project else (), parameters.shape[1]
    of_image = channels, launch.is_channels_last(input), input.dtype, taps
    tile = tiling.gather_tile(size, *of_image, tangent, of_volumes=len(input.shape) == 5)
    tile = tile.for_images(output.shape[0], channels, size)
    return launch.Launch(
        gather_kernel,
        tile.grid(output.shape[0], channels, size),
        (
            *stages.chain(kind, auxiliary, None, len(input.shape) - 2),
            launch.size(output) + depths, launch.size(input),
            launch.units(input.shape[2:], (*depths, *size), align_corners, input.dtype),
            (divisor(tile.programs(size)), divisor(maps), *tile.divisors(size)), channels, maps,
            *launch.batches(output.shape[0] // maps, *images, *motions),
            launch.strides(output), *map(launch.strides, images), *map(launch.parameter_strides, motions),
            None if mask is None else launch.strides(mask),
        ),
        stages.gather(kind, mode, padding_mode)
        | {"TANGENT": tangent, "INPUT_TANGENT": input_tangent is not None, "ALIGN_CORNERS": align_corners}
        | {"SUPERSAMPLE": supersample, "PROJECT": project}
        | tile.constants()
        | {"TILES": tile.tiles}
        | launch.constants(*images, output, parameters=launch.present(*motions, auxiliary)),
    )  # fmt: skip
