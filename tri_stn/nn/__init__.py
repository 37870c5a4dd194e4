"""Layers and losses: plain `torch.nn.Module`s around the sampler."""

from .losses import BendingEnergy, GradientLoss, LocalNCCLoss, bending_energy, gradient_loss, local_ncc
from .registration import DisplacementWarp, ScalingAndSquaring

__all__ = [
    "BendingEnergy",
    "DisplacementWarp",
    "GradientLoss",
    "LocalNCCLoss",
    "ScalingAndSquaring",
    "bending_energy",
    "gradient_loss",
    "local_ncc",
]
