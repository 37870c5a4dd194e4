"""Sums that do not depend on their order: fixed point in 64-bit integers.

Floating-point atomics add in whatever order the programs arrive, and each order rounds otherwise.
Integers add the same in any order. Each image has a scale of its own, a power of two as large as
the sum of all that may land on one pixel allows; a gradient of 2**20 samples is then summed in
steps of less than 2**-38 of its largest element. A gradient that is not finite makes NaN of its
whole image.
"""

import math

import torch

_BITS = 62
_LARGEST_EXPONENT = {torch.float32: 126, torch.float64: 1000}


def scale(grad_output, parameters_tangent, grad_input, maps, dense):
    """What each image's contributions are multiplied by before they are rounded to integers, (M,)."""
    compute = torch.float64 if grad_input.dtype == torch.float64 else torch.float32
    dims, batch = grad_input.dim() - 2, grad_input.shape[0]
    exponent = _exponent(grad_output, compute).unflatten(0, (-1, maps)).amax(1)
    exponent = exponent.repeat(batch // exponent.shape[0])
    # A sample's weights add up to less than 2 per axis in magnitude, and all samples may meet.
    terms = maps * math.prod(grad_output.shape[2:]) * 2**dims
    if parameters_tangent is not None:
        # Slopes add up to less than 4 per axis; coordinates are within one unit of the middle.
        terms *= 4 * dims * max(grad_input.shape[2:]) * (1 if dense else dims + 1)
        tangent = _exponent(parameters_tangent, compute)
        exponent = exponent + tangent.repeat(batch // tangent.shape[0])
    free = _BITS - math.ceil(math.log2(terms)) - exponent
    return torch.exp2(free.clamp(max=_LARGEST_EXPONENT[compute]))


def restore(integers, scale, grad_input, dtype):
    """The integers as numbers: in grad_input where that can hold sums of `dtype` (any, if None)."""
    fits = dtype is None or dtype == grad_input.dtype
    target = grad_input if fits else torch.empty_like(grad_input, dtype=dtype)
    return torch.mul(integers, scale.reciprocal().view(-1, *[1] * (integers.dim() - 1)), out=target)


def _exponent(tensor, dtype):
    """The power of two above each entry's largest magnitude, (N,); NaN if that is not finite."""
    largest = torch.linalg.vector_norm(tensor, math.inf, dim=tuple(range(1, tensor.dim()))).to(dtype)
    return torch.where(largest.isfinite(), torch.frexp(largest).exponent, math.nan).to(dtype)
