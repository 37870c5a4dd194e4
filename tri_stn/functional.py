"""The public functions: check, bring into one form, call the operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .lazy import LazyGrid, check_align_corners
from .transforms import Grid, Transform

MODES = ("bilinear", "nearest", "bicubic")
PADDING_MODES = ("zeros", "border", "reflection")
LARGEST_AXIS = 2**24
"""Pixels along an axis that fp32 coordinates can tell apart."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def warp(
    input: Tensor,
    transform: Transform,
    size: Sequence[int] | None = None,
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    """Read ``input`` where ``transform`` looks: the sampler of a spatial transformer network.

    Equivalent to::

        grid = F.affine_grid(theta, (N, C, *size), align_corners=align_corners)
        F.grid_sample(input, grid, mode, padding_mode, align_corners)

    without storing a grid, in the forward or in the backward pass.

    Args:
        input: (N, C, W), (N, C, H, W) or (N, C, D, H, W), any strides; fp16, bf16, fp32, fp64 or
            complex. channels_last is kept in the output and in the gradient.
        transform: one map per image, or K maps per image. Its dtype may differ from the input's. One
            image is read through any number of maps, and one map serves any number of images,
            without copies.
        size: the output's ([D,] [H,] W) in pixels. By default that of a dense transform, else the input's.
        mode: "bilinear" (linear along each axis), "nearest" (which rounds half to even, as torch
            does) or, in 1-D and 2-D, "bicubic" (a = -0.75, along each axis).
        padding_mode: what lies outside the image: "zeros", "border" or "reflection".
        align_corners: whether -1 and 1 are the centres of the outermost pixels (True) or their
            outer edges (False), as in `torch.nn.functional.grid_sample`.

    Returns:
        (N, C, *size), or (N, K, C, *size) for K maps per image, in the input's dtype.
        Coordinates and sums are fp32 (fp64 for fp64 input), under autocast too.

    Raises:
        TypeError: a tensor is not of a supported dtype, or an argument not of a supported type.
        ValueError: shapes, devices or option names do not fit; the message says what would.

    Source: Jaderberg et al. 2015, equations 1 to 7. At borders and ties, gradients follow ATen.
    """
    _check_input(input)
    if not isinstance(transform, Transform):
        raise TypeError(f"warp takes a transform such as tri_stn.Affine(theta); got {type(transform).__name__}.")
    _check_choice("mode", mode, MODES)
    _check_choice("padding_mode", padding_mode, PADDING_MODES)
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners must be True or False; got {align_corners!r}.")
    dims = transform.dims
    if input.dim() != dims + 2:
        raise ValueError(
            f"A {dims}-D {type(transform).__name__} takes input of shape (N, C, {_axes(dims)}), {dims + 2} dimensions; "
            f"got {tuple(input.shape)}."
        )
    if mode == "bicubic" and dims == 3:
        raise ValueError("mode 'bicubic' takes 1-D and 2-D images; for 3-D images use 'bilinear' or 'nearest'.")
    if 0 in input.shape[2:]:
        raise ValueError(f"input must have at least one pixel; got spatial size {tuple(input.shape[2:])}.")
    if size is None:
        size = input.shape[2:] if transform.size is None else transform.size
    size = _check_size(size, dims)
    if any(s > LARGEST_AXIS for s in (*input.shape[2:], *size)) and input.dtype != torch.float64:
        raise ValueError(
            f"An axis of more than 2 ** 24 pixels needs fp64, as fp32 cannot number its pixels; got input "
            f"{tuple(input.shape[2:])} and size {size} in {input.dtype}. Convert the input with .double()."
        )
    if transform.size is not None and tuple(transform.size) != size:
        raise ValueError(
            f"This {type(transform).__name__} has one map per pixel of an output of size {tuple(transform.size)}; got "
            f"size {size}. Leave size out."
        )
    if input.is_complex():
        parts = [
            warp(part, transform, size, mode=mode, padding_mode=padding_mode, align_corners=align_corners)
            for part in (input.real, input.imag)
        ]
        return torch.complex(*parts)

    parameters = transform.parameters
    if parameters.device != input.device:
        raise ValueError(f"input and transform must be on the same device; got {input.device} and {parameters.device}.")
    parameters, batch = _match_batch(input, parameters, transform.batch)
    output = ops.warp(input, parameters, transform.kind, size, mode, padding_mode, align_corners)
    return output.view(*batch, *output.shape[1:]) if len(batch) == 2 else output


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """`torch.nn.functional.grid_sample`, with the same signature, warning and numbers.

    Beyond it: 1-D images, (N, C, W) with grid (N, W_out, 1); bicubic in 1-D; a grid of another
    dtype than the image; complex images; one image with many grids, and K grids per image, (N, K,
    *size, d) → (N, K, C, *size); channels_last kept; fp32 coordinates and sums for 16-bit images.

    Args:
        input: (N, C, [D,] [H,] W).
        grid: (N, [D_out,] [H_out,] W_out, d), normalised, x first. One that `affine_grid` returned is
            not computed, as long as nothing else has read it.
        mode: "bilinear", "nearest" or "bicubic".
        padding_mode: "zeros", "border" or "reflection".
        align_corners: as in `warp`; None means False, with torch's warning.

    Raises:
        TypeError, ValueError: as `warp`.
    """
    align_corners = check_align_corners(align_corners, stacklevel=3)
    transform: Transform
    if type(grid) is LazyGrid and grid.recipe.serves(align_corners):
        transform, size = grid.recipe.transform(), grid.recipe.size[2:]
    else:
        transform, size = Grid(grid), None
    return warp(input, transform, size, mode=mode, padding_mode=padding_mode, align_corners=align_corners)


def _match_batch(input: Tensor, parameters: Tensor, batch: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The parameters as (M, K, …) for the M images of the input, and the batch shape of the output.

    One image with N maps becomes K = N maps of that image: its gradient is then summed in the
    kernel. One map for many images is expanded, which costs a few numbers per image.
    """
    images, maps = input.shape[0], batch[0]
    if len(batch) == 1:
        parameters = parameters.unsqueeze(1)
    if maps != images:
        if maps == 1:
            parameters = parameters.expand(images, *parameters.shape[1:])
            maps = images
        elif images == 1:
            parameters = parameters.flatten(0, 1).unsqueeze(0)
        else:
            raise ValueError(
                f"input and transform must have the same batch size, or either of them 1; got {images} images "
                f"and {maps} maps. For several maps per image, give the transform the shape (N, K, …)."
            )
    return parameters, (maps, *batch[1:])


def _check_input(input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor; got {type(input).__name__}.")
    if input.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"input must be of dtype {allowed}; got {input.dtype}. Convert it, for example with .float().")
    if input.layout != torch.strided:
        raise TypeError(f"input must be a dense tensor; got layout {input.layout}. Convert it with .to_dense().")


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def _check_size(size: Sequence[int], dims: int) -> tuple[int, ...]:
    if not isinstance(size, Sequence) or not all(isinstance(s, (int, torch.SymInt)) for s in size):
        raise TypeError(f"size must be a sequence of {dims} integers, ({_axes(dims)}); got {size!r}.")
    if len(size) != dims:
        hint = " Leave out the batch and channels." if len(size) == dims + 2 else ""
        raise ValueError(f"size must be the output's ({_axes(dims)}); got {tuple(size)}.{hint}")
    if any(s < 0 for s in size):
        raise ValueError(f"size must not be negative; got {tuple(size)}.")
    return tuple(size)


def _axes(dims: int) -> str:
    return ", ".join(("D", "H", "W")[-dims:])
