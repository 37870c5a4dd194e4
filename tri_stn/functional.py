"""The public functions: check, bring into one form, call the operator."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from numbers import Complex, Real
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from . import autograd
from .checks import axis_names, check_size, integer
from .lazy import LazyGrid, check_align_corners
from .transforms import Grid, Transform

MODES = ("bilinear", "nearest", "bicubic")
PROJECTIONS = ("sum", "mean", "max")
PADDING_MODES = ("zeros", "border", "reflection")
LARGEST_AXIS = 2**24
"""Pixels along an axis that fp32 coordinates can tell apart."""
MOST_SAMPLES = 16
"""Along each axis of an output pixel, with antialias."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


class Array(Protocol):
    """Of NumPy: a number, or an array of them."""

    def __array__(self) -> Any: ...


Fill = float | complex | Sequence[float] | Sequence[complex] | Array | Tensor


@overload
def warp(
    input: Tensor, transform: Transform, size: Sequence[int] | None = None, *,
    mode: str = ..., padding_mode: str = ..., align_corners: bool = ...,
    fill: Fill = ..., return_mask: Literal[False] = False,
    antialias: bool = ..., supersample: int = ..., project: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def warp(
    input: Tensor, transform: Transform, size: Sequence[int] | None = None, *,
    mode: str = ..., padding_mode: str = ..., align_corners: bool = ...,
    fill: Fill = ..., return_mask: Literal[True],
    antialias: bool = ..., supersample: int = ..., project: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def warp(
    input: Tensor,
    transform: Transform,
    size: Sequence[int] | None = None,
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    fill: Fill = 0,  # not 0.0: torch.compile takes a default for a number that may vary
    return_mask: bool = False,
    antialias: bool = False,
    supersample: int = 1,
    project: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
            does) or "bicubic" (cubic convolution along each axis, a = -0.75).
        padding_mode: what lies outside the image: "zeros", "border" or "reflection".
        align_corners: whether -1 and 1 are the centres of the outermost pixels (True) or their
            outer edges (False), as in `torch.nn.functional.grid_sample`.
        fill: with padding_mode "zeros", the value of what lies outside the image, instead of 0: a number, C
            numbers or a NumPy array (C,) (which take a small copy to the device), or a tensor (C,) on the input's
            device, such as the dataset's mean. A constant: it has no gradient, and `torch.vmap` does not map over it.
            One that is not finite marks what lies outside, but makes a gradient of the transform NaN.
        return_mask: also return how much of each output pixel comes from the image, from the same pass.
        antialias: average as many samples per output pixel as the map shrinks the image: along each axis k, the
            longest step in source pixels that one output pixel makes along any axis, rounded up (a step of up to
            2.01 counts as 2), and 16 at most. One k for each map that is affine, one for each output pixel
            of another, found on the device. Not for dense transforms, which say where one sample
            lies: upsample those, or give a parametric one.
        supersample: average this many samples along each axis, always: k ** d at evenly spaced places,
            p + (i + 0.5) / k - 0.5. Derivatives are those of the average, k held. 1 for one sample, at the centre.
        project: reduce a volume's output along its depth as it is sampled (Jaderberg et al. 2015, appendix A.3):
            "sum", "mean" or "max", for an `Affine` or `Projective` map of size (D, H, W). The volume of samples
            is not stored, but for second derivatives. "max" takes the first of equals; it finds the
            largest samples first, and reads them through a grid of three numbers per element of the output, without
            supersampling; a channels_last input is copied for it.

    Returns:
        (N, C, *size), or (N, K, C, *size) for K maps per image, in the input's dtype; (N, [K,] C, H, W) if projected.
        Coordinates and sums are fp32 (fp64 for fp64 input), under autocast too.

        With ``return_mask``, a pair: that, and the mask (N, [K,] 1, *size) in the input's (real) dtype. It is
        ``warp(ones, transform, size, mode=mode)``, whatever the padding mode: the share of the pixel's
        weight that lies inside the image, exactly 1 where all of it does and 0 where none. It is a
        constant: no gradient flows through it.

    Raises:
        TypeError: a tensor is not of a supported dtype, or an argument not of a supported type.
        ValueError: shapes, devices or option names do not fit; the message says what would.

    Source: Jaderberg et al. 2015, equations 1 to 7. At borders and ties, gradients follow ATen.
    """
    parameters = _check_call("warp", input, transform, mode, padding_mode, align_corners)
    dims = transform.dims
    if input.dim() != dims + 2:
        raise ValueError(
            f"A {dims}-D {type(transform).__name__} takes input of shape (N, C, {axis_names(dims)}), {dims + 2} "
            f"dimensions; got {tuple(input.shape)}."
        )
    if 0 in input.shape[2:]:
        raise ValueError(f"input must have at least one pixel; got spatial size {tuple(input.shape[2:])}.")
    fixed = transform.size
    size = _check_size((fixed or input.shape[2:]) if size is None else size, dims)
    _check_axes(input.dtype, input.shape[2:], size)
    if fixed is not None and tuple(fixed) != size:
        raise ValueError(
            f"This {type(transform).__name__} has one map per pixel of an output of size {tuple(fixed)}; got "
            f"size {size}. Leave size out."
        )
    if not isinstance(return_mask, bool):
        raise TypeError(f"return_mask must be True or False; got {return_mask!r}.")
    fills = _check_fill(fill, input, padding_mode)
    samples = _check_samples(transform, antialias, supersample)
    if samples != 1:
        _check_axes(input.dtype, tuple(n * (samples or MOST_SAMPLES) for n in size))
    _check_projection(input, transform, size, project, samples, fills, return_mask)
    parameters, batch = _match_batch(input, parameters, transform.batch)
    choices = transform.kind, mode, padding_mode, align_corners, samples
    rest = parameters, _match_auxiliary(input, transform), size, project, batch, choices
    if input.is_complex():
        real_fill, imag_fill = (None, None) if fills is None else (fills.real, fills.imag)
        real, mask = _sample(input.real, real_fill, return_mask, *rest)
        output = torch.complex(real, _sample(input.imag, imag_fill, False, *rest)[0])
    else:
        output, mask = _sample(input, fills, return_mask, *rest)
    return output if mask is None else (output, mask)


def _sample(
    input: Tensor, fill: Tensor | None, return_mask: bool, parameters: Tensor, auxiliary: Tensor | None,
    size: tuple[int, ...], project: str | None, batch: tuple[int, ...], choices: tuple,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What `warp` returns, for a real image."""
    arguments = (input, parameters, auxiliary, fill, size, project or "", *choices)
    mask = None
    if project == "max":
        output = autograd.warp_largest(input, parameters, size, *choices)
    elif return_mask:
        output, mask = autograd.warp_with_mask(*arguments)
    else:
        output = autograd.warp(*arguments)
    if len(batch) == 2:
        output = output.view(*batch, *output.shape[1:])
        mask = None if mask is None else mask.view(*batch, *mask.shape[1:])
    return output, mask


def splat(
    input: Tensor,
    transform: Transform,
    size: Sequence[int],
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    normalize: bool = False,
) -> Tensor:
    """Add ``input`` up where ``transform`` looks: forward mapping, the exact adjoint of `warp`.

    Each pixel of the input is spread over the pixels of the output that `warp` with the same
    transform and options would read there: ``(warp(x, …) * y).sum() == (x * splat(y, …)).sum()``.
    Where many land, the output is their sum; where none does, a hole, it is 0.

    Args:
        input: (N, C, W), (N, C, H, W) or (N, C, D, H, W), or with K maps per image (N, K, C, …), any
            strides; fp16, bf16, fp32, fp64 or complex.
        transform: where each pixel of the input goes; a dense transform has the input's size. One
            map serves any number of inputs, and one input any number of maps.
        size: the output's ([D,] [H,] W) in pixels.
        mode, padding_mode, align_corners: as in `warp`. Under "border" and "reflection", what would
            land outside is folded back in.
        normalize: divide by the accumulated weight, so that overlaps are averages (holes stay 0). To see
            both, splat a tensor of ones. Not for "bicubic", whose weights have both signs.

    Returns:
        (N, C, *size), in the input's dtype; the K inputs of an image are added up.

    Raises:
        TypeError, ValueError: as `warp`.
    """
    parameters = _check_call("splat", input, transform, mode, padding_mode, align_corners)
    dims, maps = transform.dims, tuple(transform.batch[1:])
    if input.dim() != dims + 2 + len(maps) or maps not in ((), tuple(input.shape[1:2])):
        shape = f"(N, {f'K = {maps[0]}, ' if maps else ''}C, {axis_names(dims)})"
        raise ValueError(
            f"This {dims}-D {type(transform).__name__} takes input of shape {shape}; got {tuple(input.shape)}."
        )
    size = _check_size(size, dims)
    if 0 in size:
        raise ValueError(f"size must have at least one pixel; got {size}.")
    _check_axes(input.dtype, input.shape[-dims:], size)
    if transform.size is not None and transform.size != input.shape[-dims:]:
        raise ValueError(
            f"This {type(transform).__name__} has one map per pixel of an input of size {tuple(transform.size)}; got "
            f"{tuple(input.shape[-dims:])}."
        )
    if normalize and mode == "bicubic":
        raise ValueError("normalize takes mode 'bilinear' or 'nearest': the weights of 'bicubic' have both signs.")
    choices = transform.kind, mode, padding_mode, align_corners, 1
    rest = parameters, transform.auxiliary, transform.batch, size, choices
    if input.is_complex():
        output = torch.complex(*(_add_up(part, *rest) for part in (input.real, input.imag)))
    else:
        output = _add_up(input, *rest)
    if normalize:
        wide = torch.promote_types(input.real.dtype, torch.float32)  # a count of many, which 16 bits would round
        ones = torch.ones((), dtype=wide, device=input.device).expand(1, *maps, 1, *input.shape[-dims:])
        weight = _add_up(ones, *rest)
        output = (output / weight.where(weight > 0, 1)).to(input.dtype)
    return output


def _add_up(
    input: Tensor, parameters: Tensor, auxiliary: Tensor | None, maps: torch.Size, size: tuple[int, ...], choices: tuple
) -> Tensor:
    """What `splat` returns, for a real image and not normalised."""
    batch = _common_batch(len(input), maps[0])
    parameters = parameters.expand(batch, *parameters.shape[1:])
    input = input.expand(batch, *input.shape[1:])
    if len(maps) == 2:
        input = input.flatten(0, 1)
    else:
        parameters = parameters.unsqueeze(1)
        auxiliary = None if auxiliary is None else auxiliary.unsqueeze(1)
    return autograd.splat(input, parameters, auxiliary, size, *choices)


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """`torch.nn.functional.grid_sample`, with the same signature, warning and numbers.

    Beyond it: 1-D images, (N, C, W) with grid (N, W_out, 1); bicubic in 1-D and 3-D; a grid of another
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
        TypeError, ValueError: as `warp`; where sizes or devices do not fit, an error that is torch's
            RuntimeError as well, in torch's words.
    """
    align_corners = check_align_corners(align_corners, stacklevel=3)
    transform: Transform
    if type(grid) is LazyGrid and grid.recipe.serves(align_corners):
        transform, size = grid.recipe.transform(), grid.recipe.size[2:]
    else:
        _check_grid(input, grid)
        transform, size = Grid(grid), None
    return warp(input, transform, size, mode=mode, padding_mode=padding_mode, align_corners=align_corners)


def _match_batch(input: Tensor, parameters: Tensor, batch: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The parameters as (M, K, …) for the M images of the input, and the batch shape of the output.

    One image with N maps becomes K = N maps of that image: its gradient is then summed in the
    kernel. One map for many images is expanded, which costs a few numbers per image.
    """
    images, maps = _common_batch(input.shape[0], batch[0]), batch[0]
    if len(batch) == 1:
        parameters = parameters.unsqueeze(1)
    if input.shape[0] == 1 != maps:
        parameters = parameters.flatten(0, 1).unsqueeze(0)
    elif maps != images:
        parameters = parameters.expand(images, *parameters.shape[1:])
    return parameters, (images, *batch[1:])


def _match_auxiliary(input: Tensor, transform: Transform) -> Tensor | None:
    """The field of a chain as (M or 1, K or 1, *size, …), where one serves all."""
    field, maps = transform.auxiliary, transform.batch
    if field is None:
        return None
    if len(maps) == 1:
        field = field.unsqueeze(1)
    if input.shape[0] == 1 != maps[0] and tuple(field.shape[:2]) != (1, 1):
        field = field.expand(maps[0], *maps[1:] or (1,), *field.shape[2:]).flatten(0, 1).unsqueeze(0)
    return field


def _common_batch(images: int, maps: int) -> int:
    if images != maps and images != 1 and maps != 1:  # not with `in`: sizes may be symbols
        raise ValueError(
            f"input and transform must have the same batch size, or either of them 1; got {images} images "
            f"and {maps} maps. For several maps per image, give the transform the shape (N, K, …)."
        )
    return maps if images == 1 else images


def _check_call(
    name: str, input: Tensor, transform: Transform, mode: str, padding_mode: str, align_corners: bool
) -> Tensor:
    """What warp and splat ask of their arguments alike; the transform's parameters."""
    _check_input(input)
    if not isinstance(transform, Transform):
        raise TypeError(f"{name} takes a transform such as tri_stn.Affine(theta); got {type(transform).__name__}.")
    _check_choice("mode", mode, MODES)
    _check_choice("padding_mode", padding_mode, PADDING_MODES)
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners must be True or False; got {align_corners!r}.")
    if transform.align_corners not in (None, align_corners):
        raise ValueError(
            f"This {type(transform).__name__} was made for align_corners={transform.align_corners}; got "
            f"align_corners={align_corners}. Give both the same."
        )
    parameters = transform.parameters
    if parameters.device != input.device:
        raise ValueError(f"input and transform must be on the same device; got {input.device} and {parameters.device}.")
    return parameters


def _check_input(input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor; got {type(input).__name__}.")
    if input.is_nested:
        raise TypeError("input must be one dense tensor; got a nested one. Warp its .unbind() one by one, or pad them.")
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


def _check_samples(transform: Transform, antialias: bool, supersample: int) -> int:
    """Samples along each axis of an output pixel; 0 for as many as the map shrinks."""
    if not isinstance(antialias, bool):
        raise TypeError(f"antialias must be True or False; got {antialias!r}.")
    if type(supersample) is not int:
        try:
            supersample = integer(supersample)
        except TypeError:
            raise TypeError(
                f"supersample must be an integer, the samples along each axis; got {supersample!r}."
            ) from None
    if supersample < 1:
        raise ValueError(f"supersample must be at least 1; got {supersample}.")
    if antialias and supersample != 1:
        raise ValueError(
            f"antialias chooses how many samples make a pixel, and supersample={supersample} says it. Leave one out."
        )
    if (antialias or supersample != 1) and transform.size is not None:
        raise ValueError(
            "antialias and supersample need a map that says where the places between pixels look; a "
            f"{type(transform).__name__} has one place per pixel. Give a parametric transform such as Affine, or "
            "upsample it and average the output."
        )
    return 0 if antialias else supersample


def _check_projection(
    input: Tensor, transform: Transform, size: Sequence[int], project: str | None, samples: int,
    fill: Tensor | None, return_mask: bool,
) -> None:  # fmt: skip
    if project is None:
        return
    _check_choice("project", project, PROJECTIONS)
    if transform.dims != 3 or transform.kind not in ("affine", "projective"):
        raise ValueError(
            "project takes a volume and an affine or projective map, such as Affine with theta (N, 3, 4); got a "
            f"{transform.dims}-D {type(transform).__name__}."
        )
    if size[0] < 1:
        raise ValueError(f"project needs a depth of at least 1; got size {tuple(size)}.")
    if return_mask:
        raise ValueError("project has no mask: leave return_mask out, or project ones for the share of each sum.")
    if project == "max" and (samples != 1 or fill is not None):
        raise ValueError("project='max' takes one sample per place: leave antialias, supersample and fill out.")
    if project == "max" and input.is_complex():
        raise ValueError(f"project='max' takes a real input, as complex numbers have no order; got {input.dtype}.")


def _check_fill(fill: Any, input: Tensor, padding_mode: str) -> Tensor | None:
    """The fill as (C,) numbers on the device, in the dtype that sums have; None for 0."""
    is_number = isinstance(fill, (Complex, torch.SymInt, torch.SymFloat))
    if is_number and fill == 0:
        return None
    if padding_mode != "zeros":
        raise ValueError(
            f"fill is for padding_mode 'zeros', where it is what lies outside the image; got {padding_mode!r}. "
            "Leave fill out."
        )
    channels, here = input.shape[1], input.device
    if hasattr(fill, "__array__") and not isinstance(fill, Tensor) and not is_number:
        with contextlib.suppress(TypeError):  # of numbers there are no tensors of, below
            fill = torch.as_tensor(fill.copy(), device="cpu").to(here, non_blocking=True)  # no negative strides
    if isinstance(fill, Tensor):
        if fill.requires_grad:
            raise ValueError(autograd.FILL_IS_CONSTANT)
        if fill.layout != torch.strided:
            raise TypeError(f"fill must be a dense tensor; got layout {fill.layout}. Convert it with .to_dense().")
        if fill.dim() == 0:  # a number, which torch takes from the CPU for any device
            fill = (fill.to(here, non_blocking=True) if fill.device.type == "cpu" else fill).expand(channels)
        if fill.device != here:
            raise ValueError(f"input and fill must be on the same device; got {here} and {fill.device}.")
        shape, is_complex = tuple(fill.shape), fill.is_complex()
    elif isinstance(fill, Sequence) and all(isinstance(f, Complex) for f in fill):
        shape, is_complex = (len(fill),), not all(isinstance(f, Real) for f in fill)
    elif is_number:
        shape, is_complex = (channels,), not isinstance(fill, (Real, torch.SymInt, torch.SymFloat))
    else:
        raise TypeError(
            "fill must be a number, a sequence of C numbers, an array (C,) or a tensor (C,); got "
            f"{fill!r} of type {type(fill).__name__}."
        )
    if shape != (channels,):
        raise ValueError(
            f"fill must be one number, or one for each of the input's {channels} channels; got shape {shape}."
        )
    if is_complex and not input.is_complex():
        raise TypeError(f"A complex fill takes a complex input; got input of {input.dtype}.")
    dtype = torch.promote_types(input.dtype, torch.float32)
    if isinstance(fill, Tensor):
        return fill.to(dtype)
    number: Any = complex if is_complex else float  # NumPy's as well
    if isinstance(fill, Sequence):
        return torch.tensor([number(f) for f in fill], dtype=dtype, device=here)
    return torch.full((channels,), number(fill) if isinstance(fill, Complex) else fill, dtype=dtype, device=here)


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but got: {value!r}.")


def _check_size(size: Sequence[int], dims: int) -> tuple[int, ...]:
    size = check_size("size", size, dims)
    if len(size) != dims:
        hint = " Leave out the batch and channels." if len(size) == dims + 2 else ""
        raise ValueError(f"size must be the output's ({axis_names(dims)}); got {size}.{hint}")
    if any(s < 0 for s in size):
        raise ValueError(f"size must not be negative; got {size}.")
    return size


def _check_axes(dtype: torch.dtype, *sizes: Sequence[int]) -> None:
    if any(n > LARGEST_AXIS for size in sizes for n in size) and dtype not in (torch.float64, torch.complex128):
        raise ValueError(
            f"An axis of more than 2 ** 24 pixels needs fp64, as fp32 cannot number its pixels; got sizes "
            f"{' and '.join(str(tuple(size)) for size in sizes)} in {dtype}. Convert the input with .double()."
        )
