"""Sums that do not depend on their order: fixed point in 64-bit integers.

Floating-point atomics add in whatever order the programs arrive, and each order rounds otherwise.
Integers add the same in any order. Each image has a scale of its own, a power of two as large as
the sum of all that may land on one pixel allows; a gradient of 2**20 bilinear samples is then summed
in steps of 2**-39 of its largest element or less. A gradient that is not finite makes NaN of its
whole image.
"""

import math

import torch

_BITS = 62
_LARGEST_EXPONENT = {torch.float32: 126, torch.float64: 1000}


def scale(largest, terms):
    """What each image's contributions are multiplied by before they are rounded to integers, (M,), where
    none is larger than `largest` (M,) and at most `terms` of them meet.
    """
    exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent, math.nan).to(largest.dtype)
    free = _BITS - math.ceil(math.log2(terms)) - exponent
    return torch.exp2(free.clamp(max=_LARGEST_EXPONENT[largest.dtype]))


def largest(grad_output, batch, maps, dtype):
    """The largest magnitude of each image's gradients, (M,); no weight is larger than one."""
    entries = torch.linalg.vector_norm(grad_output, math.inf, dim=tuple(range(1, grad_output.dim()))).to(dtype)
    entries = entries.unflatten(0, (-1, maps)).amax(1)
    return entries.repeat(batch // entries.shape[0])


def restore(integers, scale, grad_input, dtype):
    """The integers as numbers: in grad_input where that can hold sums of `dtype` (any, if None)."""
    fits = dtype is None or dtype == grad_input.dtype
    target = grad_input if fits else torch.empty_like(grad_input, dtype=dtype)
    return torch.mul(integers, scale.reciprocal().view(-1, *[1] * (integers.dim() - 1)), out=target)
