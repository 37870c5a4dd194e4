"""The backward pass: which kernels run, what they leave for each other, and the last small sum.

- grad_input of a transform that bounds its preimages, with or without the transform's gradient: the
  walk. Where the padding folds, the scatter goes first for the folded samples, in fp32, and the
  walk starts from what it left.
- grad_input of any other map: the scatter alone.
- The transform's gradient alone: a reduction over the output, the scatter kernel without atomics.

All of them also compute what their gradients change by along a direction, for second derivatives.

The gradient of a few parameters is a sum over everything: every program leaves its share in a slot
of its own, and torch adds the slots. There are not more of them than a budget allows, or than the image
has tiles: from a large output or batch, each program takes several tiles. Those of a dense map belong to one
output pixel each.
"""

import math
from dataclasses import dataclass

import torch

from . import fixed_point, launch, stages, tiling
from .division import divisor
from .scatter import scatter_kernel
from .walk import walk_kernel


def adjoint(
    grad_input, grad_parameters, grad_auxiliary, grad_output, input, parameters, auxiliary=None, fill=None,
    input_tangent=None, parameters_tangent=None,
    *, kind, mode, padding_mode, align_corners, supersample=1, deterministic=False,
):  # fmt: skip
    """Fill grad_input (M, C, *input_size), grad_parameters (M, K, …) and grad_auxiliary, any of them.

    One that is not asked for is None; `input` may be None where grad_parameters is. With
    parameters_tangent and, if wanted, input_tangent: fill them with what they change by.
    A tensor whose batch is a divisor of M serves over and over. `fill` (C,) is what lies outside under
    zeros padding. `deterministic` sums scattered gradients in fixed point, so that the order of the
    atomics does not matter.
    """
    need_input, tangent = grad_input is not None, parameters_tangent is not None
    if stages.INTERPOLATIONS[mode].taps == 1:  # nearest does not change with the coordinate, but for jumps
        for gradient in (grad_parameters, grad_auxiliary, grad_input if tangent else None):
            if gradient is not None:
                gradient.zero_()
        if tangent or not need_input:
            return
        grad_parameters = grad_auxiliary = None
    parameters, parameters_tangent = launch.packed(stages.transform(kind).dense, parameters, parameters_tangent)
    need_parameters = grad_parameters is not None or grad_auxiliary is not None
    fill, input_tangent = (launch.packed_fill(fill), input_tangent) if need_parameters else (None, None)
    tensors = (
        grad_input, grad_parameters, grad_auxiliary, grad_output, input, parameters, auxiliary, fill,
        input_tangent, parameters_tangent,
    )  # fmt: skip
    plan = _plan(tensors, kind, mode, padding_mode, align_corners, supersample, deterministic)

    compute = plan.compute
    partials = field_gradient = None
    if plan.partials is not None:
        partials = (parameters.new_zeros if plan.chained else parameters.new_empty)(plan.partials, dtype=compute)
    if grad_auxiliary is not None:
        field_gradient = _zeros(grad_auxiliary, compute)
    source = grad_input if input is None else input
    read = (
        grad_output, source, source if input_tangent is None else input_tangent,
        parameters, parameters if parameters_tangent is None else parameters_tangent,
    )  # fmt: skip

    # Atomics in 16 bits would lose sums and loop on the hardware: those images get an fp32 twin.
    scattered, scale = None, None
    if plan.scatter is not None:
        if need_input:
            scattered = _zeros(grad_input, torch.int64 if deterministic else compute)
        if plan.terms:
            if plan.measure is not None:  # slopes and tangents have no bound: they are looked at first
                largest = parameters.new_zeros(plan.batch, dtype=compute)
                plan.measure(scattered, largest, None, *read, auxiliary, None, fill)
            else:
                largest = fixed_point.largest(grad_output, plan.batch, parameters.shape[1], compute)
            scale = fixed_point.scale(largest, plan.terms)
        gradients = grad_parameters if partials is None else partials
        plan.scatter(scattered, scale, gradients, *read, auxiliary, field_gradient, fill)
        if scale is not None:
            scattered = fixed_point.restore(scattered, scale, grad_input, None if plan.walk is None else compute)
    if plan.walk is not None:
        shares = partials[:, :, plan.scatter_slots :] if plan.scatter_slots and partials is not None else partials
        plan.walk(grad_input, scattered, shares, *read, fill)
    elif scattered is not None and scattered is not grad_input:
        grad_input.copy_(scattered)
    if field_gradient is not grad_auxiliary:
        grad_auxiliary.copy_(field_gradient)
    if partials is not None and grad_parameters is not None:
        if grad_parameters.dtype == compute:
            torch.sum(partials, 2, out=grad_parameters)
        else:
            grad_parameters.copy_(partials.sum(2))


def _zeros(like, dtype):
    """Where sums of a dtype are made: in the tensor itself, or in a twin of the same order of memory."""
    return like.zero_() if like.dtype == dtype else torch.zeros_like(like, dtype=dtype)


@dataclass(frozen=True)
class _Plan:
    """What follows from the tensors' layouts and the options."""

    compute: torch.dtype
    batch: int
    """Images, all of which have a gradient."""
    partials: tuple[int, ...] | None
    """The shape of the partial sums: images, maps, the scatter's slots and then the walk's, and a map's numbers."""
    scatter_slots: int
    chained: bool
    """Whether programs add to their slots, by atomics."""
    scatter: launch.Launch | None
    measure: launch.Launch | None
    """The scatter once more, to look for the largest of what it will add in fixed point."""
    terms: int
    """How many of those may meet in one pixel; 0 where there is no fixed point."""
    walk: launch.Launch | None


