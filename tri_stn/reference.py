"""The sampler in plain PyTorch: the truth that tests compare with, and what runs on the CPU.

The two functions are the twins of `kernels.gather` and `kernels.adjoint` and follow the same steps:
parameters → coefficients in pixels → source coordinates → padding → taps. They go through the
output in chunks, so that working memory stays bounded however large the output is.

Axes are x first inside: ``x[0]`` is the coordinate along the width. Shape notes: M images, K maps
per image, P output pixels of a chunk, C channels, d dimensions.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import points
from .points import pixels_per_unit as _pixels_per_unit

CHUNK_ELEMENTS = 2**19
"""Working memory of a chunk: about this many numbers per intermediate tensor."""


# --- transforms: parameters → coefficients → source pixels, and back ------------------------------


@dataclass(frozen=True)
class Transform:
    """`load` folds the change of units into the parameters, and is linear; `map` sends a chunk of
    output pixels to source pixels and `map_jvp` tangents of the coefficients to theirs. `map_vjp`
    and `load_vjp` take gradients the same way back.
    """

    load: Callable[..., Tensor]
    load_vjp: Callable[..., Tensor]
    map: Callable[[Tensor, _Pixels], list[Tensor]]
    map_jvp: Callable[[Tensor, Tensor, _Pixels], list[Tensor]]
    map_vjp: Callable[[Tensor, Tensor, _Pixels, list[Tensor]], None]
    """Adds to, or fills its part of, the gradient of the coefficients."""
    map_vjp_jvp: Callable[[Tensor, Tensor, Tensor, _Pixels, list[Tensor]], None] | None = None
    """Adds what map_vjp changes by along tangents of the coefficients; None where it does not."""
    dense: bool = False
    """Whether there are parameters for each output pixel."""
    shrink: Callable[[Tensor], Tensor] | None = None
    """Coefficients → samples along each axis that leave no source pixel out, (M, K, 1); None where that is
    not the same everywhere, and differences of the map tell.
    """


@dataclass(frozen=True)
class _Pixels:
    """A chunk of output pixels: their range in memory order, and along each axis, x first, their
    indices, (P,), and where in them a sample lies, measured from the middle: (P,), or (M, K, P).
    """

    start: int
    stop: int
    index: list[Tensor]
    u: list[Tensor]
    size: tuple[int, ...]
    input_size: tuple[int, ...]
    align_corners: bool
    auxiliary: Tensor | None = None
    grad_auxiliary: Tensor | None = None
    """Where a chain adds the gradient of its field."""


def matrix_load(matrix: Tensor, input_size: Sequence[int], size: Sequence[int], align_corners: bool) -> Tensor:
    """(M, K, d or d+1, d+1), normalised → the same from centred output indices to centred source pixels."""
    scale = _affine_scale(matrix, input_size, size, align_corners)
    out_per_unit = [_pixels_per_unit(s, align_corners) for s in size]
    last = matrix.new_tensor([[1 / o if o else 0.0 for o in out_per_unit] + [1.0]])
    return matrix * torch.cat([scale, last])[: matrix.shape[-2]]


matrix_load_vjp = matrix_load  # a factor for each entry: its own transpose


def affine(coefficients: Tensor, pixels: _Pixels) -> list[Tensor]:
    """Source pixel coordinates, d × (M, K, P)."""
    x = _rows(coefficients, pixels)
    return [s + (n - 1) / 2 for s, n in zip(x, pixels.input_size, strict=True)]


def affine_jvp(coefficients: Tensor, tangents: Tensor, pixels: _Pixels) -> list[Tensor]:
    return _rows(tangents, pixels)


def affine_vjp(grad: Tensor, coefficients: Tensor, pixels: _Pixels, grad_x: list[Tensor]) -> None:
    grad += _rows_vjp(grad_x, pixels)


def affine_shrink(coefficients: Tensor) -> Tensor:
    return samples_for(coefficients[..., :-1].square().sum(-2).amax(-1, keepdim=True))


def samples_for(squared_step: Tensor) -> Tensor:
    """How many samples along each axis an output pixel takes whose step spans so many source pixels, squared.

    One per source pixel, where 0.01 is left to rounding: a step of 2 takes 2; never more than 16. One for NaN.
    """
    step = squared_step.nan_to_num(nan=1.0).clamp(1, 256).sqrt()
    return (step - 0.01).ceil().clamp(min=1).long()


def projective(coefficients: Tensor, pixels: _Pixels) -> list[Tensor]:
    """Source pixel coordinates; at or behind infinity, a place out of bounds."""
    _, y, ahead = _project(coefficients, pixels)
    return [torch.where(ahead, s + (n - 1) / 2, -(2.0**30)) for s, n in zip(y, pixels.input_size, strict=True)]


def projective_jvp(coefficients: Tensor, tangents: Tensor, pixels: _Pixels) -> list[Tensor]:
    inverse, y, ahead = _project(coefficients, pixels)
    *changes, last = _rows(tangents, pixels)
    return [torch.where(ahead, (c - s * last) * inverse, 0) for c, s in zip(changes, y, strict=True)]


def projective_vjp(grad: Tensor, coefficients: Tensor, pixels: _Pixels, grad_x: list[Tensor]) -> None:
    inverse, y, ahead = _project(coefficients, pixels)
    rows = [torch.where(ahead, g * inverse, 0) for g in grad_x]
    last = -sum((r * s for r, s in zip(rows, y, strict=True)), torch.zeros(()))
    grad += _rows_vjp([*rows, last], pixels)


def projective_vjp_jvp(
    grad: Tensor, coefficients: Tensor, tangents: Tensor, pixels: _Pixels, grad_x: list[Tensor]
) -> None:
    inverse, y, ahead = _project(coefficients, pixels)
    *_, last_change = _rows(tangents, pixels)
    rows = [torch.where(ahead, -g * inverse**2 * last_change, 0) for g in grad_x]
    last = torch.zeros_like(inverse)
    for g, r, s, s_change in zip(grad_x, rows, y, projective_jvp(coefficients, tangents, pixels), strict=True):
        last -= r * s + torch.where(ahead, g * inverse * s_change, 0)
    grad += _rows_vjp([*rows, last], pixels)


def matrix_grid(
    kind: str, matrix: Tensor, u: list[Tensor], input_size: Sequence[int], size: Sequence[int], align_corners: bool
) -> Tensor:
    """Where an affine or projective map (M, K, rows, d+1) looks from places of the output, each (P,) or (M, K, C, P), x
    first and measured from the middle: normalised, (M, K, C, P, d), differentiable in the map.
    """
    sizes, transform = (tuple(reversed(input_size)), tuple(reversed(size))), TRANSFORMS[kind]
    pixels = _Pixels(0, u[-1].shape[-1], [], u, sizes[1], sizes[0], align_corners)
    places = transform.map(transform.load(matrix, *sizes, align_corners).unsqueeze(2), pixels)
    edge = 0.0 if align_corners else 0.5
    units = [_pixels_per_unit(n, align_corners) or 1.0 for n in sizes[0]]
    return torch.stack([(place + edge) / unit - 1 for place, unit in zip(places, units, strict=True)], -1)


def _project(coefficients: Tensor, pixels: _Pixels) -> tuple[Tensor, list[Tensor], Tensor]:
    """The divisor's inverse, the source pixel from the middle, and whether it is ahead of infinity."""
    *rows, divisor = _rows(coefficients, pixels)
    ahead = divisor > 1e-30
    inverse = 1 / torch.where(ahead, divisor, 1)
    return inverse, [row * inverse for row in rows], ahead


