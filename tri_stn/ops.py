"""The sampler as PyTorch operators: registration, shapes for tracing, and the backend.

- ``tri_stn::warp_forward`` and ``tri_stn::warp_backward`` do the work; they have no gradient of
  their own. `autograd` puts the derivatives around them.
- ``tri_stn::warp``, ``tri_stn::warp_with_mask`` and ``tri_stn::splat`` are what `torch.compile` and
  `torch.export` see: one node of a graph, with the derivatives that `autograd` registers.

A transform crosses this border as its kind (a string) and one tensor of parameters (M, K, …): K
maps for each of the M images. Shapes: input (M, C, *input_size), output (M * K, C, *size). A tensor
whose batch is a divisor of M serves over and over, which is how `torch.vmap` leaves in place what
it does not map over.

Beside the parameters, a map may have an ``auxiliary`` tensor (A, …) of one size with the output, such as
a displacement field within a chain; zeros padding may have a ``fill`` value per channel, (C,); and
``supersample`` is how many samples along each axis make an output pixel, 0 for as many as the map
shrinks. ``project`` says how a volume's output is reduced along its depth, "" for not at all.

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

from . import cpu, cpu_rows, reference

_OPTIONS = "str kind, str mode, str padding_mode, bool align_corners, int supersample"
_MAP = "Tensor parameters, Tensor? auxiliary, Tensor? fill"
_TANGENTS = "Tensor? input_tangent, Tensor? parameters_tangent"

library = torch.library.Library("tri_stn", "DEF")
library.define(
    f"warp_forward(Tensor input, {_MAP}, {_TANGENTS}, SymInt[] size, str project, bool return_mask, {_OPTIONS})"
    " -> (Tensor, Tensor)"
)
library.define(
    f"warp_backward(Tensor grad_output, Tensor? input, {_MAP}, {_TANGENTS}, SymInt[] input_size, bool channels_last,"
    f" bool need_input, bool need_parameters, bool need_auxiliary, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
library.define(f"warp(Tensor input, {_MAP}, SymInt[] size, str project, {_OPTIONS}) -> Tensor")
library.define(f"warp_argmax(Tensor input, Tensor parameters, SymInt[] size, {_OPTIONS}) -> Tensor")
library.define(f"warp_with_mask(Tensor input, {_MAP}, SymInt[] size, str project, {_OPTIONS}) -> (Tensor, Tensor)")
library.define(f"splat(Tensor input, Tensor parameters, Tensor? auxiliary, SymInt[] size, {_OPTIONS}) -> Tensor")


# --- raw operators ---------------------------------------------------------------------------------


def _batch(*tensors: Tensor | None) -> int:
    """That of the largest, but 0 where one is empty, which cannot serve the others."""
    batches = [t.shape[0] for t in tensors if t is not None]
    return max(batches) if min(batches) else 0


def _allocate_output(
    input: Tensor, parameters: Tensor, auxiliary: Tensor | None, fill: Tensor | None,
    input_tangent: Tensor | None, parameters_tangent: Tensor | None,
    size: Sequence[int], project: str, return_mask: bool, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and a mask of one channel; an empty tensor stands for a mask that nobody asked for."""
    batch = _batch(input, parameters, auxiliary, input_tangent, parameters_tangent)
    size = size[1:] if project else size
    shape = (batch * parameters.shape[1], input.shape[1], *size)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input, len(shape)))
    return output, input.new_empty((shape[0], 1, *size) if return_mask else (0,))


