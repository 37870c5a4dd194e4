"""The sampler in plain PyTorch: the truth that tests compare with, and what runs on the CPU.

The two functions are the twins of `kernels.gather` and `kernels.adjoint` and follow the same steps:
parameters → coefficients in pixels → source coordinates → padding → taps. They go through the
output in chunks, so that working memory stays bounded however large the output is.

Axes are x first inside: ``x[0]`` is the coordinate along the width. Shape notes: M images, K maps
per image, P output pixels of a chunk, C channels, d dimensions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**19
"""Working memory of a chunk: about this many numbers per intermediate tensor."""


# --- transforms: parameters → coefficients → source pixels, and back ------------------------------


@dataclass(frozen=True)
class Transform:
    """`load` folds the change of units into the parameters; `map` sends a chunk of output pixels to
    source pixels. `map_vjp` and `load_vjp` take gradients the same way back.
    """

    load: Callable[..., Tensor]
    load_vjp: Callable[..., Tensor]
    map: Callable[[Tensor, _Pixels], list[Tensor]]
    map_vjp: Callable[[Tensor, _Pixels, list[Tensor]], None]
    """Adds to, or fills its part of, the gradient of the coefficients."""


@dataclass(frozen=True)
class _Pixels:
    """A chunk of output pixels: their range in memory order, and along each axis, x first, their
    indices and the same measured from the middle, each (P,).
    """

    start: int
    stop: int
    index: list[Tensor]
    u: list[Tensor]
    size: tuple[int, ...]
    input_size: tuple[int, ...]
    align_corners: bool


def affine_load(theta: Tensor, input_size: Sequence[int], size: Sequence[int], align_corners: bool) -> Tensor:
    """(M, K, d, d+1), normalised → the same matrix from centred output indices to source pixels."""
    scale, middle = _affine_scale(theta, input_size, size, align_corners)
    return torch.cat([theta[..., :-1] * scale[:, :-1], theta[..., -1:] * scale[:, -1:] + middle], -1)


def affine_load_vjp(grad: Tensor, input_size: Sequence[int], size: Sequence[int], align_corners: bool) -> Tensor:
    return grad * _affine_scale(grad, input_size, size, align_corners)[0]


def affine(coefficients: Tensor, pixels: _Pixels) -> list[Tensor]:
    """Source pixel coordinates, d × (M, K, P)."""
    dims = len(pixels.u)
    x = []
    for axis in range(dims):
        row = coefficients[..., axis, :, None]
        s = row[..., dims, :]
        for other in reversed(range(dims)):  # the kernels' order of rounding
            s = torch.addcmul(s, row[..., other, :], pixels.u[other])
        x.append(s)
    return x


def affine_vjp(grad: Tensor, pixels: _Pixels, grad_x: list[Tensor]) -> None:
    basis = torch.stack([*pixels.u, torch.ones_like(pixels.u[0])])  # (d+1, P)
    grad += torch.stack(grad_x, -2) @ basis.T


def _affine_scale(
    like: Tensor, input_size: Sequence[int], size: Sequence[int], align_corners: bool
) -> tuple[Tensor, Tensor]:
    """What each entry of theta is multiplied by to act on pixels, (d, d+1); the middle pixel, (d, 1)."""
    per_unit = [_pixels_per_unit(s, align_corners) for s in input_size]
    out_per_unit = [_pixels_per_unit(s, align_corners) for s in size]
    rows = [[p / o if o else 0.0 for o in out_per_unit] + [p] for p in per_unit]
    return like.new_tensor(rows), like.new_tensor([[(s - 1) / 2] for s in input_size])


def _pixels_per_unit(size: int, align_corners: bool) -> float:
    """How many pixels one normalised unit spans."""
    return (size - 1) / 2 if align_corners else size / 2


def dense_load(field: Tensor, input_size: Sequence[int], size: Sequence[int], align_corners: bool) -> Tensor:
    """A dense map stays as it is: it is turned into pixels a chunk at a time, without a copy."""
    return field


def dense_load_vjp(grad: Tensor, input_size: Sequence[int], size: Sequence[int], align_corners: bool) -> Tensor:
    return grad * grad.new_tensor([_pixels_per_unit(s, align_corners) for s in input_size])


def grid(field: Tensor, pixels: _Pixels) -> list[Tensor]:
    """An explicit grid, (M, K, *size, d), normalised → source pixel coordinates, d × (M, K, P)."""
    index: tuple[Tensor | slice, ...] = (slice(None), slice(None), *reversed(pixels.index))
    values = field[index].to(pixels.u[0].dtype)
    x = []
    for axis, n in enumerate(pixels.input_size):
        x.append((n - 1) / 2 + values[..., axis] * _pixels_per_unit(n, pixels.align_corners))
    return x


def grid_vjp(grad: Tensor, pixels: _Pixels, grad_x: list[Tensor]) -> None:
    grad.flatten(2, -2)[:, :, pixels.start : pixels.stop] = torch.stack(grad_x, -1)


def displacement(field: Tensor, pixels: _Pixels) -> list[Tensor]:
    """The identity and a field, (M, K, *size, d), normalised; the sum is made in fp32."""
    scale, _ = _affine_scale(pixels.u[0], pixels.input_size, pixels.size, pixels.align_corners)
    return [x + u * scale[a, a] for a, (x, u) in enumerate(zip(grid(field, pixels), pixels.u, strict=True))]


TRANSFORMS = {
    "affine": Transform(affine_load, affine_load_vjp, affine, affine_vjp),
    "grid": Transform(dense_load, dense_load_vjp, grid, grid_vjp),
    "displacement": Transform(dense_load, dense_load_vjp, displacement, grid_vjp),
}


# --- padding: what a coordinate outside the image stands for, and the slope there ------------------


def zeros(x: Tensor, size: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    # NaN and infinities lie outside; a finite place there keeps them out of the weights.
    return torch.where(x.abs() < 2**30, x, -4.0), torch.ones_like(x)


def border(x: Tensor, size: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    inside = (x > 0) & (x < size - 1)  # a coordinate on the edge counts as clipped, as in ATen
    return x.nan_to_num(nan=0.0).clamp(0, size - 1), inside.to(x.dtype)


def reflection(x: Tensor, size: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Fold about the outermost pixels' centres (align_corners) or edges, then clip."""
    middle = (size - 1) / 2
    radius = middle if align_corners else middle + 0.5
    if radius == 0:
        return torch.zeros_like(x), torch.zeros_like(x)
    inside = (x - middle).abs() <= radius
    from_edge = (x - (middle - radius)).abs()
    flips = (from_edge / (2 * radius)).floor()
    extra = torch.addcmul(from_edge, -flips, torch.full_like(flips, 2 * radius))
    odd = flips % 2 > 0
    folded = torch.where(odd, 2 * radius - extra, extra) + (middle - radius)
    sign = torch.where(odd ^ (x < middle - radius), -1.0, 1.0).to(x.dtype)
    # An inside coordinate keeps its bits: it must read as it does under zeros.
    clipped, slope = border(torch.where(inside, x, folded), size, align_corners)
    return clipped, torch.where(inside, 1.0, sign) * slope


