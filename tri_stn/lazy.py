"""The affine grid that waits: a tensor that keeps theta and becomes a grid only if somebody looks.

A sampler that knows it reads theta. Anything else that code may do with it goes one of two ways:

- a call from Python on it turns it, in place, into the ordinary tensor, and then goes ahead;
- C++ that gets hold of it (`autograd.Function.apply`, a graph that saved it) works on its ordinary
  values, through ``__torch_dispatch__``. Its own node in autograd's graph leads to theta.

Once it is touched it stays ordinary: a view of it may be edited at any time.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_iter, tree_map_only

from .transforms import Affine

# As torch has them, whatever `fuse` or anybody else puts in their place later.
_affine_grid, _affine_grid_generator = F.affine_grid, torch.affine_grid_generator

DEVICES = ("cpu", "cuda")
_PLAIN = (Tensor, torch.nn.Parameter)
_lock = threading.RLock()


def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """`torch.nn.functional.affine_grid`, without storing the grid.

    `tri_stn.grid_sample` and torch's own take the grid as `warp` takes ``Affine(theta)``.
    For all other code it is an ordinary tensor: its shape, dtype and device are known, and any
    other use computes the values that theta had at the time of this call, with gradients to theta.

    Args:
        theta: (N, 2, 3) or (N, 3, 4), floating-point. Beyond torch: (N, 1, 2) for 1-D images.
        size: (N, C, [D,] [H,] W) of the output.
        align_corners: as in `warp`; None means False, with torch's warning.

    Returns:
        (N, [D,] [H,] W, d), normalised, x first. Where nothing can be saved it is computed at once: under
        `torch.compile`, `torch.func` and `torch.jit.trace`, and for subclasses of tensors.

    Raises:
        ValueError, NotImplementedError: as torch's own.
    """
    align_corners = check_align_corners(align_corners, stacklevel=3)
    if fits(theta, size, align_corners):
        warns = len(size) > 3 and align_corners and 1 in size[2:]  # for a height of 1: torch says it better
        if is_plain(theta) and not warns:
            return LazyGrid.of(theta, tuple(size), align_corners)
        if len(size) == 3:
            return _ordinary_grid(theta, size, align_corners)
    return _affine_grid(theta, size, align_corners)  # type: ignore[arg-type]


def check_align_corners(align_corners: bool | None, stacklevel: int) -> bool:
    """None becomes False, with the warning that torch gives."""
    if align_corners is None:
        warnings.warn(
            "Default grid_sample and affine_grid behavior has changed to align_corners=False since 1.3.0. "
            "Please specify align_corners=True if the old behavior is desired. See the documentation of grid_sample "
            "for details.",
            stacklevel=stacklevel,
        )
        return False
    return align_corners


def is_plain(tensor: object) -> bool:
    """Whether this is a tensor of torch's own classes, on a device of ours, and nothing traces or transforms."""
    return not (
        torch.compiler.is_compiling()  # first: for Dynamo the rest does not exist
        or type(tensor) not in _PLAIN
        or tensor.device.type not in DEVICES  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    )


def fits(theta: object, size: object, align_corners: object) -> bool:
    """Whether these are arguments of an affine grid: those that torch takes, or 1-D."""
    if not isinstance(theta, Tensor) or not isinstance(size, (tuple, list)) or len(size) not in (3, 4, 5):
        return False
    if any(type(s) is not int or s <= 0 for s in size) or not isinstance(align_corners, bool):
        return False
    dims = len(size) - 2
    return theta.layout == torch.strided and theta.is_floating_point() and theta.shape == (size[0], dims, dims + 1)


