"""Who does the work: tri_stn, and what people use today.

A provider builds, for a workload and its tensors, a function that runs the forward pass. What it
returns has the workload's output shape and, where gradients are asked for, a gradient function.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .workloads import Tensors, Workload

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    name: str
    available: Callable[[Workload, torch.device], str | None]
    """Why it cannot run a workload on a device; None if it can."""
    build: Callable[[Workload, Tensors], Forward]
    rounds_grid: bool = False
    """Rounds the sampling grid to the image's dtype, as torch's own sampler must."""
    slow_to_build: bool = False
    """Takes seconds before the first call returns: such providers go last, so that they cannot starve the others."""


def torch_warp(input: Tensor, theta: Tensor, workload: Workload) -> Tensor:
    """`F.affine_grid` and `F.grid_sample`, as well as they can be put together.

    The K grids of an image are stacked into one tall grid: no copies of the image, and the output
    is a view. The grid is computed in theta's dtype and then rounded to the image's, as
    `F.grid_sample` takes no other.
    """
    n, (height, width) = input.shape[0], workload.size
    k = theta.numel() // (n * 6)
    grid = F.affine_grid(theta.view(-1, 2, 3), [n * k, 1, height, width], align_corners=workload.align_corners)
    grid = grid.view(n, k * height, width, 2).to(input.dtype)
    output = F.grid_sample(input, grid, workload.mode, workload.padding_mode, workload.align_corners)
    output = output.view(n, -1, k, height, width).transpose(1, 2)
    return output.view(*theta.shape[:-2], *output.shape[2:])


def _build_tri_stn(workload: Workload, tensors: Tensors) -> Forward:
    import tri_stn

    def forward() -> Tensor:
        return tri_stn.warp(
            tensors.input,
            tri_stn.Affine(tensors.theta),
            workload.size,
            mode=workload.mode,
            padding_mode=workload.padding_mode,
            align_corners=workload.align_corners,
        )

    return forward


def _build_eager(workload: Workload, tensors: Tensors) -> Forward:
    return lambda: torch_warp(tensors.input, tensors.theta, workload)


def _build_compile(workload: Workload, tensors: Tensors) -> Forward:
    import torch._functorch.config as functorch

    # Each workload is compiled for its own shapes, and the number of compilations per function is limited.
    torch.compiler.reset()
    # The backward alone is timed on one graph again and again, so its buffers must not be given away.
    functorch.donated_buffer = False
    compiled = torch.compile(torch_warp, fullgraph=True, dynamic=False)
    return lambda: compiled(tensors.input, tensors.theta, workload)


def _tri_stn_available(workload: Workload, device: torch.device) -> str | None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton."
    return None


def _eager_available(workload: Workload, device: torch.device) -> str | None:
    # Read past the end of an image and crashed, in torch 2.13.
    reach = math.prod(workload.input_size) * (workload.channels if workload.layout == "channels_last" else 1)
    if device.type == "cpu" and workload.itemsize == 2 and reach >= 2**15:
        return "torch's 16-bit grid_sample on the CPU counts positions in 16 bits, too few for images of this size."
    return None


def _compile_available(workload: Workload, device: torch.device) -> str | None:
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler for the CPU, and none is on the PATH."
    return _eager_available(workload, device)


TRI_STN = Provider("tri_stn", _tri_stn_available, _build_tri_stn)
EAGER = Provider("eager", _eager_available, _build_eager, rounds_grid=True)
COMPILE = Provider("compile", _compile_available, _build_compile, rounds_grid=True, slow_to_build=True)
PROVIDERS = {provider.name: provider for provider in (TRI_STN, EAGER, COMPILE)}


def device_copy(device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """The limit: a copy far larger than any cache, and the bytes that it reads and writes."""
    numel = 2**28 if device.type == "cuda" else 2**25
    source, target = torch.zeros(2, numel, device=device).unbind()
    return lambda: target.copy_(source), 2 * source.nbytes