PADDINGS = {"zeros": zeros, "border": border, "reflection": reflection}


# --- interpolation: how much pixel q weighs for a sample at x, and the slope ------------------------


@dataclass(frozen=True)
class Interpolation:
    first: Callable[[Tensor], Tensor]
    """The first of the taps that a sample touches."""
    taps: int
    weight: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


def _linear_slope(x: Tensor, q: Tensor) -> Tensor:
    # A sample on a pixel takes the slope to the right of it, as ATen does.
    return torch.where(x < q, 1.0, -1.0).to(x.dtype)


def _cubic(x: Tensor, q: Tensor) -> Tensor:
    """Cubic convolution (Keys 1981) with a = -0.75, as torch's bicubic."""
    d = (x - q).abs()
    near = (1.25 * d - 2.25) * d * d + 1
    far = ((-0.75 * d + 3.75) * d - 6) * d + 3
    return torch.where(d <= 1, near, far)


def _cubic_slope(x: Tensor, q: Tensor) -> Tensor:
    d = (x - q).abs()
    near = (3.75 * d - 4.5) * d
    far = (-2.25 * d + 7.5) * d - 6
    return torch.where(x < q, -1.0, 1.0).to(x.dtype) * torch.where(d <= 1, near, far)


INTERPOLATIONS = {
    "nearest": Interpolation(torch.round, 1, lambda x, q: torch.ones_like(x), lambda x, q: torch.zeros_like(x)),
    "bilinear": Interpolation(torch.floor, 2, lambda x, q: 1 - (x - q).abs(), _linear_slope),
    "bicubic": Interpolation(lambda x: x.floor() - 1, 4, _cubic, _cubic_slope),
}


