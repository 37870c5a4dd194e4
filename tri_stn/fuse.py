"""The swap-in: inside `fuse`, code that calls torch's affine_grid and grid_sample runs fused.

Four attributes of `torch` are replaced, for all threads: ``affine_grid_generator`` and the
``grid_sampler`` three. ``F.affine_grid`` and ``F.grid_sample`` stay as they are: they check, warn, and look these
up each time they run, in compiled code when it is traced. So a name imported earlier (``from
torch.nn.functional import grid_sample``) arrives here as well, and nobody has to search for who holds it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import ops, reference
from .functional import LARGEST_AXIS, MODES, PADDING_MODES, warp
from .lazy import DEVICES, LazyGrid, Recipe, check_align_corners, fits, is_plain, ordinary
from .transforms import Grid, Transform

CACHE_KEY_TAG = "tri_stn.fuse"

_lock = threading.Lock()
_depth = 0
_originals: dict[str, Callable] = {
    name: getattr(torch, name)
    for name in ("affine_grid_generator", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
}


class fuse(contextlib.ContextDecorator):  # noqa: N801  used as a function
    """Run unmodified code that calls ``F.affine_grid`` and ``F.grid_sample`` fused.

    ::

        with tri_stn.fuse():                # or @tri_stn.fuse() on a function,
            output = model(images)          # or tri_stn.fuse().__enter__() when the program starts

    ``F.grid_sample(input, F.affine_grid(theta, size))`` becomes ``warp(input, Affine(theta))``: no grid is
    stored, forward or backward. An affine grid that is used in any other way is the ordinary tensor.
    Other grids go through `tri_stn.grid_sample` on a GPU and stay with torch on the CPU. What `warp`
    does not take goes to torch, and so do torch's errors and warnings. Under autocast the dtypes
    are torch's, but coordinates are fp32 where torch's affine grid has 16 bits.

    It holds for all threads, nests, and is undone by the outermost exit. Under `torch.compile`
    enter it outside of the compiled code: code keeps what it was compiled with.

    Raises:
        RuntimeError: it is left more often than it was entered.
    """

    def __enter__(self) -> fuse:
        if not torch.compiler.is_compiling():  # inside compiled code it has no effect, and breaks no graph
            _enter()
        return self

    def __exit__(self, *exception: object) -> None:
        if not torch.compiler.is_compiling():
            _exit()


def _enter() -> None:
    global _depth
    with _lock:
        if _depth == 0:
            _tell_compilers()
            for name, replacement in _REPLACEMENTS.items():
                _originals[name] = getattr(torch, name)
                setattr(torch, name, replacement)
            # torch caches compiled graphs by what they call, and they call F.grid_sample with and without us.
            torch.compiler.config.cache_key_tag += CACHE_KEY_TAG
        _depth += 1


def _exit() -> None:
    global _depth
    with _lock:
        if _depth == 0:
            raise RuntimeError("fuse was left more often than it was entered.")
        _depth -= 1
        if _depth:
            return
        for name, replacement in _REPLACEMENTS.items():
            # Somebody else's replacement on top of ours stays; below it, ours only passes on.
            if getattr(torch, name) is replacement:
                setattr(torch, name, _originals[name])
        torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag.replace(CACHE_KEY_TAG, "")
        _tell_compilers()


def _tell_compilers() -> None:
    """Let compilers take a replacement for what it replaces: an operator, not Python code to look into.

    Both keep a table of torch's functions that they make by name on first use: from the originals
    if they make it now.
    """
    for name, replacement in _REPLACEMENTS.items():
        torch.jit._builtins._register_builtin(replacement, f"aten::{name}")
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return
    for replacement in _REPLACEMENTS.values():
        torch.compiler.allow_in_graph(replacement)
    table = torch._dynamo.trace_rules.get_torch_obj_rule_map
    if _originals["grid_sampler"] not in table():  # imported, and the table made, in between
        table.cache_clear()


# --- what runs in the place of torch's functions -----------------------------------------------------


def affine_grid_generator(theta: Tensor, size: list[int], align_corners: bool) -> Tensor:
    if _depth and is_plain(theta) and len(size) > 3 and fits(theta, size, align_corners):
        return LazyGrid.of(theta, tuple(size), align_corners)
    grid = _originals["affine_grid_generator"](theta, size, align_corners)
    if _depth and _is_traced(grid) and not _is_edited(grid):
        grid.recipe = Recipe(theta.clone(), tuple(size), align_corners, grid.dtype, grid.requires_grad)
    return grid


def _grid_sample(
    input: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> Tensor | None:
    """``F.grid_sample`` of a lazy grid, or None where torch should have the call."""
    if mode not in MODES or padding_mode not in PADDING_MODES:
        return None
    align_corners = check_align_corners(align_corners, stacklevel=6)
    output = _fused(input, grid, mode, padding_mode, align_corners)
    # Called again on another tensor, for torch would warn about a line of ours.
    return F.grid_sample(input, ordinary(grid), mode, padding_mode, align_corners) if output is None else output


def _sampler(name: str, dims: tuple[int, ...]) -> tuple[Callable[..., Tensor], Callable[..., Tensor | None]]:
    """What replaces one of torch's samplers, and the part of it for calls that are ours."""

    def fused(
        input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
    ) -> Tensor | None:
        if interpolation_mode not in (0, 1, 2) or padding_mode not in (0, 1, 2):
            return None
        return _fused(input, grid, MODES[interpolation_mode], PADDING_MODES[padding_mode], align_corners, dims)

    def sampler(input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Tensor:
        output = fused(input, grid, interpolation_mode, padding_mode, align_corners)
        if output is None:
            return _originals[name](input, grid, interpolation_mode, padding_mode, align_corners)
        return output

    sampler.__name__ = sampler.__qualname__ = name
    return sampler, fused


_REPLACEMENTS: dict[str, Callable[..., Tensor]] = {"affine_grid_generator": affine_grid_generator}

# A lazy grid is recognised outside of `fuse`, too.
LazyGrid.samplers[F.grid_sample] = _grid_sample
for _name, _dims in (("grid_sampler", (1, 2, 3)), ("grid_sampler_2d", (2,)), ("grid_sampler_3d", (3,))):
    _REPLACEMENTS[_name], LazyGrid.samplers[_originals[_name]] = _sampler(_name, _dims)


def _fused(
    input: Tensor, grid: Tensor, mode: str, padding_mode: str, align_corners: bool, dims: tuple[int, ...] = (1, 2, 3)
) -> Tensor | None:
    """The output, or None where torch should have the call: what it refuses, and what `warp` does not take."""
    traced = _is_traced(input) and _is_traced(grid)
    if not traced and not is_plain(input):
        return None
    recipe = _recipe(grid)
    transform: Transform
    if recipe is not None and recipe.serves(align_corners):
        transform, size, dtype = recipe.transform(), recipe.size[2:], recipe.dtype
    elif _depth and (traced or is_plain(grid)) and _is_grid(grid) and ops._backend(grid) is not reference:
        transform, size, dtype = Grid(grid), grid.shape[1:-1], grid.dtype
    else:
        return None
    if (
        input.dim() != transform.dims + 2
        or transform.dims not in dims
        or input.shape[0] != transform.batch[0]
        or input.device != transform.parameters.device
        or input.layout != torch.strided
        or (mode == "bicubic" and transform.dims == 3)
        or 0 in input.shape
        or any(s > LARGEST_AXIS for s in (*input.shape[2:], *size))
    ):
        return None
    if torch.is_autocast_enabled(input.device.type):
        if torch.float64 in (input.dtype, dtype) or len(dims) == 1:
            return None
        # As torch converts the arguments of grid_sampler, and not of those for one number of dimensions.
        dtype = torch.float32 if input.device.type == "cpu" else torch.promote_types(input.dtype, dtype)
        input = input.to(dtype)
    if input.dtype != dtype:
        return None
    return warp(input, transform, size, mode=mode, padding_mode=padding_mode, align_corners=align_corners)


def _recipe(grid: Tensor) -> Recipe | None:
    """What an affine grid was made of, if it is still what was made."""
    if type(grid) is LazyGrid:
        return grid.recipe
    return getattr(grid, "recipe", None) if _is_traced(grid) and not _is_edited(grid) else None


def _is_grid(grid: Tensor) -> bool:
    """Whether it is a grid as torch takes it, on a device of ours."""
    fits = grid.is_floating_point() and grid.dim() in (4, 5) and grid.shape[-1] == grid.dim() - 2
    return fits and grid.device.type in DEVICES


# --- under torch.compile: the grid is in the graph, and falls out of it if nobody reads it -------------


def _is_traced(tensor: object) -> bool:
    """Whether `torch.compile` is making operators of what happens to this tensor, for a device of ours."""
    if type(tensor) is not FunctionalTensor or tensor.device.type not in DEVICES:
        return False
    return type(torch._from_functional_tensor(tensor.elem)) is FakeTensor


def _is_edited(grid: Any) -> bool:
    """Whether anything was written to the memory of a traced tensor, through any view."""
    return (
        torch._functionalize_has_data_mutation(grid.elem)  # type: ignore[attr-defined]
        or torch._functionalize_has_metadata_mutation(grid.elem)
        or torch._functionalize_was_storage_changed(grid.elem)
    )
