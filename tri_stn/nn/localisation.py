"""Localisation networks: an image or a feature map in, the parameters of a map out.

Their last layer starts at zero, which a `SpatialTransformer` takes for the identity, as the paper starts.
Any other module that gives (N, out_features) will do as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVERAGE_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class FullyConnected(nn.Sequential):
    """A fully connected localisation network: linear layers with ReLU between them, on the flattened input.

    Args:
        in_features: numbers of one input, C × H × W.
        out_features: numbers that the map takes, ``.count`` of its class times the maps per image.
        hidden: the width of each layer in between.

    Shape:
        (N, C, *size), any size of ``in_features`` numbers, → (N, out_features).

    Example:
        >>> import torch, tri_stn
        >>> localisation = tri_stn.nn.FullyConnected(1 * 28 * 28, 6)
        >>> localisation(torch.rand(5, 1, 28, 28)).abs().max().item()  # at first, no change from the identity
        0.0
    """

    def __init__(self, in_features: int, out_features: int, hidden: Sequence[int] = (32, 32, 32)) -> None:
        widths = [in_features, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, width in pairwise(widths):
            layers += [nn.Linear(before, width), nn.ReLU()]
        super().__init__(*layers, _zero(nn.Linear(widths[-1], out_features)))


class Convolutional(nn.Sequential):
    """A convolutional localisation network: convolution, max-pooling and ReLU per layer, then two linear layers.

    Args:
        in_channels: channels of the input.
        out_features: numbers that the map takes, ``.count`` of its class times the maps per image.
        channels: of each convolution.
        kernel_size: of the convolutions, which keep the size; each is followed by pooling to half of it.
        pool: the last feature map is averaged to this many cells along each axis, so that images of any size will
            do. (On CUDA, the gradient of this average has no deterministic form in torch.)
        hidden: width of the layer between features and parameters.
        dims: spatial dimensions, 1, 2 or 3.

    Shape:
        (N, in_channels, *size), at least ``2 ** len(channels)`` pixels along each axis, → (N, out_features).

    Raises:
        ValueError: dims is not 1, 2 or 3.

    Example:
        >>> import torch, tri_stn
        >>> localisation = tri_stn.nn.Convolutional(3, 6)
        >>> localisation(torch.rand(5, 3, 64, 48)).shape
        torch.Size([5, 6])
    """

    def __init__(
        self, in_channels: int, out_features: int, channels: Sequence[int] = (20, 20), kernel_size: int = 5,
        pool: int = 6, hidden: int = 32, dims: int = 2,
    ) -> None:  # fmt: skip
        if dims not in _CONVOLUTIONS:
            raise ValueError(f"Convolutional takes dims 1, 2 or 3; got {dims!r}.")
        layers: list[nn.Module] = []
        for before, after in pairwise([in_channels, *channels]):
            convolution = _CONVOLUTIONS[dims](before, after, kernel_size, padding=kernel_size // 2)
            layers += [convolution, _MAX_POOLS[dims](2), nn.ReLU()]
        features = [in_channels, *channels][-1] * pool**dims
        layers += [_AVERAGE_POOLS[dims](pool), nn.Flatten(), nn.Linear(features, hidden), nn.ReLU()]
        super().__init__(*layers, _zero(nn.Linear(hidden, out_features)))


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
