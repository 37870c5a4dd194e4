"""The derivatives of the sampler, for eager code and `torch.func`.

Write F(x, θ) for the warp, linear in the image x, and B(g, x, θ) for its backward pass: the
gradients of ⟨g, F(x, θ)⟩ in x and θ. What each changes by along a direction (v, w) of (x, θ) is

    F'(x, θ; v, w)       the change of the output: forward mode
    B'(g, x, θ; v, w)    the change of both gradients: forward over reverse

and because B is a gradient, these are all that second order takes: the gradients of ⟨B(g, x, θ), (v, w)⟩
are F'(x, θ; v, w) in g and B'(g, x, θ; v, w) in (x, θ). So there are four functions, each computed by
one pass of the same kernels, and each one's derivatives are among the four. Third derivatives are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._functorch.utils import unwrap_dead_wrappers

from . import ops, points, reference

Options = tuple[str, str, str, bool, int]
"""Kind of transform, mode, padding_mode, align_corners, supersample."""
_Optional = Tensor | None


def warp(
    input: Tensor, parameters: Tensor, auxiliary: _Optional, fill: _Optional,
    size: Sequence[int], project: str, *options: Any,
) -> Tensor:  # fmt: skip
    """Input (M, C, *input_size) read through parameters (M, K, …) → (M * K, C, *size)."""
    if torch.compiler.is_exporting():
        return torch.ops.tri_stn.warp(input, parameters, auxiliary, fill, size, project, *options)
    if torch.compiler.is_compiling():
        from . import graph  # noqa: F401
    return _warp(input, parameters, auxiliary, fill, size, project, *options)


def warp_largest(input: Tensor, parameters: Tensor, size: Sequence[int], *options: Any) -> Tensor:
    """A volume's warp, of which only the largest sample along the depth is kept: (M * K, C, *size[1:])."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        from . import graph  # noqa: F401
    return _warp_largest(input, parameters, size, *options)


