"""Triton kernels of the sampler. They know tensors and triton, and nothing of the torch side."""

from . import launch, stages
from .adjoint import adjoint
from .chain import try_link
from .gather import gather

__all__ = ["adjoint", "gather", "launch", "stages", "try_link"]
