"""The backward pass: which kernels run, what they leave for each other, and the last small sum.

- grad_input of a transform that bounds its preimages, with or without the transform's gradient: the
  walk. Where the padding folds, the scatter goes first for the folded samples, in fp32, and the
  walk starts from what it left.
- grad_input of a dense map: the scatter alone.
- The transform's gradient alone: a reduction over the output, the scatter kernel without atomics.

The gradient of a few parameters is a sum over everything: every program leaves its share in a slot
of its own, and torch adds the slots. Those of a dense map belong to one output pixel each.
"""

import torch

from . import launch, stages, tiling
from .scatter import scatter_kernel
from .walk import walk_kernel


def adjoint(grad_input, grad_parameters, grad_output, input, parameters, *, kind, mode, padding_mode, align_corners):
    """Fill grad_input (M, C, *input_size) and grad_parameters (M, K, …), either of them or both.

    One that is not asked for is None; `input` may be None where grad_parameters is.
    """
    if grad_parameters is not None and stages.INTERPOLATIONS[mode].taps == 1:
        grad_parameters.zero_()  # nearest does not change with the coordinate, but for jumps
        grad_parameters = None
        if grad_input is None:
            return
    image = grad_input if grad_input is not None else input
    source = input if input is not None else grad_input
    need_input, need_parameters = grad_input is not None, grad_parameters is not None
    dense, folds = stages.TRANSFORMS[kind].dense, stages.PADDINGS[padding_mode].folds
    parameters = launch.packed(parameters, dense)
    walks = need_input and not dense
    scatters = dense or folds or not need_input

    dims, channels = image.dim() - 2, image.shape[1]
    layout = dims, channels, launch.is_channels_last(image), image.dtype, stages.INTERPOLATIONS[mode].taps
    scatter_tile = tiling.scatter_tile(*layout, whole=dense and need_parameters)
    scatter_grid = scatter_tile.grid(grad_output.shape[0], channels, grad_output.shape[2:])
    walk_tile = tiling.walk_tile(*layout)
    walk_grid = walk_tile.grid(image.shape[0], channels, image.shape[2:])

    compute = launch.compute_dtype(image.dtype)
    scatter_slots = scatter_grid[0] // grad_output.shape[0] * scatter_grid[1] if scatters else 0
    walk_slots = walk_grid[0] // image.shape[0] * walk_grid[1] if walks else 0
    partials = None
    if need_parameters and not dense:
        shape = (*parameters.shape[:2], scatter_slots + walk_slots, launch.count(parameters))
        partials = torch.empty(shape, dtype=compute, device=image.device)

    # Atomics in 16 bits would lose sums and loop on the hardware: those images get an fp32 twin.
    scattered = None
    if need_input and scatters:
        scattered = grad_input.zero_() if image.dtype == compute else torch.zeros_like(grad_input, dtype=compute)

    sizes = launch.size(grad_output), launch.size(image), channels, parameters.shape[1]
    strides = *launch.strides(image), *launch.strides(grad_output), *launch.strides(source)
    parameter_strides = launch.parameter_strides(parameters)
    constants = {
        "ALIGN_CORNERS": align_corners,
        "NEED_PARAMETERS": need_parameters,
        **launch.constants(image, source, grad_output, parameters=parameters),
    }
    far = launch.is_far(constants)
    if scatters:
        if dense and need_parameters:
            n, k, pixels = launch.parameter_strides(grad_parameters)
            gradients, gradient_strides = grad_parameters, (n, k, 0, pixels)
        else:
            gradients, gradient_strides = partials, (*_slot_strides(partials), None)
        scatter_kernel[scatter_grid](
            scattered, gradients, grad_output, source, parameters,
            *sizes, *gradient_strides, *parameter_strides, *strides,
            **stages.scatter(kind, mode, padding_mode), **constants,
            FOLDED_ONLY=walks, NEED_INPUT=need_input, **scatter_tile.constants(far),
        )  # fmt: skip
    if walks:
        shares = None if partials is None else partials[:, :, scatter_slots:]
        walk_kernel[walk_grid](
            grad_input, shares, grad_output, source, scattered, parameters,
            *sizes, *_slot_strides(partials), *parameter_strides[:2], *strides,
            **stages.walk(kind, mode, padding_mode), **constants, **walk_tile.constants(far),
        )  # fmt: skip
    elif scattered is not None and scattered is not grad_input:
        grad_input.copy_(scattered)
    if partials is not None:
        grad_parameters.copy_(partials.sum(2).view_as(grad_parameters))


def _slot_strides(partials):
    """Strides of n, k and the slot."""
    return (0, 0, 0) if partials is None else partials.stride()[:3]