def _rows(matrix: Tensor, pixels: _Pixels) -> list[Tensor]:
    """(M, K, rows, d+1), times each output pixel (u, 1): one (M, K, P) per row."""
    dims = len(pixels.u)
    result = []
    for row in matrix.unsqueeze(-1).unbind(-3):
        s = row[..., dims, :]
        for other in reversed(range(dims)):  # the kernels' order of rounding
            s = torch.addcmul(s, row[..., other, :], pixels.u[other])
        result.append(s)
    return result


def _rows_vjp(grad: list[Tensor], pixels: _Pixels) -> Tensor:
    basis = torch.stack([*pixels.u, torch.ones_like(pixels.u[0])], -2)  # (d+1, P)
    return points.times(torch.stack(grad, -2), basis.mT)


def _affine_scale(like: Tensor, input_size: Sequence[int], size: Sequence[int], align_corners: bool) -> Tensor:
    """What each entry of theta is multiplied by to act on pixels, (d, d+1)."""
    per_unit = [_pixels_per_unit(s, align_corners) for s in input_size]
    out_per_unit = [_pixels_per_unit(s, align_corners) for s in size]
    return like.new_tensor([[p / o if o else 0.0 for o in out_per_unit] + [p] for p in per_unit])


def dense_load(field: Tensor, input_size: Sequence[int], size: Sequence[int], align_corners: bool) -> Tensor:
    """A dense map stays as it is: it is turned into pixels a chunk at a time, without a copy."""
    return field


def dense_load_vjp(grad: Tensor, input_size: Sequence[int], size: Sequence[int], align_corners: bool) -> Tensor:
    return grad * grad.new_tensor([_pixels_per_unit(s, align_corners) for s in input_size])


