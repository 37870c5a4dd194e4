"""The sampler as PyTorch operators: registration, shapes for tracing, and the backend.

- ``tri_stn::warp_forward`` and ``tri_stn::warp_backward`` do the work; they have no gradient of
  their own. `autograd` puts the derivatives around them.
- ``tri_stn::warp`` and ``tri_stn::splat`` are what `torch.compile` and `torch.export` see: one node of a
  graph, with the derivatives that `autograd` registers.

A transform crosses this border as its kind (a string) and one tensor of parameters (M, K, …): K
maps for each of the M images. Shapes: input (M, C, *input_size), output (M * K, C, *size). A tensor
whose batch is a divisor of M serves over and over, which is how `torch.vmap` leaves in place what
it does not map over.

Both raw operators also compute what their results change by where the parameters move by
``parameters_tangent`` and, if given, the input by ``input_tangent``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference

_OPTIONS = "str kind, str mode, str padding_mode, bool align_corners"
_TANGENTS = "Tensor? input_tangent, Tensor? parameters_tangent"

library = torch.library.Library("tri_stn", "DEF")
library.define(f"warp_forward(Tensor input, Tensor parameters, {_TANGENTS}, SymInt[] size, {_OPTIONS}) -> Tensor")
library.define(
    f"warp_backward(Tensor grad_output, Tensor? input, Tensor parameters, {_TANGENTS}, SymInt[] input_size,"
    f" bool channels_last, bool need_input, bool need_parameters, {_OPTIONS}) -> (Tensor, Tensor)"
)
library.define(f"warp(Tensor input, Tensor parameters, SymInt[] size, {_OPTIONS}) -> Tensor")
library.define(f"splat(Tensor input, Tensor parameters, SymInt[] size, {_OPTIONS}) -> Tensor")


# --- raw operators ---------------------------------------------------------------------------------


def _allocate_output(
    input: Tensor, parameters: Tensor, input_tangent: Tensor | None, parameters_tangent: Tensor | None,
    size: Sequence[int], *_: Any,
) -> Tensor:  # fmt: skip
    batch = max(t.shape[0] for t in (input, parameters, input_tangent, parameters_tangent) if t is not None)
    shape = (batch * parameters.shape[1], input.shape[1], *size)
    layout = _CHANNELS_LAST[input.dim()] if is_channels_last(input) else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


def _warp_forward(
    input: Tensor, parameters: Tensor, input_tangent: Tensor | None, parameters_tangent: Tensor | None,
    size: Sequence[int], kind: str, mode: str, padding_mode: str, align_corners: bool,
) -> Tensor:  # fmt: skip
    output = _allocate_output(input, parameters, input_tangent, parameters_tangent, size)
    if output.numel():
        with torch.cuda.device_of(input):  # where Triton launches; for CPU tensors it does nothing
            _backend(input).gather(
                output, input, parameters, input_tangent, parameters_tangent,
                kind=kind, mode=mode, padding_mode=padding_mode, align_corners=align_corners,
            )  # fmt: skip
    return output


def _allocate_gradients(
    grad_output: Tensor, input: Tensor | None, parameters: Tensor,
    input_tangent: Tensor | None, parameters_tangent: Tensor | None, input_size: Sequence[int],
    channels_last: bool, need_input: bool, need_parameters: bool, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the backward fills; an empty tensor stands for a gradient that nobody asked for."""
    tensors = (input, parameters, input_tangent, parameters_tangent)
    batch = max(t.shape[0] for t in tensors if t is not None)
    if parameters.shape[1]:
        batch = max(batch, grad_output.shape[0] // parameters.shape[1])
    layout = _CHANNELS_LAST[grad_output.dim()] if need_input and channels_last else torch.contiguous_format
    shape = (batch, grad_output.shape[1], *input_size) if need_input else (0,)
    grad_input = torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=layout)
    return grad_input, parameters.new_empty((batch, *parameters.shape[1:]) if need_parameters else (0,))


def _warp_backward(
    grad_output: Tensor, input: Tensor | None, parameters: Tensor,
    input_tangent: Tensor | None, parameters_tangent: Tensor | None, input_size: Sequence[int],
    channels_last: bool, need_input: bool, need_parameters: bool,
    kind: str, mode: str, padding_mode: str, align_corners: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradients = _allocate_gradients(
        grad_output, input, parameters, input_tangent, parameters_tangent,
        input_size, channels_last, need_input, need_parameters,
    )  # fmt: skip
    if not grad_output.numel():
        return gradients[0].zero_(), gradients[1].zero_()
    grad_input, grad_parameters = gradients[0] if need_input else None, gradients[1] if need_parameters else None
    with torch.cuda.device_of(grad_output):
        _backend(grad_output).adjoint(
            grad_input, grad_parameters, grad_output, input, parameters, input_tangent, parameters_tangent,
            kind=kind, mode=mode, padding_mode=padding_mode, align_corners=align_corners,
            deterministic=is_deterministic(),
        )  # fmt: skip
    return gradients


# --- one name for each, for graphs -----------------------------------------------------------------


def _warp(input: Tensor, parameters: Tensor, size: Sequence[int], *options: Any) -> Tensor:
    return torch.ops.tri_stn.warp_forward(input, parameters, None, None, size, *options)


def _warp_fake(input: Tensor, parameters: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    return _allocate_output(input, parameters, None, None, size)


def _splat(input: Tensor, parameters: Tensor, size: Sequence[int], *options: Any) -> Tensor:
    flags = is_channels_last(input), True, False
    return torch.ops.tri_stn.warp_backward(input, None, parameters, None, None, size, *flags, *options)[0]


def _splat_fake(input: Tensor, parameters: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    return _allocate_gradients(input, None, parameters, None, None, size, is_channels_last(input), True, False)[0]


for _name, _implementation, _fake in (
    ("warp_forward", _warp_forward, _allocate_output),
    ("warp_backward", _warp_backward, _allocate_gradients),
    ("warp", _warp, _warp_fake),
    ("splat", _splat, _splat_fake),
):
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tri_stn::{_name}", _fake, lib=library)


# --- layout and backend ------------------------------------------------------------------------------

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(image: Tensor) -> bool:
    """Whether channels lie next to each other in memory: kept in the output and its gradient."""
    return image.dim() in _CHANNELS_LAST and image.shape[1] > 1 and image.stride(1) == 1 and not image.is_contiguous()


def is_deterministic() -> bool:
    """Whether sums must not depend on the order in which programs run."""
    return torch.are_deterministic_algorithms_enabled()


def _backend(image: Tensor) -> ModuleType:
    """Where a tensor's work is done: the kernels, or the reference on the CPU."""
    if image.device.type == "cpu":
        return _kernels() if os.environ.get("TRITON_INTERPRET") == "1" else reference
    if image.device.type == "cuda":
        return _kernels()
    raise NotImplementedError(
        f"tri_stn runs on CUDA and ROCm devices and on the CPU; got a tensor on {image.device}. "
        "Move it with .cuda() or .cpu()."
    )


@functools.cache
def _kernels() -> ModuleType:
    """The kernels, imported on first use: CPU users need no Triton."""
    try:
        from . import kernels  # type: ignore[attr-defined]  # mapped there by setuptools
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "triton":
            raise
        raise ModuleNotFoundError(
            "tri_stn's GPU kernels need Triton, which is not installed: pip install triton. (CPU tensors need none.)",
            name="triton",
        ) from error
    return kernels
