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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .maps import Fields, Kept
from .workloads import Tensors, Workload

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    name: str
    available: Callable[[Workload, torch.device], str | None]
    """Why it cannot run a workload on a device; None if it can."""
    build: Callable[..., Forward]
    """Of a workload, its tensors and, where there are several, a mode."""
    modes: tuple[str, ...] = ()
    """Ways to build it, of which the fastest counts on a GPU; the first is the one without a name given."""
    rounds_grid: bool = False
    """Rounds the sampling grid to the image's dtype, as torch's own sampler must."""
    slow_to_build: bool = False
    """Takes seconds before the first call returns: such providers go last, so that they cannot starve the others."""
    twice: bool = True
    """Whether its backward pass can be differentiated."""
    is_limit: bool = False
    """Computes nothing: moves as many bytes as the workload has to, from one place to another."""


def torch_warp(input: Tensor, theta: Tensor, workload: Workload, kept: Kept) -> Tensor:
    """The maps' grid in plain torch and `F.grid_sample`, as well as they can be put together.

    The K grids of an image are stacked into one tall grid: no copies of the image, and the output
    is a view. The grid is computed in theta's dtype and then rounded to the image's, as
    `F.grid_sample` takes no other. `kept` is what the maps' `kept` gave.
    """
    n, size, dims = input.shape[0], workload.size, len(workload.size)
    shape = workload.transform.shape(size)
    lead = theta.shape[: theta.dim() - len(shape)]
    k = math.prod(lead) // n
    grid = workload.transform.grid(theta.reshape(-1, *shape), kept, size, workload.align_corners)
    if k > 1:
        grid = grid.reshape(n, k * size[0], *size[1:], dims)
    output = F.grid_sample(
        input, grid.to(input.dtype), workload.mode, workload.padding_mode, workload.align_corners
    )  # fmt: skip
    if k > 1:
        output = output.unflatten(2, (k, size[0])).transpose(1, 2)
    return output.reshape(*lead, *output.shape[-dims - 1 :])


def keep(workload: Workload, like: Tensor) -> Kept:
    """What users of torch make once for the workload's maps, on the device and in the dtype of `like`."""
    return workload.transform.kept(workload.size, workload.input_size, workload.align_corners, like.detach())


def _build_tri_stn(workload: Workload, tensors: Tensors) -> Forward:
    import tri_stn

    def forward() -> Tensor:
        return tri_stn.warp(
            tensors.input,
            workload.transform.transform(tensors.theta),
            workload.size,
            mode=workload.mode,
            padding_mode=workload.padding_mode,
            align_corners=workload.align_corners,
        )

    return forward


def _build_eager(workload: Workload, tensors: Tensors) -> Forward:
    kept = keep(workload, tensors.theta)
    return lambda: torch_warp(tensors.input, tensors.theta, workload, kept)


# Without CUDA graphs: those copy each input, and give a kept graph's memory to the next call.
_COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")


def _build_compile(workload: Workload, tensors: Tensors, mode: str = _COMPILE_MODES[0]) -> Forward:
    import torch._functorch.config as functorch

    if mode == _COMPILE_MODES[0]:
        # Each workload is compiled for its own shapes, and the number of compilations per function is limited.
        torch.compiler.reset()
    # The backward alone is timed on one graph again and again, so its buffers must not be given away.
    functorch.donated_buffer = False
    kept = keep(workload, tensors.theta)
    compiled = torch.compile(torch_warp, fullgraph=True, dynamic=False, mode=mode)
    return lambda: compiled(tensors.input, tensors.theta, workload, kept)


def _build_cudnn(workload: Workload, tensors: Tensors) -> Forward:
    w, input = workload, tensors.input

    def forward() -> Tensor:
        grid = torch.cudnn_affine_grid_generator(tensors.theta, w.batch, w.channels, *w.size)
        return torch.cudnn_grid_sampler(input, grid.to(input.dtype))

    return forward