def grid(field: Tensor, pixels: _Pixels) -> list[Tensor]:
    """An explicit grid, (M, K, *size, d), normalised → source pixel coordinates, d × (M, K, P)."""
    values = _read_field(field, pixels) + 1
    x = []
    for axis, n in enumerate(pixels.input_size):
        per_unit = torch.full_like(values[..., axis], _pixels_per_unit(n, pixels.align_corners))
        edge = torch.full_like(per_unit, 0.0 if pixels.align_corners else -0.5)
        x.append(torch.addcmul(edge, values[..., axis], per_unit))  # fused, as ATen's
    return x


def grid_jvp(field: Tensor, tangents: Tensor, pixels: _Pixels) -> list[Tensor]:
    values = _read_field(tangents, pixels)
    return [values[..., a] * _pixels_per_unit(n, pixels.align_corners) for a, n in enumerate(pixels.input_size)]


def grid_vjp(grad: Tensor, field: Tensor, pixels: _Pixels, grad_x: list[Tensor]) -> None:
    grad.flatten(2, -2)[:, :, pixels.start : pixels.stop] = torch.stack(grad_x, -1)


def displacement(field: Tensor, pixels: _Pixels) -> list[Tensor]:
    """The identity and a field, (M, K, *size, d), normalised; the sum is made in fp32."""
    return _add_identity(grid_jvp(field, field, pixels), pixels)


def pixel_displacement(field: Tensor, pixels: _Pixels) -> list[Tensor]:
    """The identity and a field, (M, K, *size, d), in pixels of the input."""
    return _add_identity(pixel_displacement_jvp(field, field, pixels), pixels)


def pixel_displacement_jvp(field: Tensor, tangents: Tensor, pixels: _Pixels) -> list[Tensor]:
    return list(_read_field(tangents, pixels).unbind(-1))


def _add_identity(moved: list[Tensor], pixels: _Pixels) -> list[Tensor]:
    scale = _affine_scale(pixels.u[0], pixels.input_size, pixels.size, pixels.align_corners)
    x = []
    for axis, n in enumerate(pixels.input_size):
        x.append(pixels.u[axis] * scale[axis, axis] + (n - 1) / 2 + moved[axis])
    return x


def _read_field(field: Tensor, pixels: _Pixels) -> Tensor:
    """A dense map's numbers for a chunk of output pixels, (M, K, P, d)."""
    index: tuple[Tensor | slice, ...] = (slice(None), slice(None), *reversed(pixels.index))
    return field[index].to(pixels.u[0].dtype)


def chain_load(numbers: Tensor, input_size: Sequence[int], size: Sequence[int], align_corners: bool) -> Tensor:
    """The numbers of a chain's links, (M, K, count), are for normalised points: they stay as they are."""
    return numbers


def chain(kind: str, numbers: Tensor, pixels: _Pixels, held: Tensor | None = None) -> list[Tensor]:
    """Source pixel coordinates; where the map's numbers are held, and these a tangent of them, that of these."""
    sizes = zip(pixels.u, pixels.size, strict=True)
    v = [u / (_pixels_per_unit(n, pixels.align_corners) or 1) for u, n in sizes]
    where = pixels.index, pixels.input_size, pixels.align_corners
    v = list(points.follow(kind, numbers, pixels.auxiliary, v, *where, held))
    per_unit = [_pixels_per_unit(n, pixels.align_corners) for n in pixels.input_size]
    middle = [(n - 1) / 2 if held is None else 0.0 for n in pixels.input_size]
    return [a * p + m for a, p, m in zip(v, per_unit, middle, strict=True)]


def chain_vjp(kind: str, grad: Tensor, numbers: Tensor, pixels: _Pixels, grad_x: list[Tensor]) -> None:
    """By autograd, which follows the links one by one."""
    leaves = [numbers.detach().requires_grad_()]
    if pixels.auxiliary is not None and pixels.grad_auxiliary is not None:
        leaves.append(pixels.auxiliary.detach().to(numbers.dtype).requires_grad_())  # sums in 16 bits lose
        pixels = replace(pixels, auxiliary=leaves[1])
    with torch.enable_grad():
        x = chain(kind, leaves[0], pixels)
    found = torch.autograd.grad(x, leaves, grad_x, allow_unused=True)
    for total, part in zip((grad, pixels.grad_auxiliary), found, strict=False):
        if total is not None and part is not None:
            total += part


def _chain(kind: str) -> Transform:
    return Transform(
        chain_load,
        chain_load,
        functools.partial(chain, kind),
        lambda numbers, tangents, pixels: chain(kind, tangents, pixels, held=numbers),
        functools.partial(chain_vjp, kind),
    )


