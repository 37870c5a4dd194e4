"""The sampler as PyTorch operators: registration, shapes for tracing, gradients, and the backend.

Three layers, because no single one serves everybody:

- raw operators ``tri_stn::warp_forward`` and ``tri_stn::warp_backward``, with no gradient of their
  own: what a graph holds and what picks the backend;
- `torch.autograd.Function`s around them, for eager code: the shortest road;
- ``tri_stn::warp`` with a registered gradient, for `torch.compile` and `torch.export`.

A transform crosses this border as its kind (a string) and one tensor of parameters (M, K, …):
K maps for each of the M images.
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

_OPTIONS = "str kind, SymInt[] size, str mode, str padding_mode, bool align_corners"

_library = torch.library.Library("tri_stn", "DEF")
_library.define(f"warp_forward(Tensor input, Tensor parameters, {_OPTIONS}) -> Tensor")
_library.define(
    "warp_backward(Tensor grad_output, Tensor? input, Tensor parameters, SymInt[] input_shape, bool channels_last,"
    " str kind, str mode, str padding_mode, bool align_corners, bool need_input, bool need_parameters)"
    " -> (Tensor, Tensor)"
)
_library.define(f"warp(Tensor input, Tensor parameters, {_OPTIONS}) -> Tensor")


def warp(
    input: Tensor, parameters: Tensor, kind: str, size: Sequence[int],
    mode: str, padding_mode: str, align_corners: bool,
) -> Tensor:  # fmt: skip
    """Input (M, C, *input_size) read through parameters (M, K, …) → (M * K, C, *size)."""
    args = (input, parameters, kind, size, mode, padding_mode, align_corners)
    if torch.compiler.is_compiling():
        return torch.ops.tri_stn.warp(*args)
    return _Warp.apply(*args)


# --- raw operators ---------------------------------------------------------------------------------


def _allocate_output(input: Tensor, parameters: Tensor, size: Sequence[int]) -> Tensor:
    shape = (parameters.shape[0] * parameters.shape[1], input.shape[1], *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


def _warp_forward(
    input: Tensor, parameters: Tensor, kind: str, size: Sequence[int],
    mode: str, padding_mode: str, align_corners: bool,
) -> Tensor:  # fmt: skip
    output = _allocate_output(input, parameters, size)
    if output.numel():
        with torch.cuda.device_of(input):  # where Triton launches; for CPU tensors it does nothing
            _backend(input).gather(
                output, input, parameters, kind=kind, mode=mode, padding_mode=padding_mode, align_corners=align_corners
            )
    return output


def _warp_forward_fake(input: Tensor, parameters: Tensor, kind: str, size: Sequence[int], *_: Any) -> Tensor:
    return _allocate_output(input, parameters, size)


def _allocate_gradients(
    grad_output: Tensor, parameters: Tensor, input_shape: Sequence[int], channels_last: bool,
    need_input: bool, need_parameters: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the backward fills; an empty tensor stands for a gradient that nobody asked for."""
    layout = _CHANNELS_LAST[len(input_shape)] if need_input and channels_last else torch.contiguous_format
    grad_input = torch.empty(
        input_shape if need_input else (0,), dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
    )
    grad_parameters = torch.empty_like(parameters) if need_parameters else parameters.new_empty((0,))
    return grad_input, grad_parameters


def _warp_backward(
    grad_output: Tensor, input: Tensor | None, parameters: Tensor, input_shape: Sequence[int], channels_last: bool,
    kind: str, mode: str, padding_mode: str, align_corners: bool, need_input: bool, need_parameters: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradients = _allocate_gradients(grad_output, parameters, input_shape, channels_last, need_input, need_parameters)
    if not grad_output.numel():
        return gradients[0].zero_(), gradients[1].zero_()
    grad_input, grad_parameters = gradients[0] if need_input else None, gradients[1] if need_parameters else None
    with torch.cuda.device_of(grad_output):
        _backend(grad_output).adjoint(
            grad_input, grad_parameters, grad_output, input, parameters,
            kind=kind, mode=mode, padding_mode=padding_mode, align_corners=align_corners,
        )  # fmt: skip
    return gradients


def _warp_backward_fake(
    grad_output: Tensor, input: Tensor | None, parameters: Tensor, input_shape: Sequence[int], channels_last: bool,
    kind: str, mode: str, padding_mode: str, align_corners: bool, need_input: bool, need_parameters: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _allocate_gradients(grad_output, parameters, input_shape, channels_last, need_input, need_parameters)


for _name, _implementation, _fake in (
    ("warp_forward", _warp_forward, _warp_forward_fake),
    ("warp_backward", _warp_backward, _warp_backward_fake),
    ("warp", _warp_forward, _warp_forward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tri_stn::{_name}", _fake, lib=_library)


# --- gradients -------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, parameters, ctx.kind, _, *ctx.options = inputs
    ctx.need_input, ctx.need_parameters = ctx.needs_input_grad[:2]
    # The warp is linear in the image: only the transform's gradient has to see it again.
    ctx.save_for_backward(input if ctx.need_parameters else None, parameters)
    ctx.input_shape, ctx.channels_last = input.shape, _memory_format(input) != torch.contiguous_format


def _backward(ctx: Any, grad_output: Tensor) -> tuple:
    input, parameters = ctx.saved_tensors
    grad_input, grad_parameters = torch.ops.tri_stn.warp_backward(
        grad_output, input, parameters, ctx.input_shape, ctx.channels_last,
        ctx.kind, *ctx.options, ctx.need_input, ctx.need_parameters,
    )  # fmt: skip
    nothing = (None,) * 5
    return grad_input if ctx.need_input else None, grad_parameters if ctx.need_parameters else None, *nothing


class _Warp(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.tri_stn.warp_forward(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(torch.autograd.function.once_differentiable(_backward))  # type: ignore[assignment]


torch.library.register_autograd("tri_stn::warp", _backward, setup_context=_setup_context, lib=_library)


# --- layout and backend ------------------------------------------------------------------------------

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _memory_format(image: Tensor) -> torch.memory_format:
    """channels_last if that is how the image lies in memory: kept in the output and its gradient."""
    if image.dim() in _CHANNELS_LAST and image.shape[1] > 1 and image.stride(1) == 1 and not image.is_contiguous():
        return _CHANNELS_LAST[image.dim()]
    return torch.contiguous_format


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
