"""What more than one file asks of its arguments."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_floating(tensor: object, name: str, argument: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} takes {argument} as a torch.Tensor; got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} takes {argument} in a floating-point dtype; got {tensor.dtype}. Convert it with .float()."
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} takes {argument} as a dense tensor; got layout {tensor.layout}. Convert it with .to_dense()."
        )
    return tensor


def check_devices(name: str, **tensors: Tensor) -> None:
    first, *others = tensors.values()
    if any(tensor.device != first.device for tensor in others):
        got = ", ".join(f"{argument} on {tensor.device}" for argument, tensor in tensors.items())
        raise ValueError(f"{name} takes tensors on one device; got {got}. Move one with .to().")


def check_size(name: str, size: object, dims: int) -> tuple[int, ...]:
    """A sequence of integers, numpy's among them, as those of Python."""
    try:
        if isinstance(size, Sequence):
            return tuple([n if type(n) is int else integer(n) for n in size])
    except TypeError:
        pass
    raise TypeError(f"{name} must be a sequence of {dims} integers, ({axis_names(dims)}); got {size!r}.")


def integer(number: Any) -> int:
    """An integer, of NumPy too, as one of Python. Raises TypeError for what is none."""
    if isinstance(number, torch.SymInt):
        return number  # type: ignore[return-value]  # as good as one
    if isinstance(number, (bool, Tensor)):  # a tensor's number the device may still be computing
        raise TypeError
    return operator.index(number)


def axis_names(dims: int) -> str:
    return ", ".join("DHW"[-dims:])