def _build_kornia(workload: Workload, tensors: Tensors) -> Forward:
    """kornia's functions in normalised coordinates; of a flow its `remap`, in pixels."""
    from kornia.geometry import transform

    w, input, theta = workload, tensors.input, tensors.theta
    options: Any = {"mode": w.mode, "padding_mode": w.padding_mode, "align_corners": w.align_corners}
    if isinstance(w.transform, Fields):
        y, x = torch.meshgrid(*(torch.arange(n, device=theta.device) for n in w.size), indexing="ij")
        return lambda: transform.remap(input, x + theta[..., 0], y + theta[..., 1], **options)
    last = theta.new_tensor([[[0, 0, 1]]]).expand(w.batch, -1, -1)

    def project() -> Tensor:
        matrix = theta if w.transform.kind == "projective" else torch.cat([theta, last], 1)
        return transform.homography_warp(input, matrix, (w.size[0], w.size[1]), **options)

    return project


def _tri_stn_available(workload: Workload, device: torch.device) -> str | None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton."
    return None


def _eager_available(workload: Workload, device: torch.device) -> str | None:
    if device.type == "cuda" and workload.deterministic and workload.gradients:
        return "torch's grid_sample has no deterministic backward pass on CUDA."
    # Read past the end of an image and crashed, in torch 2.13.
    reach = math.prod(workload.input_size) * (workload.channels if workload.layout == "channels_last" else 1)
    if device.type == "cpu" and workload.itemsize == 2 and reach >= 2**15:
        return "torch's 16-bit grid_sample on the CPU counts positions in 16 bits, too few for images of this size."
    return None


def _compile_available(workload: Workload, device: torch.device) -> str | None:
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler for the CPU, and none is on the PATH."
    return _eager_available(workload, device)


def _cudnn_available(workload: Workload, device: torch.device) -> str | None:
    w = workload
    if device.type != "cuda" or torch.version.hip is not None:
        return "cuDNN runs on NVIDIA GPUs."
    if not torch.backends.cudnn.is_available():
        return "This torch has no cuDNN."
    convention = w.align_corners and w.padding_mode == "zeros" and w.mode == "bilinear"
    if w.transform.kind != "affine" or len(w.size) != 2 or not convention:
        return "cuDNN's spatial transformer is affine, 2-D and bilinear, with zeros padding and align_corners=True."
    if w.maps > 1 or w.dtype == "bfloat16" or w.layout != "contiguous" or w.channels > 1024:
        return "cuDNN's spatial transformer takes one map per image, contiguous, at most 1024 channels, no bf16."
    if w.deterministic:
        return "Nothing says that cuDNN's spatial transformer is deterministic."
    return None


def _kornia_available(workload: Workload, device: torch.device) -> str | None:
    w, kind = workload, workload.transform.kind
    if importlib.util.find_spec("kornia") is None:
        return "kornia is not installed: pip install kornia."
    if w.dtype != "float32":
        return "kornia makes the grid in the image's dtype, with a map of that dtype; it is compared in fp32."
    if w.maps > 1:
        return "kornia takes one map per image."
    flow = kind == "displacement" and w.align_corners
    if len(w.size) == 3 or not (flow or kind in ("affine", "projective")):
        # Its homography_warp3d means another grid; its warp_image_tps gives no other size than the image's.
        return "kornia has no function that means the same; it is compared in 2-D: affine, projective, and remap."
    return _eager_available(workload, device)


TRI_STN = Provider("tri_stn", _tri_stn_available, _build_tri_stn)
EAGER = Provider("eager", _eager_available, _build_eager, rounds_grid=True)
COMPILE = Provider(
    "compile", _compile_available, _build_compile, _COMPILE_MODES, rounds_grid=True, slow_to_build=True, twice=False
)
CUDNN = Provider("cudnn", _cudnn_available, _build_cudnn, twice=False)
KORNIA = Provider("kornia", _kornia_available, _build_kornia, rounds_grid=True)
COPY = Provider("copy", lambda *_: None, lambda w, t: t.input.clone, is_limit=True)
PROVIDERS = {provider.name: provider for provider in (TRI_STN, EAGER, COPY, CUDNN, KORNIA, COMPILE)}


def device_copy(device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """The limit: a copy far larger than any cache, and the bytes that it reads and writes."""
    numel = 2**28 if device.type == "cuda" else 2**25
    source, target = torch.zeros(2, numel, device=device).unbind()
    return lambda: target.copy_(source), 2 * source.nbytes


def copy_of(moved: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that reads and writes so many bytes in all: what a workload's least traffic takes."""
    source, target = torch.zeros(2, max(1, moved // 2), dtype=torch.int8, device=device).unbind()
    return lambda: target.copy_(source)