def _ordinary_grid(theta: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """The grid as torch computes it, (N, *size, d); a line is the middle row of a picture of height 1."""
    if len(size) > 3:
        return _affine_grid_generator(theta, size, align_corners)
    x, shift = theta.unbind(-1)
    rows = torch.stack([torch.stack([x, 0 * x, shift], -1), torch.zeros_like(theta[:, :, [0, 0, 0]])], -2)
    return _affine_grid_generator(rows.flatten(1, 2), (*size[:2], 1, size[2]), align_corners)[:, 0, :, :1]


@dataclass
class Recipe:
    """What a lazy grid is made of."""

    theta: Tensor
    """A copy, as theta may be edited in place: a few numbers per image. Its graph leads to theta."""
    size: tuple[int, ...]
    """(N, C, *size), as given."""
    align_corners: bool
    dtype: torch.dtype
    """The grid's: under autocast torch computes it in 16 bits."""
    requires_grad: bool
    values: Tensor | None = None
    """The grid, below autograd, once C++ has asked for it."""
    sampled: bool = False
    """Whether a sampler has read theta in the grid's place."""

    def serves(self, align_corners: bool) -> bool:
        """Whether a sampler with this align_corners may read theta in the grid's place."""
        return self.values is None and self.align_corners == align_corners

    def transform(self) -> Affine:
        """What a sampler reads."""
        self.sampled = True
        return Affine(self.theta)

    def ordinary(self) -> Tensor:
        """The grid with its gradient, as the ordinary call would have given it then and there."""
        device = self.theta.device.type
        autocast = self.dtype != self.theta.dtype
        with (
            torch.inference_mode(False),  # which switches gradients on, too
            torch.autocast(device, self.dtype if autocast else None, enabled=autocast),
            temporarily_clear_interpreter_stack(),  # of torch.func: it was made outside and will outlive it
        ):
            grid = _ordinary_grid(self.theta, self.size, self.align_corners)
            return grid.to(self.dtype)  # below a TorchDispatchMode there is no autocast


class LazyGrid(Tensor):
    """An affine grid without storage, until it is touched."""

    recipe: Recipe
    samplers: dict[Callable, Callable] = {}  # noqa: RUF012  a subclass of Tensor takes no ClassVar
    """torch's samplers and what runs in their place on a lazy grid, if it returns an output; filled by `fuse`."""

    @staticmethod
    def of(theta: Tensor, size: tuple[int, ...], align_corners: bool) -> LazyGrid:
        device, dtype = theta.device.type, theta.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        copy = theta.clone()
        recipe = Recipe(copy, size, align_corners, dtype, copy.requires_grad)
        return _Make.apply(copy, recipe) if copy.requires_grad else _wrapper(recipe)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN or torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in cls.samplers:
            output = cls.samplers[func](*args, **kwargs)
            if output is not None:
                return output
        if func in _CONVERSIONS and type(args[0]) is cls and _changes_nothing(func, *args, **kwargs):
            return args[0]
        for grid in tree_iter((args, kwargs)):
            if type(grid) is cls:
                if func in _ASKS_FOR_GRADIENT and grid.recipe.sampled and grid.recipe.requires_grad:
                    warnings.warn(
                        f"This affine grid was sampled without being stored, so {func.__name__} will not see that "
                        f"sample's gradient. Call {func.__name__}, or grid.retain_grad(), before sampling.",
                        stacklevel=3,
                    )
                settle(grid)
        if func in _OF_THE_OBJECT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(cls, ordinary, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, _values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        # Compilers print what they work with, when there are no numbers yet.
        return f"LazyGrid{tuple(self.shape)}" if torch.compiler.is_compiling() else repr(ordinary(self))

    # Given to compiled code, which takes a subclass apart and puts it together, it is its values.

    @property
    def dense(self) -> Tensor:
        return _values(self)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["dense"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
        values = inner["dense"]
        recipe = Recipe(values, (shape[0], 1, *shape[1:-1]), False, values.dtype, values.requires_grad, values)
        return _wrapper(recipe)


def settle(grid: Tensor) -> None:
    """Turn a lazy grid into the ordinary tensor: the same object, from now on of torch's own class."""
    with _lock, torch._C.DisableTorchFunctionSubclass():
        if type(grid) is not LazyGrid or grid.recipe.values is not None:
            return
        values = grid.recipe.ordinary()
        recipe, attributes = grid.recipe, {k: v for k, v in vars(grid).items() if k != "recipe"}
        try:
            torch.utils.swap_tensors(grid, values)
        except RuntimeError:  # a graph or a weak reference holds on to it: it stays what it is, with values
            recipe.values = values.detach()
        else:
            vars(grid).update(attributes)


def ordinary(grid: Tensor) -> Tensor:
    """The tensor after `settle`, or what stands for it: edits and gradients pass through a view."""
    settle(grid)
    if type(grid) is not LazyGrid:
        return grid
    with torch._C.DisableTorchFunctionSubclass():
        return torch.ops.aten.alias(grid)


def _values(grid: LazyGrid) -> Tensor:
    with _lock:
        if grid.recipe.values is None:
            grid.recipe.values = grid.recipe.ordinary().detach()
        return grid.recipe.values


def _wrapper(recipe: Recipe) -> LazyGrid:
    shape = (recipe.size[0], *recipe.size[2:], len(recipe.size) - 2)
    grid = Tensor._make_wrapper_subclass(LazyGrid, shape, dtype=recipe.dtype, device=recipe.theta.device)
    grid.recipe = recipe
    return grid


class _Make(torch.autograd.Function):
    """The lazy grid as a function of theta, for graphs that C++ builds on it."""

    # With setup_context, torch inspects the signature at every call: most of the time it takes.
    @staticmethod
    def forward(ctx: Any, theta: Tensor, recipe: Recipe) -> Tensor:  # type: ignore[override]
        ctx.size, ctx.align_corners, ctx.dtype = recipe.size, recipe.align_corners, theta.dtype
        return _wrapper(recipe)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        generator_backward, size = torch.ops.aten.affine_grid_generator_backward, ctx.size
        if len(size) > 3:
            grad_theta = generator_backward(grad, size, ctx.align_corners)
        else:
            rows = F.pad(grad, (0, 1)).unsqueeze(1)
            grad_theta = generator_backward(rows, (*size[:2], 1, size[2]), ctx.align_corners)[:, :1, ::2]
        return grad_theta.to(ctx.dtype), None


def _changes_nothing(func: Callable, grid: LazyGrid, *args: Any, **kwargs: Any) -> bool:
    """Whether a conversion would return the grid itself: tried on an empty tensor of its kind."""
    if any(isinstance(argument, torch.memory_format) for argument in (*args, *kwargs.values())):
        return False  # an empty tensor is in every format
    empty = torch.empty((0,), dtype=grid.recipe.dtype, device=grid.recipe.theta.device)
    return func(empty, *args, **kwargs) is empty


def _getters(*names: str) -> list[Callable]:
    return [getattr(Tensor, name).__get__ for name in names]


_KNOWN = {
    *_getters("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf"),
    *_getters("is_cuda", "is_sparse", "is_quantized", "is_meta"),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__, Tensor.__hash__, Tensor.get_device),
    *(Tensor.stride, Tensor.is_contiguous, torch.is_floating_point, torch.is_complex, torch.numel),
}
"""What is answered without values."""

_CONVERSIONS = {
    *(Tensor.to, Tensor.type_as, Tensor.contiguous, Tensor.cpu, Tensor.cuda),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
}
"""What returns the tensor itself where there is nothing to convert."""

_ASKS_FOR_GRADIENT = {Tensor.retain_grad, Tensor.register_hook, torch.autograd.grad}

_OF_THE_OBJECT = {
    *(Tensor.retain_grad, Tensor.register_hook, Tensor.requires_grad_),
    *_getters("grad", "grad_fn", "_version"),
}
"""What a view cannot answer for the tensor that it is a view of."""