# --- the two operations ----------------------------------------------------------------------------


def gather(
    output: Tensor, input: Tensor, parameters: Tensor, *, kind: str, mode: str, padding_mode: str, align_corners: bool
) -> None:
    """Fill output (M * K, C, *size) from input (M, C, *input_size) and parameters (M, K, …)."""
    for chunk in _chunks(output.shape, input, parameters, kind, mode, padding_mode, align_corners):
        total = torch.zeros((), dtype=chunk.dtype)
        for corner in chunk.corners():
            value = _read(input, corner).to(chunk.dtype)  # (M, C, K, P)
            total = total + corner.weight()[:, None] * torch.where(corner.inside[:, None], value, 0)
        total = total.transpose(1, 2).flatten(0, 1)
        output.flatten(2)[:, :, chunk.pixels.start : chunk.pixels.stop] = total.to(output.dtype)


def adjoint(
    grad_input: Tensor | None, grad_parameters: Tensor | None, grad_output: Tensor, input: Tensor | None,
    parameters: Tensor, *, kind: str, mode: str, padding_mode: str, align_corners: bool,
) -> None:  # fmt: skip
    """Fill grad_input (M, C, *input_size) and grad_parameters (M, K, …), either of them or both."""
    image = grad_input if grad_input is not None else input
    assert image is not None
    compute = compute_dtype(image.dtype)
    grad_image = None
    if grad_input is not None:  # accumulated where it is wanted, if its dtype can hold sums
        grad_image = grad_input.zero_() if grad_input.dtype == compute else torch.zeros_like(grad_input, dtype=compute)
    grad_coefficients = torch.zeros_like(parameters, dtype=compute)
    for chunk in _chunks(grad_output.shape, image, parameters, kind, mode, padding_mode, align_corners):
        grad = grad_output.flatten(2)[:, :, chunk.pixels.start : chunk.pixels.stop].to(compute)
        grad = grad.unflatten(0, parameters.shape[:2]).transpose(1, 2)  # (M, C, K, P)
        grad_x = [torch.zeros_like(x) for x in chunk.x]
        for corner in chunk.corners():
            inside = corner.inside[:, None]
            if grad_image is not None:
                added = torch.where(inside, corner.weight()[:, None] * grad, 0)
                grad_image.flatten(2).scatter_add_(2, corner.flat(image).expand_as(added).flatten(2), added.flatten(2))
            if grad_parameters is not None and input is not None:
                dot = (_read(input, corner).to(compute) * grad).sum(1)
                for axis in range(len(chunk.x)):
                    grad_x[axis] += torch.where(corner.inside, corner.slope(axis) * dot, 0)
        if grad_parameters is not None:
            grad_x = [g * s for g, s in zip(grad_x, chunk.padding_slopes, strict=True)]
            TRANSFORMS[kind].map_vjp(grad_coefficients, chunk.pixels, grad_x)
    if grad_input is not None and grad_image is not None and grad_image is not grad_input:
        grad_input.copy_(grad_image)
    if grad_parameters is not None:
        sizes = tuple(reversed(image.shape[2:])), tuple(reversed(grad_output.shape[2:]))
        grad_parameters.copy_(TRANSFORMS[kind].load_vjp(grad_coefficients, *sizes, align_corners))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What coordinates, weights and sums are computed in, for images of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Corner:
    """One of the taps ** d pixels that each sample touches."""

    weights: list[Tensor]
    slopes: list[Tensor]
    pixel: list[Tensor]
    inside: Tensor

    def weight(self) -> Tensor:
        return math.prod(self.weights[1:], start=self.weights[0])

    def slope(self, axis: int) -> Tensor:
        """The derivative of the weight with respect to the coordinate along an axis."""
        others = [w for other, w in enumerate(self.weights) if other != axis]
        return math.prod(others, start=self.slopes[axis])

    def flat(self, image: Tensor) -> Tensor:
        """The pixel's position in the image, (M, 1, K, P)."""
        index = torch.zeros_like(self.pixel[0])
        for along, size in zip(reversed(self.pixel), image.shape[2:], strict=True):
            index = index * size + along
        return index[:, None]


