"""Tensors to kernel arguments: sizes and strides x first, and what follows from dtype and layout."""

import math

import torch
import triton.language as tl

_INT32_MAX = 2**31 - 1
_BATCHED = ("input", "input_tangent", "parameters", "parameters_tangent", "grad_output")


def size(image):
    """(N, C, *size) → its spatial size, x first."""
    return tuple(reversed(image.shape[2:]))


def strides(image):
    """(N, C, *size) → strides of n, of c and of the pixels, x first."""
    stride = image.stride()
    return stride[0], stride[1], *reversed(stride[2:])


def parameter_strides(parameters):
    """(N, K, *size, d) of a dense map → strides of n, of k, of the pixels, x first, and of the components."""
    stride = parameters.stride()
    return stride[0], stride[1], *reversed(stride[2:-1]), stride[-1]


def shared_strides(field):
    """The same of a field that may serve all maps of an image."""
    n, k, *rest = parameter_strides(field)
    return n, 0 if field.shape[1] == 1 else k, *rest


def packed(dense, parameters, tangent):
    """Parameters and their tangent, the parameters themselves where there is none, as the kernels read
    them: a dense map in place, a few numbers per map next to each other.
    """
    given = (parameters,) if tangent is None else (parameters, tangent)
    if not dense:
        given = tuple(numbers.contiguous() for numbers in given)
    return given[0], given[-1]


def packed_fill(fill):
    """The fill as the kernels read it, channels next to each other; None where there is none."""
    return None if fill is None else fill.contiguous()


COUNTS = ["maps", "slots", *(f"{name}_batch" for name in _BATCHED)]
"""Arguments that take any value: a compilation for each would serve nobody."""


def batches(*tensors):
    return tuple(t.shape[0] for t in tensors)


def count(parameters):
    """Numbers per map in parameters (M, K, …)."""
    return math.prod(parameters.shape[2:])


def present(*tensors):
    """Those that are not None."""
    return tuple(t for t in tensors if t is not None)


def is_channels_last(image):
    """Whether channels lie next to each other in memory, and more than one channel does."""
    return image.shape[1] > 1 and image.stride(1) == 1 and not image.is_contiguous()


def compute_dtype(dtype):
    """What coordinates, weights and sums are computed in, for images of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def constants(*images, parameters):
    """Compile-time arguments that follow from the tensors: images, or what else has numbers of its own for each; the
    first decides the dtype.
    """
    far = max(*(_reach(i, 1) for i in images), *(_reach(p, 2) for p in parameters))
    return {
        "COMPUTE": tl.float64 if images[0].dtype == torch.float64 else tl.float32,
        "INDEX": tl.int64 if far > _INT32_MAX else tl.int32,
    }


def is_far(constants):
    """Whether a launch with these constants computes offsets in 64 bits."""
    return constants["INDEX"] == tl.int64


def _reach(tensor, first):
    """The largest element offset along the dimensions from `first` on."""
    return sum((n - 1) * s for n, s in zip(tensor.shape[first:], tensor.stride()[first:], strict=True))
