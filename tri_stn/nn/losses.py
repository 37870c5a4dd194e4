"""What a registration is trained by: similarity of images, smoothness of displacements.

All are computed in fp32 for 16-bit tensors, under autocast too, and in fp64 for fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_floating

PENALTIES = {"l1": F.l1_loss, "l2": F.mse_loss}


def gradient_loss(displacement: Tensor, penalty: str = "l2", spacing: float | Sequence[float] = 1.0) -> Tensor:
    """How fast a field varies: the mean of its first derivatives, squared or in magnitude.

    Differences of neighbours over ``spacing``; the mean over samples, components and places, then over the axes: as
    VoxelMorph's ``Grad``. Linear fields have exactly the value of their formula. Autograd keeps the field alone.

    Args:
        displacement: (N, C, *size), 1-D, 2-D or 3-D, any float dtype; any number of components, in any order.
        penalty: "l2", the mean of squares, or "l1", of magnitudes.
        spacing: the distance between neighbours, one number or one per axis in the order of the shape.

    Returns:
        A scalar, 0 for a constant field. An axis of one place counts as constant.

    Raises:
        TypeError: the displacement is not a floating-point tensor.
        ValueError: its shape, the penalty or the spacing does not fit.

    Example:
        >>> import torch, tri_stn
        >>> ramp = torch.arange(5.0).expand(1, 1, 4, 5)  # slope 1 along x, 0 along y
        >>> tri_stn.nn.gradient_loss(ramp), tri_stn.nn.gradient_loss(ramp, spacing=(1, 0.5))
        (tensor(0.5000), tensor(2.))
    """
    field, spacings = _check_field("gradient_loss", displacement, spacing)
    if penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {', '.join(map(repr, PENALTIES))}; got {penalty!r}.")
    total = _nothing(field)
    for axis, step in enumerate(spacings, 2):
        if field.shape[axis] > 1:
            total = total + PENALTIES[penalty](*_neighbours(field, axis)) / step ** (2 if penalty == "l2" else 1)
    return total / len(spacings)


def bending_energy(displacement: Tensor, spacing: float | Sequence[float] = 1.0) -> Tensor:
    """How much a field bends: the mean of its squared second derivatives, summed over all pairs of axes.

    So mixed derivatives count twice. The mean is over samples, components and the places where the difference exists:
    u₋ - 2 u + u₊ along an axis, and the four corners of a cell for a mixed one, which see patterns that alternate from
    voxel to voxel. Quadratic polynomials have exactly the value of their formula; affine ones have 0. Autograd keeps
    one field per axis.

    Args:
        displacement: (N, C, *size), 1-D, 2-D or 3-D, any float dtype; any number of components, in any order.
        spacing: the distance between neighbours, one number or one per axis in the order of the shape.

    Returns:
        A scalar. An axis too short for a derivative adds nothing for it.

    Raises:
        TypeError, ValueError: as `gradient_loss`.

    Example:
        >>> import torch, tri_stn
        >>> parabola = torch.arange(5.0).square().expand(1, 1, 4, 5)  # second derivative 2 along x
        >>> tri_stn.nn.bending_energy(parabola)
        tensor(4.)

    Source: Rueckert et al. 1999, "Nonrigid registration using free-form deformations", equation 9.
    """
    field, spacings = _check_field("bending_energy", displacement, spacing)
    total = _nothing(field)
    for a in range(len(spacings)):
        if field.shape[a + 2] < 2:
            continue
        slope = field.diff(dim=a + 2)
        for b in range(a, len(spacings)):
            if slope.shape[b + 2] > 1:
                squares = F.mse_loss(*_neighbours(slope, b + 2))
                total = total + (1 if a == b else 2) * squares / (spacings[a] * spacings[b]) ** 2
    return total


def local_ncc(input: Tensor, target: Tensor, window: int | Sequence[int] = 9, eps: float = 1e-4) -> Tensor:
    """How alike two images are up to local brightness and contrast: squared local correlation, 0 to 1, to **maximise**.

    At each place the squared correlation coefficient of the two images over the window around it, and the mean of that:
    as VoxelMorph's ``NCC``, whose loss is its negative. A window that reaches outside the image has the voxels inside
    alone, where VoxelMorph counts zeros. To each variance, ``eps`` of that of its whole image is added, so that places
    flatter than that tend to 0 instead of correlating noise, whatever the images' brightness and contrast.

    Autograd keeps the two images, and the backward pass computes the rest anew.

    Args:
        input, target: (N, C, *size), 1-D, 2-D or 3-D, the same shape and device, any float dtypes. Both may require
            grad; where only one does, the other's gradient is not computed.
        window: voxels along each axis, odd; one number or one per axis in the order of the shape.
        eps: the share of an image's variance below which it counts as flat; not below 1e-5 in fp32, whose rounding it
            hides.

    Returns:
        A scalar: the mean over samples, channels and places.

    Raises:
        TypeError: an image is not a floating-point tensor.
        ValueError: shapes, window or eps do not fit.

    Example:
        >>> import torch, tri_stn
        >>> image = torch.rand(1, 1, 16, 16)
        >>> bool(tri_stn.nn.local_ncc(image, 3 - 2 * image) > 0.99)
        True
        >>> bool(tri_stn.nn.local_ncc(image, torch.rand(1, 1, 16, 16)) < 0.2)
        True
    """
    check_floating(input, "local_ncc", "input")
    check_floating(target, "local_ncc", "target")
    if input.shape != target.shape or input.dim() not in (3, 4, 5):
        raise ValueError(
            "local_ncc takes two images of the same shape (N, C, *size), 1-D, 2-D or 3-D; got input "
            f"{tuple(input.shape)} and target {tuple(target.shape)}."
        )
    dims = input.dim() - 2
    windows = tuple(window) if isinstance(window, Iterable) else (window,) * dims
    if len(windows) != dims or any(not isinstance(w, Integral) or w < 1 or w % 2 == 0 for w in windows):
        raise ValueError(f"window must be an odd number of voxels, or {dims} of them, one per axis; got {window!r}.")
    if not eps > 0:
        raise ValueError(f"eps must be positive, a share of the image's variance; got {eps!r}.")
    wide = torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32)
    pair = input.to(wide), target.to(wide)
    transformed = torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if torch.autograd.forward_ad._current_level < 0 and not transformed:
        return _LocalNCC.apply(*pair, windows, eps)
    # In forward mode, which keeps nothing, torch's own operations have all orders; Dynamo maps over these alone.
    a, b, c, _, _ = _local_moments(_centred(pair[0]), _centred(pair[1]), windows, eps)
    return (a / b * (a / c)).mean()


class GradientLoss(nn.Module):
    """`gradient_loss` as a module.

    Example:
        >>> import torch, tri_stn
        >>> tri_stn.nn.GradientLoss(penalty="l1")(torch.arange(4.0)[None, None])
        tensor(1.)
    """

    def __init__(self, penalty: str = "l2", spacing: float | Sequence[float] = 1.0) -> None:
        super().__init__()
        self.penalty, self.spacing = penalty, spacing

    def forward(self, displacement: Tensor) -> Tensor:
        return gradient_loss(displacement, self.penalty, self.spacing)

    def extra_repr(self) -> str:
        return f"penalty={self.penalty!r}, spacing={self.spacing}"


class BendingEnergy(nn.Module):
    """`bending_energy` as a module.

    Example:
        >>> import torch, tri_stn
        >>> tri_stn.nn.BendingEnergy(spacing=2.0)(torch.arange(4.0).square()[None, None])
        tensor(0.2500)
    """

    def __init__(self, spacing: float | Sequence[float] = 1.0) -> None:
        super().__init__()
        self.spacing = spacing

    def forward(self, displacement: Tensor) -> Tensor:
        return bending_energy(displacement, self.spacing)

    def extra_repr(self) -> str:
        return f"spacing={self.spacing}"


class LocalNCCLoss(nn.Module):
    """1 - `local_ncc`: a loss from 0 to 1, to **minimise**, with the gradient of VoxelMorph's ``NCC``.

    Example:
        >>> import torch, tri_stn
        >>> image = torch.rand(1, 1, 16, 16)
        >>> bool(tri_stn.nn.LocalNCCLoss(window=7)(image, 2 * image) < 0.01)
        True
    """

    def __init__(self, window: int | Sequence[int] = 9, eps: float = 1e-4) -> None:
        super().__init__()
        self.window, self.eps = window, eps

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 1 - local_ncc(input, target, self.window, self.eps)

    def extra_repr(self) -> str:
        return f"window={self.window}, eps={self.eps}"


class _LocalNCC(torch.autograd.Function):
    """mean a² / (b c), where M is the mean over a window and I and J are the images less their means.

    a = M[I J] - M[I] M[J],   b = M[I²] - M[I]² + eps mean(I²),   c the same of J.

    A constant added to an image changes none of them, so its mean, which keeps fp32's digits for what varies, has no
    gradient of its own. With α and β the derivatives in a and b, and M* the adjoint of M,

        ∂/∂I = M*[α] J + 2 M*[β] I - M*[α M[J] + 2 β M[I]] + 2 eps (Σ β) I / |I|
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, windows: tuple[int, ...], eps: float) -> Tensor:
        a, b, c, _, _ = _local_moments(_centred(input), _centred(target), windows, eps)
        return (a / b).mul_(a.div_(c)).mean()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, target, ctx.windows, ctx.eps = inputs
        ctx.save_for_backward(input, target)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        i, j = map(_centred, ctx.saved_tensors)
        a, b, c, mean_i, mean_j = _local_moments(i, j, ctx.windows, ctx.eps)
        scale = grad_output / a.numel()
        correlation = a / b / c
        alpha = _adjoint_mean(2 * scale * correlation, ctx.windows)
        grads: list[Tensor | None] = []
        for x, y, mean_x, mean_y, variance, needed in (
            (i, j, mean_i, mean_j, b, ctx.needs_input_grad[0]),
            (j, i, mean_j, mean_i, c, ctx.needs_input_grad[1]),
        ):
            if not needed:
                grads.append(None)
                continue
            beta = -scale * correlation * (a / variance)
            floor = 2 * ctx.eps * beta.sum(_places(x), keepdim=True) / math.prod(x.shape[2:])
            through_means = _adjoint_mean(2 * (scale * correlation * mean_y + beta * mean_x), ctx.windows)
            grads.append(alpha * y + (2 * _adjoint_mean(beta, ctx.windows) + floor) * x - through_means)
        return *grads, None, None