@dataclass(frozen=True)
class _Chunk:
    """Some output pixels of every map, and where they look."""

    pixels: _Pixels
    x: list[Tensor]
    padding_slopes: list[Tensor]
    pad_tap: Callable[[Tensor, int], Tensor]
    """What padding makes of a tap: nothing, where it has moved the sample already."""
    interpolation: Interpolation

    @property
    def dtype(self) -> torch.dtype:
        return self.x[0].dtype

    def corners(self) -> Iterator[_Corner]:
        size = self.pixels.input_size
        first = [self.interpolation.first(x) for x in self.x]
        for taps in itertools.product(range(self.interpolation.taps), repeat=len(first)):
            q = [f + tap for f, tap in zip(first, taps, strict=True)]
            padded = [self.pad_tap(a, n) for a, n in zip(q, size, strict=True)]
            insides = [(a >= 0) & (a <= n - 1) for a, n in zip(padded, size, strict=True)]
            yield _Corner(
                [self.interpolation.weight(x, a) for x, a in zip(self.x, q, strict=True)],
                [self.interpolation.slope(x, a) for x, a in zip(self.x, q, strict=True)],
                [torch.where(inside, a, 0).long() for inside, a in zip(insides, padded, strict=True)],
                math.prod(insides[1:], start=insides[0]),
            )


def _chunks(
    output_shape: torch.Size, image: Tensor, parameters: Tensor,
    kind: str, mode: str, padding_mode: str, align_corners: bool,
) -> Iterator[_Chunk]:  # fmt: skip
    size, input_size = tuple(reversed(output_shape[2:])), tuple(reversed(image.shape[2:]))
    transform, pad, interpolation = TRANSFORMS[kind], PADDINGS[padding_mode], INTERPOLATIONS[mode]
    dtype = compute_dtype(image.dtype)
    dense = kind != "affine"  # stays in its own dtype: a chunk at a time is converted
    coefficients = transform.load(parameters if dense else parameters.to(dtype), input_size, size, align_corners)
    count = math.prod(size)
    step = max(1, CHUNK_ELEMENTS // (output_shape[0] * (output_shape[1] + len(size))))
    for start in range(0, count, step):
        stop = min(start + step, count)
        rest = torch.arange(start, stop, device=image.device)
        index = []
        for n in size:
            index.append(rest % n)
            rest = rest // n
        u = [along.to(dtype) - (n - 1) / 2 for along, n in zip(index, size, strict=True)]
        pixels = _Pixels(start, stop, index, u, size, input_size, align_corners)
        x = transform.map(coefficients, pixels)
        if interpolation.taps <= 2:  # padding moves the sample, but for cubic the taps: as torch does
            padded = [pad(a, n, align_corners) for a, n in zip(x, input_size, strict=True)]
            yield _Chunk(pixels, [a for a, _ in padded], [s for _, s in padded], lambda q, n: q, interpolation)
        else:
            x = [a.nan_to_num(nan=-(2.0**24)).clamp(8 - 2.0**24, 2.0**24 - 8) for a in x]  # integers stay exact
            slopes = [torch.ones_like(a) for a in x]
            yield _Chunk(pixels, x, slopes, lambda q, n: pad(q, n, align_corners)[0], interpolation)


def _read(image: Tensor, corner: _Corner) -> Tensor:
    """A corner's pixels of images (M, C, *size) of any strides, (M, C, K, P), without copying an image."""
    try:
        flat = image.view(*image.shape[:2], -1)
    except RuntimeError:  # rows that don't follow each other: slower, but no copy
        n = torch.arange(image.shape[0], device=image.device)[:, None, None]
        index: tuple[Tensor | slice, ...] = (n, slice(None), *reversed(corner.pixel))
        return image[index].movedim(-1, 1)
    at = corner.flat(image).expand(-1, image.shape[1], -1, -1)
    return flat.gather(2, at.flatten(2)).view(at.shape)