@launch.remembered
def _plan(
    grad_input, grad_parameters, grad_auxiliary, grad_output, input, parameters, auxiliary, fill,
    input_tangent, parameters_tangent,
    kind, mode, padding_mode, align_corners, supersample, deterministic,
):  # fmt: skip
    need_input, tangent = grad_input is not None, parameters_tangent is not None
    need_parameters = grad_parameters is not None or grad_auxiliary is not None
    flags = {
        "NEED_PARAMETERS": need_parameters,
        "TANGENT": tangent,
        "INPUT_TANGENT": input_tangent is not None,
        "ALIGN_CORNERS": align_corners,
        "SUPERSAMPLE": supersample,
    }
    image = grad_input or input
    images = input or image, input_tangent or input or image
    motions = parameters, parameters_tangent or parameters
    transform = stages.transform(kind)
    dense, folds = transform.dense, stages.PADDINGS[padding_mode].folds
    walks = need_input and transform.box is not None
    scatters = folds or not walks
    batch, maps = grad_output.shape[0] // parameters.shape[1], parameters.shape[1]
    if need_input or grad_parameters is not None:
        batch = (grad_input or grad_parameters).shape[0]

    size, input_size, channels = grad_output.shape[2:], image.shape[2:], image.shape[1]
    taps, dims = stages.INTERPOLATIONS[mode].taps, len(input_size)
    of_image = channels, launch.is_channels_last(image), image.dtype, taps
    all_channels = dense and need_parameters
    scatter_tile = tiling.scatter_tile(size, *of_image, all_channels, deterministic, tangent)
    tiles, channel_programs = scatter_tile.grid(1, channels, size)
    walk_tile = tiling.walk_tile(input_size, *of_image, folds, tangent, maps > 1, fill is not None)
    if maps == 1 and not walk_tile.is_crowded:
        walk_tile = walk_tile.for_images(batch, channels, input_size)
    walk_grid = walk_tile.grid(batch, channels, input_size)

    (grad_batch,) = launch.batches(batch * maps, grad_output)
    compute = launch.compute_dtype(image.dtype)
    chained, programs = stages.is_chain(kind), tiles
    scatter_slots = tiles * channel_programs if scatters else 0
    if chained:  # many numbers: programs share slots, and add by atomics
        scatter_slots = tiling.shared_slots(scatter_slots, batch * maps * launch.count(parameters))
    elif need_parameters and not dense:
        programs = tiling.programs(tiles, batch * maps * channel_programs * launch.count(parameters))
        programs = min(programs, scatter_tile.for_images(batch * maps, channels, size).programs(size))
        scatter_slots = programs * channel_programs if scatters else 0
    scatter_grid = batch * maps * programs, channel_programs
    walk_slots = walk_grid[0] // batch * walk_grid[1] if walks else 0
    partials = None
    if need_parameters and not dense:
        shape = (batch, maps, scatter_slots + walk_slots, *parameters.shape[2:])
        partials = launch.contiguous(shape, compute)

    sizes = (
        launch.size(grad_output),
        launch.size(image),
        launch.units(input_size, size, align_corners, image.dtype),
    )
    counts = channels, maps, grad_batch, *launch.batches(batch, *images, *motions)
    strides = launch.strides(grad_output), *map(launch.strides, images), *map(launch.parameter_strides, motions)
    # A walk's partial sums have a slot for each program, of some tiles of the input, and may be far apart where no
    # image is.
    reached = image, *images, grad_output, *launch.present(partials)
    constants = launch.constants(*reached, parameters=launch.present(*motions, auxiliary))
    far = launch.is_far(constants)
    slot_strides = ((0, 0), 0) if partials is None else (partials.strides[:2], partials.strides[2])

    def scatter(**changes):
        gradients_strides, slot = slot_strides
        if dense and need_parameters:
            gradients_strides, slot = launch.parameter_strides(grad_parameters), 0
        return launch.Launch(
            scatter_kernel,
            scatter_grid,
            (
                *stages.chain(kind, auxiliary, grad_auxiliary, dims),
                *sizes, (divisor(programs), divisor(maps), *scatter_tile.divisors(size)), *counts,
                launch.strides(image), gradients_strides, slot, scatter_slots if chained else programs, *strides,
            ),
            stages.scatter(kind, mode, padding_mode)
            | constants
            | flags
            | {"FOLDED_ONLY": walks, "NEED_INPUT": need_input, "LOOP": programs < tiles}
            | scatter_tile.constants(far)
            | changes,
        )  # fmt: skip

    fixed = deterministic and need_input and scatters
    measure = None
    if fixed and tangent:
        measure = scatter(NEED_PARAMETERS=False, INPUT_TANGENT=False, FIXED=False, MEASURE=True)
    terms = maps * math.prod(size) * taps**dims if fixed else 0
    if tangent:  # the largest is one sample's
        terms *= (supersample or 16) ** dims
    walk = None
    if walks:
        walk = launch.Launch(
            walk_kernel,
            walk_grid,
            (
                *sizes, (divisor(walk_tile.programs(input_size)), *walk_tile.divisors(input_size)), *counts,
                launch.strides(image), *slot_strides, *strides,
            ),
            stages.walk(kind, mode, padding_mode)
            | constants
            | flags
            | {"TILES": walk_tile.tiles, "ONE_MAP": maps == 1}
            | walk_tile.constants(far),
        )  # fmt: skip
    return _Plan(
        compute, batch, None if partials is None else partials.shape, scatter_slots, chained,
        scatter(FIXED=fixed, MEASURE=False) if scatters else None, measure, terms, walk,
    )  # fmt: skip