def _local_moments(i: Tensor, j: Tensor, windows: tuple[int, ...], eps: float) -> tuple[Tensor, ...]:
    """Covariance and the two variances with their floors, then the two means, over each window."""
    mean_i, mean_j = _local_mean(i, windows), _local_mean(j, windows)
    covariance = _local_mean(i * j, windows) - mean_i * mean_j
    variances = []
    for image, mean in ((i, mean_i), (j, mean_j)):
        squares = image.square()
        # The smallest number keeps an image that is flat everywhere from 0 / 0.
        floor = eps * squares.mean(_places(image), keepdim=True) + torch.finfo(image.dtype).tiny ** 0.5
        # Not negative but for rounding.
        variances.append((_local_mean(squares, windows) - mean.square()).clamp(min=0) + floor)
    return covariance, *variances, mean_i, mean_j


def _centred(image: Tensor) -> Tensor:
    return image - image.mean(_places(image), keepdim=True)


def _places(image: Tensor) -> tuple[int, ...]:
    return tuple(range(2, image.dim()))


def _local_mean(image: Tensor, windows: tuple[int, ...]) -> Tensor:
    """M: over the voxels of each window that lie inside the image, one axis after the other."""
    return _sweep(image, windows, count_outside=False)


def _adjoint_mean(image: Tensor, windows: tuple[int, ...]) -> Tensor:
    """M*: each voxel over the count of its own window, then the sums of windows, which are their own adjoint."""
    for axis, window in enumerate(windows, 2):
        places = torch.arange(image.shape[axis], device=image.device)
        first, last = (places - window // 2).clamp(min=0), (places + window // 2).clamp(max=image.shape[axis] - 1)
        count = (last - first + 1).to(image.dtype) / window
        image = image / count.view(-1, *[1] * (image.dim() - axis - 1))
    return _sweep(image, windows, count_outside=True)


def _sweep(image: Tensor, windows: tuple[int, ...], count_outside: bool) -> Tensor:
    """Means along one axis after the other, which take w reads each where a window at once takes w ** d."""
    for axis, window in enumerate(windows, 2):
        before, after = math.prod(image.shape[:axis]), math.prod(image.shape[axis + 1 :])
        rows = image.reshape(before, 1, image.shape[axis], after)
        rows = F.avg_pool2d(rows, (window, 1), 1, (window // 2, 0), count_include_pad=count_outside)
        image = rows.view(image.shape)
    return image


def _check_field(name: str, field: Tensor, spacing: float | Sequence[float]) -> tuple[Tensor, tuple[float, ...]]:
    """The field in fp32 or fp64, and the spacing along each axis."""
    check_floating(field, name, "the displacement")
    if field.dim() not in (3, 4, 5):
        raise ValueError(
            f"{name} takes a displacement of shape (N, C, *size), 1-D, 2-D or 3-D; got {tuple(field.shape)}."
        )
    dims = field.dim() - 2
    spacings = (float(spacing),) * dims if isinstance(spacing, (int, float)) else tuple(spacing)
    if len(spacings) != dims or not all(s > 0 for s in spacings):
        raise ValueError(f"spacing must be positive: one number, or {dims} of them, one per axis; got {spacing!r}.")
    return field.to(torch.promote_types(field.dtype, torch.float32)), spacings


def _nothing(field: Tensor) -> Tensor:
    """0, to which a field without any derivative is still connected."""
    return field[:0].sum()


def _neighbours(field: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    count = field.shape[axis] - 1
    return field.narrow(axis, 1, count), field.narrow(axis, 0, count)