def _warp_forward(
    input: Tensor, parameters: Tensor, auxiliary: Tensor | None, fill: Tensor | None,
    input_tangent: Tensor | None, parameters_tangent: Tensor | None,
    size: Sequence[int], project: str, return_mask: bool, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = (input, parameters, auxiliary, fill, input_tangent, parameters_tangent)
    if not project and not return_mask and _is_plain(input, *tensors[2:], *options):
        plain = cpu.warp(input, parameters, size, _memory_format(input, input.dim()), *options[:-1])
        if plain is not None:
            return plain, input.new_empty(0)
    output, mask = _allocate_output(*tensors, size, project, return_mask)
    if output.numel():
        with torch.cuda.device_of(input):  # where Triton launches; for CPU tensors it does nothing
            _backend(input, cpu_rows.suits(input, is_channels_last(input))).gather(
                output, *tensors, mask=mask if return_mask else None, **_named(options), **_projection(project, size)
            )
    elif mask.numel():  # no channels, and a mask all the same
        tensors = (input.new_ones(len(input), 1, *input.shape[2:]), parameters, auxiliary, None, None, None)
        _, mask = _warp_forward(*tensors, size, project, return_mask, *options)
    return output, mask


def warp_forward(*args: Any) -> tuple[Tensor, Tensor]:
    """``tri_stn::warp_forward``, without the dispatcher where that would come straight here."""
    return (_warp_forward if _is_direct(args[:6]) else torch.ops.tri_stn.warp_forward)(*args)


def _projection(project: str, size: Sequence[int]) -> dict[str, Any]:
    return {"project": project, "depth": size[0]} if project else {}


def _allocate_indices(input: Tensor, parameters: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    shape = (_batch(input, parameters) * parameters.shape[1], input.shape[1], *size[1:])
    return torch.empty(shape, dtype=torch.int32, device=input.device)


def _warp_argmax(input: Tensor, parameters: Tensor, size: Sequence[int], *options: Any) -> Tensor:
    """Where along the depth of the output the largest samples are, the first of equals: (M * K, C, *size[1:])."""
    indices = _allocate_indices(input, parameters, size)
    if indices.numel():
        with torch.cuda.device_of(input):
            _backend(input).gather(indices, input, parameters, **_named(options), **_projection("argmax", size))
    return indices


def _allocate_gradients(
    grad_output: Tensor, input: Tensor | None, parameters: Tensor, auxiliary: Tensor | None, fill: Tensor | None,
    input_tangent: Tensor | None, parameters_tangent: Tensor | None, input_size: Sequence[int],
    channels_last: bool, need_input: bool, need_parameters: bool, need_auxiliary: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the backward fills; an empty tensor stands for a gradient that nobody asked for."""
    batch = _batch(input, parameters, auxiliary, input_tangent, parameters_tangent)
    if parameters.shape[1] and batch:
        outputs = grad_output.shape[0] // parameters.shape[1]
        batch = max(batch, outputs) if outputs else 0
    layout = _CHANNELS_LAST[grad_output.dim()] if need_input and channels_last else torch.contiguous_format
    shape = (batch, grad_output.shape[1], *input_size) if need_input else (0,)
    grad_input = torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=layout)
    # From the kernels, a field's gradient lies in memory as the field does, which is as its network gave it and takes
    # it back; from torch's sampler on the CPU it comes as pairs.
    if need_parameters and parameters.shape[0] == batch and _takes_kernels(parameters):
        grad_parameters = torch.empty_like(parameters)
    else:
        grad_parameters = parameters.new_empty((batch, *parameters.shape[1:]) if need_parameters else (0,))
    grad_auxiliary = torch.empty_like(auxiliary) if need_auxiliary else parameters.new_empty(0)  # type: ignore[arg-type]
    return grad_input, grad_parameters, grad_auxiliary


def _warp_backward(
    grad_output: Tensor, input: Tensor | None, parameters: Tensor, auxiliary: Tensor | None, fill: Tensor | None,
    input_tangent: Tensor | None, parameters_tangent: Tensor | None, input_size: Sequence[int],
    channels_last: bool, need_input: bool, need_parameters: bool, need_auxiliary: bool, *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (grad_output, input, parameters, auxiliary, fill, input_tangent, parameters_tangent)
    needs = (need_input, need_parameters, need_auxiliary)
    if _is_plain(grad_output, *tensors[3:], *options):
        layout = _CHANNELS_LAST[grad_output.dim()] if channels_last else torch.contiguous_format
        plain_gradients = cpu.warp_backward(*tensors[:3], input_size, layout, *needs[:2], *options[:-1])
        if plain_gradients is not None:
            grad_input, grad_parameters = plain_gradients
            if grad_input is None:
                grad_input = grad_output.new_empty(0)
            return (
                grad_input,
                parameters.new_empty(0) if grad_parameters is None else grad_parameters,
                parameters.new_empty(0),
            )
    gradients = _allocate_gradients(*tensors, input_size, channels_last, *needs)
    if not (grad_output.numel() and _batch(*tensors[1:4])):
        for gradient in gradients:
            gradient.zero_()
        return gradients
    wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    with torch.cuda.device_of(grad_output):
        _backend(grad_output, cpu_rows.suits(grad_output, channels_last)).adjoint(
            *wanted, *tensors, **_named(options), deterministic=is_deterministic()
        )
    return gradients


def warp_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``tri_stn::warp_backward``, likewise."""
    return (_warp_backward if _is_direct(args[:7]) else torch.ops.tri_stn.warp_backward)(*args)


def _named(options: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(("kind", "mode", "padding_mode", "align_corners", "supersample"), options, strict=True))


def _bits(*names: str) -> int:
    return functools.reduce(
        int.__or__, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, n)).raw_repr() for n in names)
    )


