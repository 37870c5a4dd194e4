"""The public functions: check, bring into one form, call the operator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
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
    if max(*input.shape[2:], *size) > LARGEST_AXIS and input.dtype != torch.float64:
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
        grid: (N, [D_out,] [H_out,] W_out, d), normalised, x first.
        mode: "bilinear", "nearest" or "bicubic".
        padding_mode: "zeros", "border" or "reflection".
        align_corners: as in `warp`; None means False, with torch's warning.

    Raises:
        TypeError, ValueError: as `warp`; where sizes or devices do not fit, an error that is torch's
            RuntimeError as well, in torch's words.
    """
    if align_corners is None:
        warnings.warn(
            "Default grid_sample and affine_grid behavior has changed to align_corners=False since 1.3.0. "
            "Please specify align_corners=True if the old behavior is desired. See the documentation of grid_sample "
            "for details.",
            stacklevel=2,
        )
        align_corners = False
    _check_grid(input, grid)
    return warp(input, Grid(grid), mode=mode, padding_mode=padding_mode, align_corners=align_corners)


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


class _MismatchError(ValueError, RuntimeError):
    """Arguments of `grid_sample` that do not fit together: a ValueError here, a RuntimeError in torch."""


def _check_grid(input: object, grid: object) -> None:
    """What `F.grid_sample` refuses, with the phrases that code written for it may look for."""
    if not isinstance(input, Tensor) or not isinstance(grid, Tensor):
        return  # for the transform and `warp` to refuse
    dims = input.dim() - 2
    if grid.device != input.device:
        raise _MismatchError(
            f"Expected all tensors to be on the same device; got input on {input.device} and grid on {grid.device}. "
            "Move one of them with .to()."
        )
    if grid.dim() == 0 or grid.shape[-1] != dims:
        problem = f"expected grid to have size {dims} in last dimension, one for each spatial one of the input"
    elif dims not in (1, 2, 3) or grid.dim() not in (dims + 2, dims + 3):
        problem = (
            "expected 3D, 4D or 5D input and grid with same number of dimensions, or one more for K grids per image"
        )
    elif input.shape[0] != grid.shape[0] and input.shape[0] != 1 and grid.shape[0] != 1:
        problem = "expected grid and input to have same batch size, or either of them 1"
    elif 0 in input.shape[2:]:
        problem = "expected input to have non-empty spatial dimensions"
    else:
        return
    raise _MismatchError(
        f"{problem}; got input of shape {tuple(input.shape)} and grid of shape {tuple(grid.shape)}. "
        "Images are (N, C, *size), grids (N, *output_size, d)."
    )


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but got: {value!r}.")


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
