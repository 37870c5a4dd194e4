"""Maps of your own: an inverse map as a Triton function, its vjp and a plain-torch twin, made into a transform."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, points
from .checks import check_devices, check_floating
from .transforms import Transform

_LANES = 16
_BUILT_IN = frozenset(points.LINKS)
_CLASSES: dict[str, type[Transform]] = {}
"""Of what is registered, by name."""


def register_transform(
    name: str,
    map: Any,
    map_vjp: Any,
    reference: Callable[..., Sequence[Tensor]],
    parameters: Sequence[str] | Mapping[str, int],
    *,
    dims: int = 2,
    example: Sequence[float] | None = None,
) -> type[Transform]:
    """A transform class for a map of your own, which works wherever the built-in ones do.

    It runs inside the sampler's kernels, by itself or in a `Compose`; on the CPU, and for derivatives beyond the first,
    the twin does the work.

    Args:
        name: letters, digits and underscores; not a built-in kind's. Registering a name again replaces it. It also
            names the class, "log_polar" a LogPolar. Its transforms can be pickled, and read where the name is
            registered or the module that did so can be imported; under that name at the top of it, the class too.
        map: ``map(theta, point) → point``, a ``@triton.jit`` function at the top of a module: theta a tuple of
            scalars, in the order of `parameters`; points a tuple of ``dims`` blocks of lanes, normalised, x first. The
            output's point goes in, the point of the input that is read there comes out.
        map_vjp: ``map_vjp(theta, point, grad) → (grad_theta, grad_point)``, likewise: two tuples of blocks, lane by
            lane; the sum over lanes is taken for you.
        reference: the same map in plain torch, ``reference(theta, point) → point`` on tuples of tensors that
            broadcast, made of operations that autograd can follow.
        parameters: the names of its numbers, each (N,) or (N, K); or a mapping from names to lengths, each
            (N, length) or (N, K, length). The class takes them in this order, or by name.
        dims: 1, 2 or 3.
        example: numbers near which the map makes sense, one for each of theta: where it is checked. Random ones by
            default.

    Raises:
        ValueError: map and reference, or map_vjp and the derivative of reference, differ: the message says in which
            parameter. Checked where the functions can run: on a CUDA device, or in Triton's interpreter.
        TypeError, ValueError: a name or a length that does not fit.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in _BUILT_IN:
        raise ValueError(f"name must be an identifier that no built-in transform has; got {name!r}.")
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3; got {dims!r}.")
    lengths = dict(parameters) if isinstance(parameters, Mapping) else dict.fromkeys(parameters, 0)
    if not lengths or any(not isinstance(n, int) or n < 0 for n in lengths.values()):
        raise ValueError(f"parameters must name one number or more, with lengths of at least 1; got {parameters!r}.")
    for parameter in lengths:
        if not str(parameter).isidentifier() or parameter.startswith("_") or hasattr(_Registered, parameter):
            raise ValueError(
                f"parameters must have names that transforms do not use themselves, without a leading underscore; got "
                f"{parameter!r}. Give it another name."
            )
    for argument, function in (("map", map), ("map_vjp", map_vjp), ("reference", reference)):
        if not callable(function):
            raise TypeError(f"register_transform takes {argument} as a function; got {type(function).__name__}.")
    count = sum(max(1, n) for n in lengths.values())
    labels = [f"{p}[{i}]" if n else p for p, n in lengths.items() for i in range(max(1, n))]
    if example is not None and len(example) != count:
        raise ValueError(f"example must hold {count} numbers, for {', '.join(labels)}; got {len(example)}.")

    kernels = ops.kernels()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted or torch.cuda.is_available():
        _check(name, kernels, (map, map_vjp, reference), labels, dims, example, "cpu" if interpreted else "cuda")
    kernels.stages.LINKS[name] = kernels.stages.Link(map, map_vjp, lambda _: count, table=False)
    kernels.launch.forget()  # the name may have had other functions
    points.LINKS[name] = points.Link(reference, lambda _: count, table=False, linear=False)
    title = "".join(word.capitalize() for word in name.split("_"))
    body = {"kind": name, "dims": dims, "_lengths": lengths, "__doc__": f"{title}({', '.join(lengths)}): registered."}
    body["__module__"] = sys._getframe(1).f_globals.get("__name__", "__main__")  # where pickle looks for the class
    _CLASSES[name] = type(title, (_Registered,), body)
    return _CLASSES[name]


