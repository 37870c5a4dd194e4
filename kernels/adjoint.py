"""The backward pass: which kernels run, what they leave for each other, and the last small sum.

- grad_input, with or without the transform's gradient: the walk. Where the padding folds, the
  scatter goes first for the folded samples, in fp32, and the walk starts from what it left.
- The transform's gradient alone: a reduction over the output, the scatter kernel without atomics.

Every program leaves its sum of the transform's gradient in a slot of its own; torch adds the slots.
"""

import torch

from . import launch, stages, tiling
from .scatter import scatter_kernel
from .walk import walk_kernel


def adjoint(grad_input, grad_parameters, grad_output, input, parameters, *, kind, mode, padding_mode, align_corners):
    """Fill grad_input (M, C, *input_size) and grad_parameters (M, K, …), either of them or both.

    One that is not asked for is None; `input` may be None where grad_parameters is.
    """
    image = grad_input if grad_input is not None else input
    source = input if input is not None else grad_input
    need_input, need_parameters = grad_input is not None, grad_parameters is not None
    folded_only = need_input and stages.PADDINGS[padding_mode].folds

    dims, channels = image.dim() - 2, image.shape[1]
    layout = dims, channels, launch.is_channels_last(image), image.dtype
    scatter_tile = tiling.scatter_tile(*layout)
    scatter_grid = scatter_tile.grid(grad_output.shape[0], channels, grad_output.shape[2:])
    walk_tile = tiling.walk_tile(*layout)
    walk_grid = walk_tile.grid(image.shape[0], channels, image.shape[2:])

    scatter_slots = scatter_grid[0] // grad_output.shape[0] * scatter_grid[1] if folded_only or not need_input else 0
    walk_slots = walk_grid[0] // image.shape[0] * walk_grid[1] if need_input else 0
    compute = launch.compute_dtype(image.dtype)
    partials = None
    if need_parameters:
        shape = (grad_output.shape[0], scatter_slots + walk_slots, launch.count(parameters))
        partials = torch.empty(shape, dtype=compute, device=image.device)

    # Atomics in 16 bits would lose sums and loop on the hardware: those images get an fp32 twin.
    scattered = None
    if folded_only:
        scattered = grad_input.zero_() if image.dtype == compute else torch.zeros_like(grad_input, dtype=compute)

    sizes = (launch.size(grad_output), launch.size(image), channels, parameters.shape[1], scatter_slots + walk_slots)
    constants = {
        "PARAMETERS": launch.count(parameters),
        "ALIGN_CORNERS": align_corners,
        "NEED_PARAMETERS": need_parameters,
        **launch.constants(image, source, grad_output),
    }
    if scatter_slots:
        scatter_kernel[scatter_grid](
            scattered, partials, grad_output, source, parameters,
            *sizes,
            *launch.strides(image), *launch.strides(grad_output), *launch.strides(source),
            **stages.scatter(kind, mode, padding_mode), **constants,
            FOLDED_ONLY=folded_only, NEED_INPUT=need_input, **scatter_tile.constants(),
        )  # fmt: skip
    if walk_slots:
        walk_kernel[walk_grid](
            grad_input, partials, grad_output, source, scattered, parameters,
            *sizes, scatter_slots,
            *launch.strides(image), *launch.strides(grad_output), *launch.strides(source),
            **stages.walk(kind, mode, padding_mode), **constants, **walk_tile.constants(),
        )  # fmt: skip
    if need_parameters:
        grad_parameters.copy_(partials.sum(1).view_as(grad_parameters))
