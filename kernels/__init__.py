"""Triton kernels of the sampler. They know tensors and triton, and nothing of the torch side."""

from .adjoint import adjoint
from .gather import gather

__all__ = ["adjoint", "gather"]