def warp_with_mask(
    input: Tensor, parameters: Tensor, auxiliary: _Optional, fill: _Optional,
    size: Sequence[int], project: str, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`warp`, and (M * K, 1, *size): the share of each output pixel's weight that lies inside the image."""
    if torch.compiler.is_exporting():
        return torch.ops.tri_stn.warp_with_mask(input, parameters, auxiliary, fill, size, project, *options)
    if torch.compiler.is_compiling():
        from . import graph  # noqa: F401
    return _warp_with_mask(input, parameters, auxiliary, fill, size, project, *options)


def splat(input: Tensor, parameters: Tensor, auxiliary: _Optional, size: Sequence[int], *options: Any) -> Tensor:
    """The adjoint of `warp` in its input: (M * K, C, *input_size) added up to (M, C, *size)."""
    if torch.compiler.is_exporting():
        return torch.ops.tri_stn.splat(input, parameters, auxiliary, size, *options)
    if torch.compiler.is_compiling():
        from . import graph  # noqa: F401
    return _splat(input, parameters, auxiliary, size, *options)


def _warp(
    input: Tensor, parameters: Tensor, auxiliary: _Optional, fill: _Optional,
    size: Sequence[int], project: str, *options: Any,
) -> Tensor:  # fmt: skip
    return _apply(_Warp, *_prepared(input, parameters, auxiliary, fill, size, project, options))


def _warp_with_mask(
    input: Tensor, parameters: Tensor, auxiliary: _Optional, fill: _Optional,
    size: Sequence[int], project: str, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _apply(_WarpWithMask, *_prepared(input, parameters, auxiliary, fill, size, project, options))


def _prepared(
    input: Tensor, parameters: Tensor, auxiliary: _Optional, fill: _Optional,
    size: Sequence[int], project: str, options: tuple,
) -> tuple:  # fmt: skip
    """The same arguments; a chain as a grid where its own derivatives would not do."""
    # Only the sums of a chain's own gradient depend on their order.
    deterministic = ops.is_deterministic() and torch.is_grad_enabled() and _differentiates(parameters, auxiliary)
    transformed = torch._C._are_functorch_transforms_active()
    if transformed and options[-1] != 1:  # a grid has no samples between its places
        transformed = any(i.key() != TransformType.Vmap for i in retrieve_all_functorch_interpreters())
    if _is_chain(options) and (deterministic or transformed):
        parameters, auxiliary, options = _as_grid(parameters, auxiliary, size, input.shape[2:], input.dtype, options)
    return input, parameters, auxiliary, fill, size, project, options


def _warp_largest(input: Tensor, parameters: Tensor, size: Sequence[int], *options: Any) -> Tensor:
    """One pass finds where the largest samples are; a grid of these places reads them, with all derivatives."""
    kind, mode, padding_mode, align_corners, supersample = options
    indices = _apply(_Argmax, input.detach(), parameters.detach(), size, options)
    (images, channels), maps, depth = input.shape[:2], parameters.shape[1], size[0]
    dtype = reference.compute_dtype(input.dtype)
    y, x = (torch.arange(n, device=input.device, dtype=dtype) - (n - 1) / 2 for n in size[1:])
    z = indices.to(dtype).unflatten(0, (images, maps)).flatten(3) - (depth - 1) / 2  # (M, K, C, P)
    u = [x.repeat(size[1]), y.repeat_interleave(size[2]), z]
    grid = reference.matrix_grid(kind, parameters.to(dtype), u, input.shape[2:], size, align_corners)
    grid = grid.transpose(1, 2).flatten(0, 1).unflatten(2, (1, *size[1:]))  # (M * C, K, 1, H, W, 3)
    planes = input.flatten(0, 1).unsqueeze(1)
    call = torch.ops.tri_stn.warp if torch.compiler.is_exporting() else _warp
    output = call(planes, grid, None, None, (1, *size[1:]), "", "grid", mode, padding_mode, align_corners, supersample)
    output = output.view(images, channels, maps, *size[1:])
    return output.transpose(1, 2).flatten(0, 1)


def _splat(input: Tensor, parameters: Tensor, auxiliary: _Optional, size: Sequence[int], *options: Any) -> Tensor:
    layout = size, ops.is_channels_last(input)
    if _is_chain(options) and (
        ops.is_deterministic()
        or torch._C._are_functorch_transforms_active()
        or (_differentiates(parameters, auxiliary) and not points.is_linear(options[0]))
    ):
        parameters, auxiliary, options = _as_grid(parameters, auxiliary, input.shape[2:], size, input.dtype, options)
    return _apply(_Backward, input, None, parameters, auxiliary, None, layout, (True, False, False), options)[0]


ops.library.impl("warp", _warp, "Autograd")
ops.library.impl("warp_with_mask", _warp_with_mask, "Autograd")
ops.library.impl("splat", _splat, "Autograd")


def _is_chain(options: Sequence[Any]) -> bool:
    return options[0] not in reference.TRANSFORMS


def _differentiates(parameters: Tensor, auxiliary: _Optional) -> bool:
    return any(t is not None and t.requires_grad for t in (parameters, auxiliary))


def _as_grid(
    parameters: Tensor, auxiliary: _Optional, size: Sequence[int], input_size: Sequence[int], dtype: torch.dtype,
    options: Sequence[Any],
) -> tuple[Tensor, None, tuple]:  # fmt: skip
    """A chain as a grid that is stored, and differentiated by torch: for `torch.func`, for derivatives that no kernel
    has, and for sums whose order must not matter.
    """
    kind, *rest, align_corners, supersample = options
    if supersample != 1:
        raise NotImplementedError(
            f"Several samples per pixel through {kind!r} have first derivatives only, by .backward() and "
            "torch.autograd.grad, none of them by deterministic algorithms, and of torch.func take vmap alone. Leave "
            "antialias and supersample out elsewhere."
        )
    grid = points.grid(kind, parameters, auxiliary, size, input_size, align_corners, reference.compute_dtype(dtype))
    return grid, None, ("grid", *rest, align_corners, supersample)


def _apply(function: Any, *args: Any) -> Any:
    """``function.apply``, but for the signature that it inspects at every call, and for the node that nobody asks for
    where no derivative can follow, as in most backward passes. Both take as long as a small warp.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    args = unwrap_dead_wrappers(args)
    if not torch.is_grad_enabled() and torch.autograd.forward_ad._current_level < 0:
        return function.forward(*args)
    return super(torch.autograd.Function, function).apply(*args)


def _vmap(function: Any, info: Any, in_dims: Sequence[int | None], *args: Any, per: Sequence[int]) -> tuple:
    """Fold the mapped dimension into the batch. What is not mapped over stays as it is, and serves again.

    ``per`` tells how many entries of each tensor's first dimension belong to one image.
    """
    tensors, mapped = list(args[: len(per)]), [dim is not None for dim in in_dims[: len(per)]]
    for i, dim in enumerate(in_dims[: len(per)]):
        if dim is not None:
            tensors[i] = tensors[i].movedim(dim, 0)
            if not info.batch_size:  # none at all: one of zeros is done, of which none is given back
                tensors[i] = tensors[i].sum(0, keepdim=True)
    batch = max(t.shape[m] // p for t, m, p in zip(tensors, mapped, per, strict=True) if t is not None and p)
    for i, p in enumerate(per):
        if mapped[i]:
            entries = tensors[i].shape[1]
            again = batch * p // entries if entries else 1  # more than 1 only in a vmap of a vmap
            if again > 1:
                tensors[i] = tensors[i].repeat(1, again, *[1] * (tensors[i].dim() - 2))
            tensors[i] = tensors[i].flatten(0, 1)
    results = _apply(function, *tensors, *args[len(per) :])

    def unfold(result: Tensor) -> Tensor:
        return result.unflatten(0, (info.batch_size, -1)) if info.batch_size else result[None][:0]

    if isinstance(results, Tensor):
        return unfold(results), 0
    asked = [r.dim() > 1 for r in results]  # a gradient that nobody asked for is empty
    folded = tuple(unfold(r) if a else r for r, a in zip(results, asked, strict=True))
    return folded, tuple(0 if a else None for a in asked)


class _Warp(torch.autograd.Function):
    """F(x, θ)."""

    @staticmethod
    def forward(
        input: Tensor, parameters: Tensor, auxiliary: _Optional, fill: _Optional,
        size: Sequence[int], project: str, options: Options,
    ) -> Tensor:  # fmt: skip
        tensors = input, parameters, auxiliary, fill, None, None
        return ops.warp_forward(*tensors, size, project, False, *options)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, parameters, auxiliary, fill, ctx.size, ctx.project, ctx.options = inputs
        # The warp is linear in the image: only the transform's gradient has to see it again.
        kept = input if any(ctx.needs_input_grad[1:3]) else None
        ctx.save_for_backward(kept, parameters, auxiliary, fill)
        ctx.save_for_forward(input, parameters, auxiliary, fill)
        ctx.batches = _batches(input, parameters, auxiliary)
        ctx.layout = input.shape[2:], ops.is_channels_last(input)
        ctx.set_materialize_grads(False)  # a tangent that is there but zero would cost a pass

    @staticmethod
    def backward(ctx: Any, grad_output: _Optional) -> tuple:
        if grad_output is None:
            return (None,) * 7
        needs = ctx.needs_input_grad[:3]
        again = _is_chain(ctx.options) and torch.is_grad_enabled() and not points.is_linear(ctx.options[0])
        backward: Callable[..., Any] = _backward_through_grid if again else functools.partial(_apply, _Backward)
        grad_output = _spread(grad_output, ctx.size, ctx.project)
        gradients = backward(grad_output, *ctx.saved_tensors, ctx.layout, needs, ctx.options)
        return *_summed(_wanted(gradients, needs), ctx.batches), None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, input_tangent: _Optional, parameters_tangent: _Optional,
        auxiliary_tangent: _Optional, fill_tangent: _Optional, *_: Any,
    ) -> Any:  # fmt: skip
        if fill_tangent is not None:
            raise ValueError(FILL_IS_CONSTANT)
        input, parameters, auxiliary, fill = ctx.saved_tensors
        options = ctx.options
        if _is_chain(options) and not points.is_linear(options[0]):
            where = ctx.size, input.shape[2:], input.dtype, options
            given = (parameters, parameters_tangent), (auxiliary, auxiliary_tangent)
            moved = [(t, torch.zeros_like(t) if dt is None else dt) for t, dt in given if t is not None]
            parameters, parameters_tangent = _torch_jvp(
                lambda numbers, field=None: _as_grid(numbers, field, *where)[0],
                [t for t, _ in moved],
                [dt for _, dt in moved],
            )
            auxiliary, options = None, ("grid", *options[1:])
        tensors = input, parameters, auxiliary, fill, input_tangent, parameters_tangent
        return _change(*tensors, ctx.size, ctx.project, options)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple:
        _check_shared(in_dims[3])
        return _vmap(_Warp, info, in_dims, *args, per=(1, 1, 1, 0))


def _spread(grad_output: Tensor, size: Sequence[int], project: str) -> Tensor:
    """The gradient of a projection → that of every layer of its depth, the same memory for all."""
    if not project:
        return grad_output
    grad_output = grad_output / size[0] if project == "mean" else grad_output
    return grad_output.unsqueeze(2).expand(-1, -1, size[0], -1, -1)


class _Argmax(torch.autograd.Function):
    """Where along its depth a warped volume is largest, which changes by jumps alone."""

    @staticmethod
    def forward(input: Tensor, parameters: Tensor, size: Sequence[int], options: Options) -> Tensor:
        return torch.ops.tri_stn.warp_argmax(input, parameters, size, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple:
        return None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple:
        return _vmap(_Argmax, info, in_dims, *args, per=(1, 1))


class _WarpWithMask(_Warp):
    """F(x, θ), and the share of its weights that lies inside the image, which counts as a constant."""

    @staticmethod
    def forward(
        input: Tensor, parameters: Tensor, auxiliary: _Optional, fill: _Optional,
        size: Sequence[int], project: str, options: Options,
    ) -> Any:  # fmt: skip
        tensors = input, parameters, auxiliary, fill, None, None
        return ops.warp_forward(*tensors, size, project, True, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _Warp.setup_context(ctx, inputs, output[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_output: _Optional, *_: Any) -> tuple:
        return _Warp.backward(ctx, grad_output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        return _Warp.jvp(ctx, *tangents), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple:
        _check_shared(in_dims[3])
        return _vmap(_WarpWithMask, info, in_dims, *args, per=(1, 1, 1, 0))


def _torch_jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """A function's value and its change along tangents, by two reverse passes: forward mode does not nest."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in primals]
        value = function(*leaves)
        along = torch.zeros_like(value, requires_grad=True)
        backward = torch.autograd.grad(value, leaves, along, create_graph=True, materialize_grads=True)
        (change,) = torch.autograd.grad(backward, along, tangents)
    return value.detach(), change


def _backward_through_grid(
    grad_output: Tensor, input: _Optional, parameters: Tensor, auxiliary: _Optional, fill: _Optional,
    layout: tuple, needs: Sequence[bool], options: Options,
) -> list[_Optional]:  # fmt: skip
    """A chain's backward pass as one that can be differentiated again."""
    grid, _, grid_options = _as_grid(
        parameters, auxiliary, grad_output.shape[2:], layout[0], grad_output.dtype, options
    )
    tensors = grad_output, input, grid, None, fill
    asked = needs[0], any(needs[1:]), False
    grad_input, grad_grid, _ = _apply(_Backward, *tensors, layout, asked, grid_options)
    sources = [t for t, need in zip((parameters, auxiliary), needs[1:], strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(grid, sources, grad_grid, create_graph=True, allow_unused=True) if sources else ())
    return [grad_input, *(next(found) if need else None for need in needs[1:])]


class _Backward(torch.autograd.Function):
    """B(g, x, θ). Of the gradients that `needs` does not ask for, an empty tensor; x may be None without θ's."""

    @staticmethod
    def forward(
        grad_output: Tensor, input: _Optional, parameters: Tensor, auxiliary: _Optional, fill: _Optional,
        layout: tuple, needs: tuple[bool, bool, bool], options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        tensors = grad_output, input, parameters, auxiliary, fill, None, None
        return ops.warp_backward(*tensors, *layout, *needs, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.layout, ctx.needs, ctx.options = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.batches = _batches(*tensors[:3])
        ctx.shapes = [gradient.shape for gradient in output[:2]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, input_tangent: _Optional, parameters_tangent: _Optional, _: _Optional) -> tuple:
        grad_output, input, parameters, auxiliary, fill = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        if not ctx.needs[0]:
            input_tangent = None
        if not ctx.needs[1] or ctx.options[1] == "nearest":
            parameters_tangent = None
        grad_grad = None
        if wants[0] and not (input_tangent is None and parameters_tangent is None):
            size = grad_output.shape[2:]
            tensors = input, parameters, auxiliary, fill, input_tangent, parameters_tangent
            grad_grad = _change(*tensors, size, "", ctx.options)
        tensors = grad_output, input, parameters, fill, input_tangent, parameters_tangent
        gradients = _backward_change(*tensors, ctx.layout, wants[1:], ctx.options)
        return *_summed([grad_grad, *gradients], ctx.batches), None, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, grad_tangent: _Optional, input_tangent: _Optional, parameters_tangent: _Optional, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_output, input, parameters, auxiliary, fill = ctx.saved_tensors
        sums: list[_Optional] = [None, None]
        if grad_tangent is not None:
            moved = grad_tangent, input, parameters, auxiliary, fill
            results = _apply(_Backward, *moved, ctx.layout, ctx.needs, ctx.options)
            sums = _wanted(results[:2], ctx.needs[:2])
        tensors = grad_output, input, parameters, fill, input_tangent, parameters_tangent
        changes = _backward_change(*tensors, ctx.layout, ctx.needs[:2], ctx.options)
        sums = [
            change if s is None else s if change is None else s + change
            for s, change in zip(sums, changes, strict=True)
        ]
        for i, like in enumerate((grad_output, parameters)):
            if sums[i] is None:
                sums[i] = like.new_zeros(ctx.shapes[i])
        return sums[0], sums[1], parameters.new_zeros(0)  # type: ignore[return-value]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple:
        asked = args[6][2]
        if asked:  # one gradient of the field for each entry
            grad_output, input, parameters, field, *rest = args
            args = grad_output, input, parameters, field.expand(info.batch_size, *field.shape), *rest
            in_dims = *in_dims[:3], 0, *in_dims[4:]
        return _vmap(_Backward, info, in_dims, *args, per=(_maps(args[2], in_dims[2]), 1, 1, int(asked), 0))


class _Change(torch.autograd.Function):
    """F'(x, θ; v, w), where v may be None."""

    @staticmethod
    def forward(
        input: Tensor, parameters: Tensor, fill: _Optional, input_tangent: _Optional, parameters_tangent: Tensor,
        size: Sequence[int], project: str, options: Options,
    ) -> Tensor:  # fmt: skip
        tensors = input, parameters, None, fill, input_tangent, parameters_tangent
        return ops.warp_forward(*tensors, size, project, False, *options)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.size, ctx.project, ctx.options = inputs
        ctx.save_for_backward(*tensors)
        ctx.batches = _batches(*tensors)
        ctx.layout = tensors[0].shape[2:], ops.is_channels_last(tensors[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        input, parameters, fill, *tangents = ctx.saved_tensors
        grad_output = _spread(grad_output, ctx.size, ctx.project)
        results: list[_Optional] = [None] * 5
        needs = ctx.needs_input_grad[:2]
        if any(needs):
            tensors = grad_output, input, parameters, fill, *tangents
            gradients = _apply(_BackwardChange, *tensors, ctx.layout, needs, ctx.options)
            results[:2] = _wanted(gradients, needs)
        needs = ctx.needs_input_grad[3:5]
        if any(needs):
            tensors = grad_output, input, parameters, None, fill
            gradients = _apply(_Backward, *tensors, ctx.layout, (*needs, False), ctx.options)
            results[3:] = _wanted(gradients[:2], needs)
        return *_summed(results, ctx.batches), None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise NotImplementedError(
            "Forward mode over forward mode is not implemented in tri_stn; take forward over reverse, as "
            "torch.func.hessian does, or reverse over forward."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple:
        return _vmap(_Change, info, in_dims, *args, per=(1, 1, 0, 1, 1))


class _BackwardChange(torch.autograd.Function):
    """B'(g, x, θ; v, w), where v may be None."""

    @staticmethod
    def forward(
        grad_output: Tensor, input: _Optional, parameters: Tensor, fill: _Optional,
        input_tangent: _Optional, parameters_tangent: Tensor,
        layout: tuple, needs: tuple[bool, bool], options: Options,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tensors = grad_output, input, parameters, None, fill, input_tangent, parameters_tangent
        return ops.warp_backward(*tensors, *layout, *needs, False, *options)[:2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple:
        raise NotImplementedError("Third derivatives are not implemented in tri_stn.")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple:
        raise NotImplementedError("Third derivatives are not implemented in tri_stn.")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple:
        return _vmap(_BackwardChange, info, in_dims, *args, per=(_maps(args[2], in_dims[2]), 1, 1, 0, 1, 1))


def _wanted(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[_Optional]:
    """The gradients that were asked for, None for the others."""
    return [g if need else None for g, need in zip(gradients, needed, strict=True)]


def _batches(*tensors: _Optional) -> list[int | None]:
    return [None if t is None else t.shape[0] for t in tensors]


def _summed(gradients: Sequence[_Optional], batches: Sequence[int | None]) -> list[_Optional]:
    """Gradients that have an entry for each image → those of tensors with these batches, which serve over and over."""
    return [
        g if g is None or b is None or g.shape[0] == b else g.unflatten(0, (-1, b)).sum(0)
        for g, b in zip(gradients, batches, strict=True)
    ]


def _change(
    input: _Optional, parameters: Tensor, auxiliary: _Optional, fill: _Optional,
    input_tangent: _Optional, parameters_tangent: _Optional,
    size: Sequence[int], project: str, options: Options,
) -> Tensor:  # fmt: skip
    """F' with either tangent; nearest changes with the input alone."""
    if parameters_tangent is not None and options[1] != "nearest":
        tensors = input, parameters, fill, input_tangent, parameters_tangent
        return _apply(_Change, *tensors, size, project, options)
    if input_tangent is not None:
        return _apply(_Warp, input_tangent, parameters, auxiliary, None, size, project, options)
    assert input is not None
    size = size[1:] if project else size
    batch = max(input.shape[0], parameters.shape[0])
    return input.new_zeros((batch * parameters.shape[1], input.shape[1], *size))


def _backward_change(
    grad_output: Tensor, input: _Optional, parameters: Tensor, fill: _Optional,
    input_tangent: _Optional, parameters_tangent: _Optional,
    layout: tuple, needs: Sequence[bool], options: Options,
) -> list[_Optional]:  # fmt: skip
    """B' with either tangent, None for what is not asked for or does not change."""
    if parameters_tangent is not None and options[1] != "nearest" and any(needs):
        tensors = grad_output, input, parameters, fill, input_tangent, parameters_tangent
        return _wanted(_apply(_BackwardChange, *tensors, layout, needs, options), needs)
    if input_tangent is not None and needs[1]:  # θ's gradient is linear in the image
        needs = (False, True)
        moved = grad_output, input_tangent, parameters, None, None
        return _wanted(_apply(_Backward, *moved, layout, (*needs, False), options)[:2], needs)
    return [None, None]


FILL_IS_CONSTANT = "warp takes no derivative with respect to fill. Detach it, for example with fill.detach()."


def _check_shared(fill_dim: int | None) -> None:
    if fill_dim is not None:
        raise ValueError(
            "torch.vmap cannot map over fill, which is one value per channel for all images. Take fill from outside "
            "of the mapped function, or warp ones for a mask and fill afterwards."
        )


def _maps(parameters: Tensor, dim: int | None) -> int:
    """K of parameters (M, K, …), whether or not a mapped dimension is among them."""
    return parameters.shape[1] if dim is None else parameters.movedim(dim, 0).shape[2]
