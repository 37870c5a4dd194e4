"""The backward pass: which kernels run, what they leave for each other, and the last small sum.

- grad_input of a transform that bounds its preimages, with or without the transform's gradient: the
  walk. Where the padding folds, the scatter goes first for the folded samples, in fp32, and the
  walk starts from what it left.
- grad_input of any other map: the scatter alone.
- The transform's gradient alone: a reduction over the output, the scatter kernel without atomics.

All of them also compute what their gradients change by along a direction, for second derivatives.

The gradient of a few parameters is a sum over everything: every program leaves its share in a slot
of its own, and torch adds the slots. There are not more of them than a budget allows, or than the image
has tiles: from a large output, each program takes several tiles. Those of a dense map belong to one
output pixel each.
"""

import math

import torch

from . import fixed_point, launch, stages, tiling
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
    need_parameters = grad_parameters is not None or grad_auxiliary is not None
    flags = {
        "NEED_PARAMETERS": need_parameters,
        "TANGENT": tangent,
        "INPUT_TANGENT": need_parameters and input_tangent is not None,
        "ALIGN_CORNERS": align_corners,
        "SUPERSAMPLE": supersample,
    }
    image = grad_input if need_input else input
    source = image if input is None else input
    images = source, source if input_tangent is None else input_tangent
    dense, folds = stages.transform(kind).dense, stages.PADDINGS[padding_mode].folds
    walks = need_input and stages.transform(kind).rows is not None
    scatters = folds or not walks
    motions = launch.packed(dense, parameters, parameters_tangent)
    batch, maps = grad_output.shape[0] // parameters.shape[1], parameters.shape[1]
    if need_input or grad_parameters is not None:
        batch = (grad_input if need_input else grad_parameters).shape[0]

    dims, channels = image.dim() - 2, image.shape[1]
    size, input_size = grad_output.shape[2:], image.shape[2:]
    layout = channels, launch.is_channels_last(image), image.dtype, stages.INTERPOLATIONS[mode].taps
    scatter_tile = tiling.scatter_tile(size, *layout, whole=dense and need_parameters, fixed=deterministic)
    tiles, channel_programs = scatter_tile.grid(1, channels, size)
    walk_tile = tiling.walk_tile(input_size, *layout, folds, tangent)
    walk_grid = walk_tile.grid(batch, channels, input_size)

    compute = launch.compute_dtype(image.dtype)
    chained, programs = stages.is_chain(kind), tiles
    scatter_slots = tiles * channel_programs if scatters else 0
    if chained:  # many numbers: programs share slots, and add by atomics
        scatter_slots = tiling.shared_slots(scatter_slots, batch * maps * launch.count(parameters))
    elif need_parameters and not dense:
        programs = tiling.programs(tiles, batch * maps * channel_programs * launch.count(parameters))
        scatter_slots = programs * channel_programs if scatters else 0
    scatter_grid = batch * maps * programs, channel_programs
    walk_slots = walk_grid[0] // batch * walk_grid[1] if walks else 0
    partials = None
    if need_parameters and not dense:
        shape = (batch, maps, scatter_slots + walk_slots, launch.count(parameters))
        partials = (torch.zeros if chained else torch.empty)(shape, dtype=compute, device=image.device)
    field_gradient = None if grad_auxiliary is None else torch.zeros_like(grad_auxiliary, dtype=compute)
    chain = stages.chain(kind, auxiliary, field_gradient, dims)

    # Atomics in 16 bits would lose sums and loop on the hardware: those images get an fp32 twin.
    scattered, scale = None, None
    if need_input and scatters:
        if deterministic:
            scattered = torch.zeros_like(grad_input, dtype=torch.int64)
        else:
            scattered = grad_input.zero_() if image.dtype == compute else torch.zeros_like(grad_input, dtype=compute)

    sizes = (
        launch.size(grad_output),
        launch.size(image),
        channels,
        maps,
        *launch.batches(grad_output, *images, *motions),
    )
    strides = launch.strides(grad_output), *map(launch.strides, images), *map(launch.parameter_strides, motions)
    # A walk's partial sums have a slot for each tile of the input, and may be far apart where no image is.
    reached = image, *images, grad_output, *launch.present(partials)
    constants = launch.constants(*reached, parameters=launch.present(*motions, auxiliary))
    far = launch.is_far(constants)
    fill = launch.packed_fill(fill) if need_parameters else None
    if scatters:
        gradients, gradients_strides, slot = partials, *_slot_strides(partials)
        if dense and need_parameters:
            gradients, gradients_strides, slot = grad_parameters, launch.parameter_strides(grad_parameters), 0

        def scatter(scale, **flags):
            scatter_kernel[scatter_grid](
                scattered, scale, gradients, grad_output, *images, *motions, *chain,
                *sizes, launch.strides(image), gradients_strides, slot, max(1, scatter_slots), *strides,
                fill,
                **stages.scatter(kind, mode, padding_mode), **constants, **flags,
                FOLDED_ONLY=walks, NEED_INPUT=need_input, LOOP=programs < tiles, **scatter_tile.constants(far),
            )  # fmt: skip

        if deterministic and need_input:
            if tangent:  # slopes and tangents have no bound: they are looked at first
                largest = torch.zeros(batch, dtype=compute, device=image.device)
                scatter(
                    largest, **flags | {"NEED_PARAMETERS": False, "INPUT_TANGENT": False}, FIXED=False, MEASURE=True
                )
            else:
                largest = fixed_point.largest(grad_output, batch, maps, compute)
            terms = maps * math.prod(size) * stages.INTERPOLATIONS[mode].taps ** dims
            if tangent:  # the largest is one sample's
                terms *= (supersample or 16) ** dims
            scale = fixed_point.scale(largest, terms)
        scatter(scale, **flags, FIXED=scale is not None, MEASURE=False)
        if scale is not None:
            scattered = fixed_point.restore(scattered, scale, grad_input, compute if walks else None)
    if walks:
        shares = None if partials is None else partials[:, :, scatter_slots:]
        walk_kernel[walk_grid](
            grad_input, scattered, shares, grad_output, *images, *motions,
            *sizes, launch.strides(image), *_slot_strides(partials), *strides,
            fill,
            **stages.walk(kind, mode, padding_mode), **constants, **flags, **walk_tile.constants(far),
        )  # fmt: skip
    elif scattered is not None and scattered is not grad_input:
        grad_input.copy_(scattered)
    if field_gradient is not None:
        grad_auxiliary.copy_(field_gradient)
    if partials is not None and grad_parameters is not None:
        grad_parameters.copy_(partials.sum(2).view_as(grad_parameters))


def _slot_strides(partials):
    """Strides of n and k, and the slots'."""
    return ((0, 0), 0) if partials is None else (partials.stride()[:2], partials.stride(2))