TRANSFORMS = {
    "affine": Transform(matrix_load, matrix_load_vjp, affine, affine_jvp, affine_vjp, shrink=affine_shrink),
    "projective": Transform(
        matrix_load, matrix_load_vjp, projective, projective_jvp, projective_vjp, projective_vjp_jvp
    ),
    "grid": Transform(dense_load, dense_load_vjp, grid, grid_jvp, grid_vjp, dense=True),
    "displacement": Transform(dense_load, dense_load_vjp, displacement, grid_jvp, grid_vjp, dense=True),
    "pixel_displacement": Transform(
        dense_load, dense_load, pixel_displacement, pixel_displacement_jvp, grid_vjp, dense=True
    ),
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
    curvature: Callable[[Tensor, Tensor], Tensor]


def _flat(x: Tensor, q: Tensor) -> Tensor:
    return torch.zeros_like(x)


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


def _cubic_curvature(x: Tensor, q: Tensor) -> Tensor:
    d = (x - q).abs()
    return torch.where(d <= 1, 7.5 * d - 4.5, -4.5 * d + 7.5)


INTERPOLATIONS = {
    "nearest": Interpolation(torch.round, 1, lambda x, q: torch.ones_like(x), _flat, _flat),
    "bilinear": Interpolation(torch.floor, 2, lambda x, q: 1 - (x - q).abs(), _linear_slope, _flat),
    "bicubic": Interpolation(lambda x: x.floor() - 1, 4, _cubic, _cubic_slope, _cubic_curvature),
}


# --- access to an image's pixels, one tap of all samples at a time ---------------------------------


@dataclass(frozen=True)
class Access:
    """How pixels are read and added to; `cpu_rows` has another way for images of many channels."""

    read: Callable[[Tensor, Iterable[Tap]], Tensor]
    """Images (M, C, *size) and taps → weighted sums (M, C, K, P)."""
    back: Callable[[Tensor | None, Tensor | None, Sequence[Tap], Tensor], Iterable[Tensor]]
    """Adds weights times samples (M, C, K, P) to images, the first; for each tap, its pixels' products with the samples
    in other images, the second, summed over channels: (M, K, P).
    """
    tensors: int = 4
    """How many tensors as large as the samples there are at a time, about."""


def _weighted_sum(image: Tensor, taps: Iterable[Tap]) -> Tensor:
    total = torch.zeros((), dtype=compute_dtype(image.dtype))
    for corner, weight in taps:
        value = _read(image, corner).to(total.dtype)
        total = total + weight[:, None] * torch.where(corner.inside[:, None], value, 0)
    return total


def _back(grad_image: Tensor | None, image: Tensor | None, taps: Sequence[Tap], samples: Tensor) -> Iterator[Tensor]:
    if grad_image is not None:
        for corner, weight in taps:
            added = torch.where(corner.inside[:, None], weight[:, None] * samples, 0)
            index = corner.flat(grad_image).expand_as(added)
            grad_image.flatten(2).scatter_add_(2, index.flatten(2), added.flatten(2))
    return ((_read(image, corner).to(samples.dtype) * samples).sum(1) for corner, _ in taps if image is not None)


PLAIN = Access(_weighted_sum, _back)


# --- the two operations ----------------------------------------------------------------------------


def gather(
    output: Tensor, input: Tensor, parameters: Tensor, auxiliary: Tensor | None = None, fill: Tensor | None = None,
    input_tangent: Tensor | None = None, parameters_tangent: Tensor | None = None,
    *, mask: Tensor | None = None, project: str = "", depth: int = 1, access: Access = PLAIN, **options: Any,
) -> None:  # fmt: skip
    """Fill output (M * K, C, *size) from input (M, C, *input_size) and parameters (M, K, …).

    With parameters_tangent and, if wanted, input_tangent: fill it with what it changes by.
    A tensor whose batch is a divisor of M serves over and over. `fill` (C,) is what lies outside under
    zeros padding; `mask` (M * K, 1, *size) is filled with the share of each output pixel's weight that lies
    inside. With `project`, "sum", "mean" or "argmax", the output lacks the first of its size, `depth`; "argmax" fills
    it with int32. Options: `_Sampling`'s.
    """
    size = (*([depth] if project else []), *output.shape[2:])
    maps, sampling = parameters.shape[1], _Sampling(**options)
    together = (
        (input, 1), (parameters, 1), (input_tangent, 1), (parameters_tangent, 1), (output, maps), (auxiliary, 1),
        (mask, maps),
    )  # fmt: skip
    for input, parameters, input_tangent, parameters_tangent, output, auxiliary, mask in _same_batch(*together):
        shape = torch.Size((*output.shape[:2], *size))
        motion = parameters, parameters_tangent
        layers = depth if project else 1
        for chunk in sampling.chunks(shape, access, input, *motion, 0, auxiliary, layers=layers):
            if chunk.begins:
                result = largest = covered = missing = torch.zeros((), dtype=chunk.dtype)
            total = access.read(input, chunk.taps())
            if input_tangent is not None:
                total = total + access.read(input_tangent, ((corner, corner.weight()) for corner in chunk.corners()))
            if fill is not None:
                coverage = chunk.covered()
                outside = (1 - coverage.weight() if chunk.t is None else -coverage.weight_jvp())[:, None]
                # Selected, as a fill that is not finite must not reach the pixels inside.
                total = total + torch.where(outside != 0, outside * fill.to(chunk.dtype)[:, None, None], 0)
            if mask is not None:
                inside, share = chunk.covered().weight(), 1 if chunk.share is None else chunk.share
                covered, missing = covered + share * inside, missing + share * (1 - inside)
            if project == "argmax":
                better = (total > largest) | torch.tensor(chunk.begins)
                largest, result = torch.where(better, total, largest), torch.where(better, chunk.layer, result)
            elif chunk.share is not None:
                result = result + torch.where(chunk.share[:, None] > 0, chunk.share[:, None] * total, 0)
            else:
                result = total if chunk.begins else result + total
            if chunk.ends:
                part = slice(chunk.pixels.start, chunk.pixels.stop)
                result = (result / depth if project == "mean" else result).transpose(1, 2).flatten(0, 1)
                output.flatten(2)[:, :, part] = result.to(output.dtype)
                if mask is not None:
                    covered = torch.where(missing == 0, 1, covered)  # whatever the shares add up to
                    mask.flatten(2)[:, :, part] = covered.flatten(0, 1)[:, None].to(mask.dtype)


def adjoint(
    grad_input: Tensor | None, grad_parameters: Tensor | None, grad_auxiliary: Tensor | None,
    grad_output: Tensor, input: Tensor | None,
    parameters: Tensor, auxiliary: Tensor | None = None, fill: Tensor | None = None,
    input_tangent: Tensor | None = None, parameters_tangent: Tensor | None = None,
    *, deterministic: bool = False, access: Access = PLAIN, **options: Any,
) -> None:  # fmt: skip
    """Fill grad_input (M, C, *input_size) and grad_parameters (M, K, …), either of them or both.

    With parameters_tangent and, if wanted, input_tangent: fill them with what they change by.
    `fill` (C,) is what lies outside under zeros padding.
    Always deterministic: on the CPU one thread adds what falls on one image.
    """
    maps, sampling = parameters.shape[1], _Sampling(**options)
    compute = compute_dtype(grad_output.dtype)
    grad_field = None if grad_auxiliary is None else torch.zeros_like(grad_auxiliary, dtype=compute)
    together = (
        (grad_input, 1), (grad_parameters, 1), (grad_output, maps),
        (input, 1), (parameters, 1), (input_tangent, 1), (parameters_tangent, 1), (auxiliary, 1), (grad_field, 1),
    )  # fmt: skip
    for tensors in _same_batch(*together):
        _adjoint(sampling, access, fill, *tensors)
    if grad_auxiliary is not None and grad_field is not None:
        grad_auxiliary.copy_(grad_field)


def _adjoint(
    sampling: _Sampling, access: Access, fill: Tensor | None,
    grad_input: Tensor | None, grad_parameters: Tensor | None, grad_output: Tensor, input: Tensor | None,
    parameters: Tensor, input_tangent: Tensor | None, parameters_tangent: Tensor | None,
    auxiliary: Tensor | None, grad_auxiliary: Tensor | None,
) -> None:  # fmt: skip
    needs_map = grad_parameters is not None or grad_auxiliary is not None
    image, transform = grad_input if grad_input is not None else input, sampling.transform
    assert image is not None
    compute = compute_dtype(image.dtype)
    grad_image = None
    if grad_input is not None:  # accumulated where it is wanted, if its dtype can hold sums
        grad_image = grad_input.zero_() if grad_input.dtype == compute else torch.zeros_like(grad_input, dtype=compute)
    grad_coefficients = torch.zeros(parameters.shape, dtype=compute, device=parameters.device)
    order, size = int(needs_map), grad_output.shape
    where = parameters, parameters_tangent, order, auxiliary, grad_auxiliary
    for chunk in sampling.chunks(size, access, image, *where):
        grad = _part(grad_output, chunk.pixels).to(compute)
        grad = grad.unflatten(0, parameters.shape[:2]).transpose(1, 2)  # (M, C, K, P)
        if chunk.share is not None:
            grad = grad * chunk.share[:, None]
        grad_x = [torch.zeros_like(x) for x in chunk.x]
        held_grad_x = [torch.zeros_like(x) for x in chunk.x]  # of the samples where they are, for a map that bends
        taps = list(chunk.taps())
        dots = access.back(grad_image, input if needs_map else None, taps, grad)
        for (corner, _), dot in zip(taps, dots, strict=False):  # no dots where the map's gradient is not asked for
            for axis in range(len(chunk.x)):
                slope = corner.slope(axis) if chunk.t is None else corner.slope_jvp(axis)
                grad_x[axis] += torch.where(corner.inside, slope * dot, 0)
                if chunk.tangents is not None and transform.map_vjp_jvp is not None:
                    held_grad_x[axis] += torch.where(corner.inside, corner.slope(axis) * dot, 0)
        if needs_map and input_tangent is not None:
            for (corner, _), dot in zip(taps, access.back(None, input_tangent, taps, grad), strict=True):
                for axis in range(len(chunk.x)):
                    grad_x[axis] += torch.where(corner.inside, corner.slope(axis) * dot, 0)
        if needs_map and input is not None and fill is not None:
            corner = chunk.covered()  # a change of coverage trades the image for the fill
            dot = -(fill.to(compute)[:, None, None] * grad).sum(1)
            for axis in range(len(chunk.x)):
                slope = corner.slope(axis) if chunk.t is None else corner.slope_jvp(axis)
                grad_x[axis] += slope * dot
                if chunk.tangents is not None and transform.map_vjp_jvp is not None:
                    held_grad_x[axis] += corner.slope(axis) * dot
        if needs_map:
            grad_x = [g * s for g, s in zip(grad_x, chunk.padding_slopes, strict=True)]
            transform.map_vjp(grad_coefficients, chunk.coefficients, chunk.pixels, grad_x)
            if chunk.tangents is not None and transform.map_vjp_jvp is not None:
                held = [g * s for g, s in zip(held_grad_x, chunk.padding_slopes, strict=True)]
                transform.map_vjp_jvp(grad_coefficients, chunk.coefficients, chunk.tangents, chunk.pixels, held)
    if grad_input is not None and grad_image is not None and grad_image is not grad_input:
        grad_input.copy_(grad_image)
    if grad_parameters is not None:
        sizes = tuple(reversed(image.shape[2:])), tuple(reversed(size[2:]))
        grad_parameters.copy_(transform.load_vjp(grad_coefficients, *sizes, sampling.align_corners))


def _same_batch(*tensors: tuple[Tensor | None, int]) -> Iterator[list[Any]]:
    """Parts of the tensors with the same batch: the smallest one's; `per` entries count as one."""
    counts = [len(t) // per for t, per in tensors if t is not None]
    count = min(counts)
    for start in range(0, max(counts), count):
        yield [None if t is None else t[start * per % len(t) :][: count * per] for t, per in tensors]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What coordinates, weights and sums are computed in, for images of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Corner:
    """One of the taps ** d pixels that each sample touches."""

    weights: list[Tensor]
    slopes: list[Tensor]
    curvatures: list[Tensor]
    t: list[Tensor]
    """Tangents of the sample's coordinates."""
    pixel: list[Tensor]
    inside: Tensor

    def weight(self) -> Tensor:
        return math.prod(self.weights[1:], start=self.weights[0])

    def slope(self, axis: int) -> Tensor:
        """The derivative of the weight with respect to the coordinate along an axis."""
        return self._times_others(self.slopes[axis], axis)

    def weight_jvp(self) -> Tensor:
        """What the weight changes by where the coordinates move by t."""
        return sum((self.slope(axis) * t for axis, t in enumerate(self.t)), torch.zeros(()))

    def slope_jvp(self, axis: int) -> Tensor:
        """What the slope changes by where the coordinates move by t."""
        change = self._times_others(self.curvatures[axis] * self.t[axis], axis)
        for other, t in enumerate(self.t):
            if other != axis:
                change = change + self._times_others(self.slopes[axis] * self.slopes[other] * t, axis, other)
        return change

    def flat(self, image: Tensor) -> Tensor:
        """The pixel's position in the image, (M, 1, K, P)."""
        index = torch.zeros_like(self.pixel[0])
        for along, size in zip(reversed(self.pixel), image.shape[2:], strict=True):
            index = index * size + along
        return index[:, None]

    def _times_others(self, g: Tensor, *axes: int) -> Tensor:
        return math.prod((w for axis, w in enumerate(self.weights) if axis not in axes), start=g)


Tap = tuple[Corner, Tensor]
"""A corner, and what it weighs for each sample: (M, K, P)."""


@dataclass(frozen=True)
class _Chunk:
    """Some output pixels of every map, and where they look."""

    pixels: _Pixels
    coefficients: Tensor
    tangents: Tensor | None
    looks: list[Tensor]
    """Where the transform looks, before padding."""
    x: list[Tensor]
    t: list[Tensor] | None
    """Tangents of x, where the parameters have one."""
    padding_slopes: list[Tensor]
    pad_tap: Callable[[Tensor, int], Tensor]
    """What padding makes of a tap: nothing, where it has moved the sample already."""
    interpolation: Interpolation
    order: int
    """How many derivatives of the weights are asked for."""
    share: Tensor | None = None
    """How much this sample counts, (M, K, P or 1), where it is one of several of a pixel: 0 where it is none."""
    layer: int = 0
    """Of the depth, where the output is projected along it."""
    begins: bool = True
    ends: bool = True
    """Whether this is the first, the last chunk of samples of these pixels."""

    @property
    def dtype(self) -> torch.dtype:
        return self.x[0].dtype

    def taps(self) -> Iterator[Tap]:
        """All corners and what they weigh; where the coordinates move, what their weights change by."""
        for corner in self.corners():
            yield corner, corner.weight() if self.t is None else corner.weight_jvp()

    def corners(self) -> Iterator[Corner]:
        size, interpolation = self.pixels.input_size, self.interpolation
        derivatives = [interpolation.weight, interpolation.slope, interpolation.curvature]
        axes = []  # for each, for each tap: the weight and its derivatives, the pixel, if inside
        for x, n in zip(self.x, size, strict=True):
            first = interpolation.first(x)
            taps = []
            for tap in range(interpolation.taps):
                values = [f(x, first + tap) for f in derivatives[: self.order + 1]]
                q = self.pad_tap(first + tap, n)
                inside = (q >= 0) & (q <= n - 1)
                taps.append((*values, *[values[0]] * (2 - self.order), torch.where(inside, q, 0).long(), inside))
            axes.append(taps)
        for corner in itertools.product(*axes):
            weights, slopes, curvatures, pixel, insides = (list(column) for column in zip(*corner, strict=True))
            inside = math.prod(insides[1:], start=insides[0])
            if self.share is not None:
                inside = inside & (self.share > 0)
            yield Corner(weights, slopes, curvatures, self.t or [], pixel, inside)

    def covered(self) -> Corner:
        """The share of each sample's weight that lies inside the image, before padding, as a corner whose
        weights are those of all pixels: exactly 1, without slope, where all taps are inside.
        """
        interpolation, columns, insides = self.interpolation, [], []
        for x, n in zip(self.looks, self.pixels.input_size, strict=True):
            if interpolation.taps <= 2:
                x, _ = zeros(x, n, False)
            first = interpolation.first(x)
            taps = [first + tap for tap in range(interpolation.taps)]
            inside = torch.stack([(q >= 0) & (q <= n - 1) for q in taps])
            whole, sums = inside.all(0), []
            for f, all_of_them in ((interpolation.weight, 1), (interpolation.slope, 0), (interpolation.curvature, 0)):
                total = torch.where(inside, torch.stack([f(x, q) for q in taps]), 0).sum(0)
                sums.append(torch.where(whole, all_of_them, total))
            columns.append(sums)
            insides.append(inside.any(0))
        weights, slopes, curvatures = (list(column) for column in zip(*columns, strict=True))
        return Corner(weights, slopes, curvatures, self.t or [], [], math.prod(insides[1:], start=insides[0]))


@dataclass(frozen=True)
class _Sampling:
    """What is sampled how: the options of the two operations."""

    kind: str
    mode: str
    padding_mode: str
    align_corners: bool
    supersample: int = 1

    @property
    def transform(self) -> Transform:
        return TRANSFORMS.get(self.kind) or _chain(self.kind)

    def chunks(
        self, output_shape: torch.Size, access: Access, image: Tensor,
        parameters: Tensor, tangent: Tensor | None, order: int,
        auxiliary: Tensor | None = None, grad_auxiliary: Tensor | None = None, layers: int = 1,
    ) -> Iterator[_Chunk]:  # fmt: skip
        """The output in parts, and where they look; `order` derivatives of the weights, one more for a tangent.

        Several samples of a pixel, and the layers of a depth that a projection runs along, come one after the other.
        """
        size, input_size = tuple(reversed(output_shape[2:])), tuple(reversed(image.shape[2:]))
        transform, interpolation = self.transform, INTERPOLATIONS[self.mode]
        dtype = compute_dtype(image.dtype)

        def load(numbers: Tensor) -> Tensor:
            # A dense map stays in its own dtype: a chunk at a time is converted.
            numbers = numbers if transform.dense else numbers.to(dtype)
            return transform.load(numbers, input_size, size, self.align_corners)

        def pad(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
            return PADDINGS[self.padding_mode](x, n, self.align_corners)

        coefficients = load(parameters)
        tangents = None if tangent is None else load(tangent)
        order += tangent is not None
        count = math.prod(size) // layers
        elements = CHUNK_ELEMENTS * PLAIN.tensors // access.tensors
        step = max(1, elements // (output_shape[0] * (output_shape[1] + len(size))))
        for start in range(0, count, step):
            stop = min(start + step, count)
            rest = torch.arange(start, stop, device=image.device)
            index = []
            for n in size:
                index.append(rest % n)
                rest = rest // n
            for layer in range(layers):
                if layers > 1:
                    index = [*index[:-1], torch.full_like(index[-1], layer)]
                u = [along.to(dtype) - (n - 1) / 2 for along, n in zip(index, size, strict=True)]
                whole = _Pixels(start, stop, index, u, size, input_size, self.align_corners, auxiliary, grad_auxiliary)
                for pixels, share, first, last in self._samples(coefficients, whole):
                    x = transform.map(coefficients, pixels)
                    t = None if tangents is None else transform.map_jvp(coefficients, tangents, pixels)
                    if interpolation.taps <= 2:  # padding moves the sample, but for cubic the taps: as torch does
                        padded = [pad(a, n) for a, n in zip(x, input_size, strict=True)]
                        looks, x, slopes = x, [a for a, _ in padded], [s for _, s in padded]
                        t = None if t is None else [a * s for a, s in zip(t, slopes, strict=True)]
                    else:
                        x = [a.nan_to_num(nan=-(2.0**24)).clamp(8 - 2.0**24, 2.0**24 - 8) for a in x]  # exact integers
                        looks = x
                        slopes = [torch.ones_like(a) for a in x]
                    yield _Chunk(
                        pixels, coefficients, tangents, looks, x, t, slopes,
                        (lambda q, n: q) if interpolation.taps <= 2 else (lambda q, n: pad(q, n)[0]),
                        interpolation, order, share, layer,
                        begins=first and layer == 0, ends=last and layer == layers - 1,
                    )  # fmt: skip

    def _samples(self, coefficients: Tensor, pixels: _Pixels) -> Iterator[tuple[_Pixels, Tensor | None, bool, bool]]:
        """The samples that make each output pixel: where they lie, how much each counts, if the first, if the last."""
        if self.supersample == 1:
            yield pixels, None, True, True
            return
        dims, like = len(pixels.u), pixels.u[0]
        per_axis = torch.full((1, 1, 1), self.supersample, device=like.device)
        if self.supersample == 0:
            shrink = self.transform.shrink
            per_axis = self._shrink(coefficients, pixels) if shrink is None else shrink(coefficients)
        counts = per_axis**dims
        most = int(counts.max()) if counts.numel() else 0
        for sample in range(most):
            u: list[Tensor] = []
            rest: Any = sample
            for along, n in zip(pixels.index, pixels.size, strict=True):
                fine = along * per_axis + rest % per_axis
                u.append(
                    (fine.to(like.dtype) - (n * per_axis - 1).to(like.dtype) * 0.5) * (1 / per_axis.to(like.dtype))
                )
                rest = rest // per_axis
            share = torch.where(sample < counts, 1 / counts.to(like.dtype), 0)
            yield replace(pixels, u=u), share, sample == 0, sample == most - 1

    def _shrink(self, coefficients: Tensor, pixels: _Pixels) -> Tensor:
        """Samples along each axis for each output pixel, (M, K, P), from what the map does across it."""
        longest = torch.zeros((), dtype=pixels.u[0].dtype, device=pixels.u[0].device)
        for axis in range(len(pixels.u)):
            ends = []
            for side in (-0.5, 0.5):
                u = [along + side if other == axis else along for other, along in enumerate(pixels.u)]
                ends.append(self.transform.map(coefficients, replace(pixels, u=u)))
            squares = sum(((b - a).square() for a, b in zip(*ends, strict=True)), torch.zeros(()))
            longest = longest.maximum(squares)
        return samples_for(longest)


def _part(image: Tensor, pixels: _Pixels) -> Tensor:
    """A chunk of an image (N, C, *size) of any strides, (N, C, P), without copying the image."""
    try:
        return image.view(*image.shape[:2], -1)[:, :, pixels.start : pixels.stop]
    except RuntimeError:  # rows that don't follow each other, or a layer that stands for all
        index: tuple[Tensor | slice, ...] = (slice(None), slice(None), *reversed(pixels.index))
        return image[index]


def _read(image: Tensor, corner: Corner) -> Tensor:
    """A corner's pixels of images (M, C, *size) of any strides, (M, C, K, P), without copying an image."""
    try:
        flat = image.view(*image.shape[:2], -1)
    except RuntimeError:  # rows that don't follow each other: slower, but no copy
        n = torch.arange(image.shape[0], device=image.device)[:, None, None]
        index: tuple[Tensor | slice, ...] = (n, slice(None), *reversed(corner.pixel))
        return image[index].movedim(-1, 1)
    at = corner.flat(image).expand(-1, image.shape[1], -1, -1)
    return flat.gather(2, at.flatten(2)).view(at.shape)