_ORDINARY = _bits("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
_QUIET = _bits("BackendSelect", "ADInplaceOrView")


def _is_direct(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing lies between an operator and its implementation: the tensors are ordinary ones (no subclass that
    listens, fake tensor, lazy negation or zero), and no mode, default device, compiler, trace, transform or profiler is
    active. The dispatcher takes a fifth of a small warp's time.
    """
    if torch._C._has_torch_function(tensors) or torch.compiler.is_compiling():
        return False
    if torch.autograd.profiler._is_profiler_enabled or torch._C._dispatch_tls_local_include_set().raw_repr() & ~_QUIET:
        return False
    for tensor in tensors:
        if tensor is not None and torch._C._dispatch_keys(tensor).raw_repr() & ~_ORDINARY:
            return False
    return True


# --- one name for each, for graphs -----------------------------------------------------------------


def _warp(
    input: Tensor, parameters: Tensor, auxiliary: Tensor | None, fill: Tensor | None,
    size: Sequence[int], project: str, *options: Any,
) -> Tensor:  # fmt: skip
    return torch.ops.tri_stn.warp_forward(
        input, parameters, auxiliary, fill, None, None, size, project, False, *options
    )[0]


def _warp_fake(
    input: Tensor, parameters: Tensor, auxiliary: Tensor | None, fill: Tensor | None,
    size: Sequence[int], project: str, *_: Any,
) -> Tensor:  # fmt: skip
    return _allocate_output(input, parameters, auxiliary, fill, None, None, size, project, False)[0]


def _warp_with_mask(
    input: Tensor, parameters: Tensor, auxiliary: Tensor | None, fill: Tensor | None,
    size: Sequence[int], project: str, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = input, parameters, auxiliary, fill, None, None
    return torch.ops.tri_stn.warp_forward(*tensors, size, project, True, *options)


def _warp_with_mask_fake(
    input: Tensor, parameters: Tensor, auxiliary: Tensor | None, fill: Tensor | None,
    size: Sequence[int], project: str, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _allocate_output(input, parameters, auxiliary, fill, None, None, size, project, True)


def _splat(input: Tensor, parameters: Tensor, auxiliary: Tensor | None, size: Sequence[int], *options: Any) -> Tensor:
    tensors, flags = (input, None, parameters, auxiliary, None, None, None), (True, False, False)
    return torch.ops.tri_stn.warp_backward(*tensors, size, is_channels_last(input), *flags, *options)[0]


def _splat_fake(input: Tensor, parameters: Tensor, auxiliary: Tensor | None, size: Sequence[int], *_: Any) -> Tensor:
    tensors, flags = (input, None, parameters, auxiliary, None, None, None), (True, False, False)
    return _allocate_gradients(*tensors, size, is_channels_last(input), *flags)[0]


for _name, _implementation, _fake in (
    ("warp_forward", _warp_forward, _allocate_output),
    ("warp_backward", _warp_backward, _allocate_gradients),
    ("warp", _warp, _warp_fake),
    ("warp_argmax", _warp_argmax, _allocate_indices),
    ("warp_with_mask", _warp_with_mask, _warp_with_mask_fake),
    ("splat", _splat, _splat_fake),
):
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tri_stn::{_name}", _fake, lib=library)


# --- layout and backend ------------------------------------------------------------------------------

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(image: Tensor) -> bool:
    """Whether channels lie next to each other in memory: kept in the output and its gradient."""
    return image.dim() in _CHANNELS_LAST and image.shape[1] > 1 and image.stride(1) == 1 and not image.is_contiguous()


def _memory_format(image: Tensor, rank: int) -> torch.memory_format:
    """An image's order of memory, for an output of so many dimensions."""
    return _CHANNELS_LAST[rank] if is_channels_last(image) else torch.contiguous_format


def is_deterministic() -> bool:
    """Whether sums must not depend on the order in which programs run."""
    return torch.are_deterministic_algorithms_enabled()


def _takes_kernels(tensor: Tensor) -> bool:
    """Whether it is on a GPU, or kernels are interpreted."""
    return tensor.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


def _is_plain(
    image: Tensor, auxiliary: Tensor | None, fill: Tensor | None, input_tangent: Tensor | None,
    parameters_tangent: Tensor | None, *options: Any,
) -> bool:  # fmt: skip
    """Whether `cpu` may serve: a CPU tensor outside of Triton's interpreter, one sample per pixel, nothing beside."""
    if _takes_kernels(image) or options[-1] != 1:
        return False
    return auxiliary is None and fill is None and input_tangent is None and parameters_tangent is None


def _backend(image: Tensor, rows: bool = False) -> ModuleType:
    """Where a tensor's work is done: the kernels, or on the CPU the reference, of pixels that may be rows."""
    if not _takes_kernels(image):
        return cpu_rows if rows else reference
    if image.device.type in ("cpu", "cuda"):
        return kernels()
    raise NotImplementedError(
        f"tri_stn runs on CUDA and ROCm devices and on the CPU; got a tensor on {image.device}. "
        "Move it with .cuda() or .cpu()."
    )


@functools.cache
def kernels() -> ModuleType:
    """The kernels, imported on first use: CPU users need no Triton."""
    try:
        from . import kernels as package  # type: ignore[attr-defined]  # mapped there by setuptools
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "triton":
            raise
        raise ModuleNotFoundError(
            "tri_stn's GPU kernels need Triton, which is not installed: pip install triton. (CPU tensors need none.)",
            name="triton",
        ) from error
    return package
