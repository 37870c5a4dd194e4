"""Dense registration, with the calling convention of VoxelMorph.

A flow is a tensor (N, d, *size) in voxels: its component i moves along spatial axis i, so components lie in the order
of the shape, (z, y, x) for a volume, where the transforms of `tri_stn` have x first.

Source: Balakrishnan et al. 2019, "VoxelMorph: a learning framework for deformable medical image registration".
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..checks import check_floating
from ..diffeomorphic import Velocity
from ..functional import warp
from ..transforms import Displacement


class DisplacementWarp(nn.Module):
    """Read an image at the identity plus a flow: VoxelMorph's ``SpatialTransformer``.

    The voxel p of the output is ``src`` read at ``p + flow[:, :, p]``. The usual code adds a stored grid of indices,
    scales the sum by ``2 / (size - 1)`` and reads with `F.grid_sample` and ``align_corners=True``; the numbers are the
    same here, and neither grid nor sum is stored. One copy of the flow is, with its components in the other order, as a
    view can't turn them round. A network that gives x first (``x_first=True``) has its flow read where it lies.

    Args:
        mode: "bilinear", "nearest" (for label maps) or "bicubic".
        padding_mode: what lies outside the image: "zeros", as in VoxelMorph, "border" or "reflection".
        align_corners: under "reflection", whether borders mirror at the outermost voxels' centres (True) or at their
            outer edges. Otherwise of no effect: a flow in voxels means the same under both.
        x_first: the flow's components are in the order (x, y, z), not in that of the shape.
        sampler: what reads the image; any callable with the signature of `tri_stn.warp`.

    Example:
        >>> import torch, tri_stn
        >>> moving, flow = torch.rand(1, 1, 8, 8, 8), torch.zeros(1, 3, 8, 8, 8)
        >>> flow[:, 0] = 2  # reads two slices further down
        >>> moved = tri_stn.nn.DisplacementWarp()(moving, flow)
        >>> torch.allclose(moved[:, :, :6], moving[:, :, 2:], atol=1e-5)
        True
    """

    def __init__(
        self,
        mode: str = "bilinear",
        padding_mode: str = "zeros",
        align_corners: bool = True,
        *,
        x_first: bool = False,
        sampler: Callable[..., Tensor] = warp,
    ) -> None:
        super().__init__()
        self.mode, self.padding_mode, self.align_corners = mode, padding_mode, align_corners
        self.x_first, self.sampler = x_first, sampler

    def forward(self, src: Tensor, flow: Tensor) -> Tensor:
        """The moved image, (N, C, *size), in the dtype of ``src``.

        Args:
            src: (N, C, *size), 1-D, 2-D or 3-D, any dtype and strides that `tri_stn.warp` takes.
            flow: (N, d, *size) in voxels, any float dtype and strides; src and flow may have a batch of one.

        Raises:
            TypeError: the flow is not a floating-point tensor.
            ValueError: the shapes do not fit; and as `tri_stn.warp`.
        """
        _check_flow("DisplacementWarp", flow)
        if src.dim() != flow.dim() or src.shape[2:] != flow.shape[2:]:
            raise ValueError(
                "DisplacementWarp takes src (N, C, *size) and flow (N, d, *size) of the same size; got src "
                f"{tuple(src.shape)} and flow {tuple(flow.shape)}. Resize the flow, and scale it by the same factor."
            )
        transform = Displacement(_components_last(flow, self.x_first), unit="pixel")
        options = {"mode": self.mode, "padding_mode": self.padding_mode, "align_corners": self.align_corners}
        return self.sampler(src, transform, **options)

    def extra_repr(self) -> str:
        options = f"mode={self.mode!r}, padding_mode={self.padding_mode!r}, align_corners={self.align_corners}"
        return options + (", x_first=True" if self.x_first else "")


class ScalingAndSquaring(nn.Module):
    """The flow after one unit of time of a velocity in voxels: VoxelMorph's ``VecInt``, through `tri_stn.Velocity`.

    The result is a diffeomorphism's displacement, for `DisplacementWarp`. Beyond the outermost voxels, the field is
    read as they are ("border"). VecInt reads zeros there, so that what leaves the image stops; results differ where a
    trajectory leads outside, and nowhere else.

    Args:
        steps: how often the time is doubled, at least 0: VoxelMorph's ``int_steps``.
        x_first: components are in the order (x, y, z), not in that of the shape, in the velocity and in the result,
            which saves a copy of each.

    Raises:
        TypeError, ValueError: when called, as `tri_stn.Velocity`.

    Example:
        >>> import torch, tri_stn
        >>> velocity = torch.full((1, 2, 6, 6), 0.5)  # the same everywhere, so the flow is the velocity
        >>> flow = tri_stn.nn.ScalingAndSquaring(steps=7)(velocity)
        >>> torch.allclose(flow, velocity)
        True
    """

    def __init__(self, steps: int = 7, *, x_first: bool = False) -> None:
        super().__init__()
        self.steps, self.x_first = steps, x_first

    def forward(self, velocity: Tensor) -> Tensor:
        """The displacement (N, d, *size) in voxels; fp32 for a 16-bit velocity."""
        _check_flow("ScalingAndSquaring", velocity)
        moved = Velocity(_components_last(velocity, self.x_first), self.steps, unit="pixel").parameters
        return _components_first(moved, self.x_first)

    def extra_repr(self) -> str:
        return f"steps={self.steps}" + (", x_first=True" if self.x_first else "")


def _components_last(flow: Tensor, x_first: bool) -> Tensor:
    """(N, d, *size) → (N, *size, d) with x first; a view where the components are in that order already."""
    return (flow if x_first or flow.shape[1] == 1 else flow.flip(1)).movedim(1, -1)


def _components_first(field: Tensor, x_first: bool) -> Tensor:
    flow = field.movedim(-1, 1)
    return flow if x_first or flow.shape[1] == 1 else flow.flip(1)


def _check_flow(name: str, flow: Tensor) -> None:
    check_floating(flow, name, "the flow")
    if flow.dim() not in (3, 4, 5) or flow.shape[1] != flow.dim() - 2:
        raise ValueError(
            f"{name} takes a flow of shape (N, d, *size), a component for each of the d = 1, 2 or 3 spatial axes; "
            f"got {tuple(flow.shape)}."
        )