class _Registered(Transform):
    """What `register_transform` returns is a subclass of this."""

    _lengths: dict[str, int]

    def __init__(self, *values: Tensor, **named: Tensor) -> None:
        title, names = type(self).__name__, list(self._lengths)
        given = dict(zip(names, values, strict=False)) | named
        if len(values) > len(names) or len(values) + len(named) != len(given) or set(given) != set(names):
            raise TypeError(f"{title} takes {', '.join(names)}; got {len(values)} tensors and {list(named)}.")
        shapes = set()
        for name, length in self._lengths.items():
            value = check_floating(given[name], title, name)
            batch = value.shape[:-1] if length else value.shape
            if len(batch) not in (1, 2) or (length and value.shape[-1] != length):
                tail = f", {length}" if length else ""
                raise ValueError(f"{title} takes {name} (N{tail or ','}) or (N, K{tail}); got {tuple(value.shape)}.")
            shapes.add(batch)
            object.__setattr__(self, name, value)
        if len(shapes) > 1:
            raise ValueError(f"{title} takes parameters of one batch, (N,) or (N, K); got {sorted(shapes)}.")
        check_devices(title, **given)
        object.__setattr__(self, "batch", shapes.pop())

    batch = torch.Size()

    def __reduce__(self) -> tuple:
        return _restored, (self.kind, type(self).__module__, *[getattr(self, name) for name in self._lengths])

    @property
    def _names(self) -> list[str]:
        return list(self._lengths)

    @property
    def parameters(self) -> Tensor:
        values = [getattr(self, n) if length else getattr(self, n).unsqueeze(-1) for n, length in self._lengths.items()]
        wide = functools.reduce(torch.promote_types, (v.dtype for v in values))
        return torch.cat([v.to(wide) for v in values], -1)


def _restored(kind: str, module: str, *values: Tensor) -> Transform:
    """A transform out of a pickle; in another process its module may not have been imported yet."""
    if kind not in _CLASSES and module != "__main__":
        importlib.import_module(module)
    if kind not in _CLASSES:
        raise pickle.UnpicklingError(
            f"This holds a transform {kind!r}, which {module} registered where it was written. Call "
            f"tri_stn.register_transform({kind!r}, …) before reading it."
        )
    return _CLASSES[kind](*values)


def _check(
    name: str, kernels: Any, functions: tuple, labels: list[str], dims: int, example: Sequence[float] | None,
    device: str,
) -> None:  # fmt: skip
    """Run map and vjp on a few points, and compare with the twin and its derivatives in fp64."""
    map, map_vjp, reference = functions
    random = functools.partial(torch.rand, generator=torch.Generator().manual_seed(0), device="cpu")
    theta = 0.1 + 0.4 * random(len(labels)) if example is None else torch.tensor(example, device="cpu")
    place = 1.8 * random(dims, _LANES) - 0.9
    grad = random(dims, _LANES) + 0.5
    theta = theta.to(torch.float32)
    got = kernels.try_link(map, map_vjp, *(t.to(device) for t in (theta, place, grad))).cpu().double()

    exact = [t.double().expand(_LANES).clone().requires_grad_() for t in theta]  # one for each lane
    point = [a.double().requires_grad_() for a in place]
    expected = list(reference(tuple(t.view(1, 1, -1) for t in exact), tuple(a.view(1, 1, -1) for a in point)))
    if len(expected) != dims:
        raise ValueError(
            f"register_transform({name!r}): reference must return {dims} coordinates; got {len(expected)}."
        )
    expected = [a.expand(1, 1, _LANES).reshape(-1) for a in expected]
    wanted = torch.autograd.grad(expected, [*point, *exact], list(grad.double()), materialize_grads=True)
    axes = ("x", "y", "z")[:dims]
    rows = [f"the map gives {{}} for {a} where the reference gives {{}}" for a in axes]
    slopes = "map_vjp gives {{}} for the gradient of {} where the derivative of the reference is {{}}"
    rows += [slopes.format(f"the point's {a}") for a in axes] + [slopes.format(f"the parameter {n!r}") for n in labels]
    for says, one, two in zip(rows, got, [*(e.detach() for e in expected), *wanted], strict=True):
        wrong = ~((one - two).abs() <= 1e-3 * (1 + two.abs()))  # fp32 on the one side; a wrong formula is further off
        if wrong.any():
            i = int(wrong.nonzero()[0])
            at = f"at the point {place[:, i].tolist()} with {dict(zip(labels, theta.tolist(), strict=True))}"
            raise ValueError(f"register_transform({name!r}): {says.format(one[i].item(), two[i].item())}, {at}.")
