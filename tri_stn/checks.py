"""What more than one file asks of its arguments."""

from torch import Tensor


def check_floating(tensor: object, name: str, argument: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} takes {argument} as a torch.Tensor; got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} takes {argument} in a floating-point dtype; got {tensor.dtype}. Convert it with .float()."
        )
    return tensor


def check_devices(name: str, **tensors: Tensor) -> None:
    first, *others = tensors.values()
    if any(tensor.device != first.device for tensor in others):
        got = ", ".join(f"{argument} on {tensor.device}" for argument, tensor in tensors.items())
        raise ValueError(f"{name} takes tensors on one device; got {got}. Move one with .to().")
