"""Curved text made straight: a thin-plate spline between two rows of fiducial points."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..functional import warp
from .maps import ThinPlateSplineMap, real_device
from .transformer import SpatialTransformer


class TPSRectifier(SpatialTransformer):
    """Read a strip of text straight, which lies bent in the image: the rectification network of ASTER.

    Half of the fiducial points lie along the strip's upper edge, half along its lower one, evenly and from left to
    right. The localisation network says where each lies in the input, as a change from where it lies in the strip, and
    the thin-plate spline through them says where everything between is. A network that starts at zero gives the whole
    image, resized to the strip. Between the rows the spline bends less than along them, which more margin makes up for.

    Args:
        localisation: a module from the image to (N, 2 K), the changes of x and y of each point in turn, normalised;
            such as ``Convolutional(1, 40)``.
        size: (H, W) of the strip in pixels.
        fiducials: K, even and at least 4.
        margins: how far the points lie from the strip's edges, as a share of its width and of its height: one number
            for both, or (horizontal, vertical); ASTER has 0.05. The spline goes on beyond the points.
        bounds: how far a point may go, normalised: one number, or a tensor (2 K,). See `SpatialTransformer`.
        regularization: as of `tri_stn.ThinPlateSpline`.
        mode, padding_mode, align_corners, antialias, fill, sampler: as of `SpatialTransformer`, but with "border" for
            what lies outside.

    Shape:
        (N, C, H_in, W_in) → (N, C, *size).

    Raises:
        ValueError: fiducials is odd or below 4, or a margin is not in [0, 0.5); and as `SpatialTransformer`.

    Example:
        >>> import torch, tri_stn
        >>> rectifier = tri_stn.nn.TPSRectifier(tri_stn.nn.Convolutional(3, 40), size=(32, 100), fiducials=20)
        >>> strip, parameters = rectifier(torch.rand(2, 3, 64, 200), return_parameters=True)
        >>> strip.shape, rectifier.points(parameters).shape  # the second to draw on the image, or to supervise
        (torch.Size([2, 3, 32, 100]), torch.Size([2, 20, 2]))

    Source: Shi et al. 2018, "ASTER: an attentional scene text recognizer with flexible rectification", section 3.1.
    """

    def __init__(
        self,
        localisation: nn.Module,
        size: Sequence[int] = (32, 100),
        fiducials: int = 20,
        *,
        margins: float | Sequence[float] = 0.0,
        bounds: float | Tensor | None = None,
        regularization: float = 0.0,
        mode: str = "bilinear",
        padding_mode: str = "border",
        align_corners: bool = False,
        antialias: bool = False,
        fill: float | Sequence[float] | Tensor = 0,
        sampler: Callable[..., Tensor] = warp,
    ) -> None:
        super().__init__(
            localisation, ThinPlateSplineMap(_two_rows(fiducials, margins), regularization), size, bounds=bounds,
            mode=mode, padding_mode=padding_mode, align_corners=align_corners, antialias=antialias, fill=fill,
            sampler=sampler,
        )  # fmt: skip

    def points(self, parameters: Tensor) -> Tensor:
        """The fiducials' places in the input, (N, K, 2), normalised, x first, of parameters (N, 2 K)."""
        return parameters.unflatten(-1, (-1, 2))


def _two_rows(count: int, margins: float | Sequence[float]) -> Tensor:
    """(count, 2): the upper row from left to right, then the lower one."""
    if not isinstance(count, int) or count < 4 or count % 2:
        raise ValueError(f"fiducials must be an even number, at least 4, half of them in each row; got {count!r}.")
    shares = (margins, margins) if isinstance(margins, (int, float)) else tuple(margins)
    if len(shares) != 2 or not all(0 <= share < 0.5 for share in shares):
        raise ValueError(
            f"margins must be shares of the strip's width and height from 0 to below 0.5, one for both or two; got "
            f"{margins!r}."
        )
    right, low = (1 - 2 * share for share in shares)
    x = torch.linspace(-right, right, count // 2, device=real_device())
    return torch.cat([torch.stack([x, torch.full_like(x, y)], -1) for y in (-low, low)])
