"""Unmodified code, fused: the grid that is never made, and everything that makes an ordinary one of it."""

import copy
import inspect
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import affine_grid as early_affine_grid
from torch.nn.functional import grid_sample as early_grid_sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tri_stn
from tri_stn.lazy import LazyGrid

FUSED = {"tri_stn::warp_forward"}
PATCHED = ("affine_grid_generator", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d")


@pytest.fixture(autouse=True)
def reference_unless_asked_otherwise(request, monkeypatch):
    """The quick road, except in the tests for both."""
    if "backend" not in request.fixturenames:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


class Calls(TorchDispatchMode):
    """The samplers and grid makers among the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "grid" in func._schema.name or "warp" in func._schema.name:
            self.names.add(func._schema.name)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.add(tuple(result.shape))
        return result


def inputs(dims=2, dtype=torch.float64, requires_grad=True):
    """Image, theta, and the size of an output with other numbers than the image."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, *(3, 5, 6)[-dims:], generator=generator, dtype=torch.float64)
    theta = torch.eye(dims, dims + 1) + 0.2 * torch.randn(2, dims, dims + 1, generator=generator, dtype=torch.float64)
    image, theta = (x.to(dtype).requires_grad_(requires_grad) for x in (image, theta))
    return image, theta, (2, 3, *(2, 7, 4)[-dims:])


def with_gradients(function, *tensors):
    """What a function returns, and the gradients of it, weighted."""
    results = function(*tensors)
    results = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]
    differentiable = [r for r in results if r.requires_grad]
    generator = torch.Generator().manual_seed(1)
    loss = sum((r * torch.rand(r.shape, generator=generator, dtype=r.dtype).to(r.device)).sum() for r in differentiable)
    for tensor in tensors:
        tensor.grad = None
    if differentiable:
        loss.backward()
    return *results, *(t.grad for t in tensors)


def assert_same(actual, expected, **tolerance):
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        assert type(got) is type(want) and (got is None or got.requires_grad == want.requires_grad)
        if got is not None:
            torch.testing.assert_close(got, want, **tolerance)


def stn(image, theta, size=(2, 3, 7, 4), align_corners=False, **options):
    """The two calls, as everybody writes them."""
    grid = F.affine_grid(theta, size, align_corners=align_corners)
    return F.grid_sample(image, grid, align_corners=align_corners, **options)


class Holder:
    """Keeps torch's functions where no search would find them."""

    affine_grid, grid_sample = staticmethod(F.affine_grid), staticmethod(F.grid_sample)


ROADS = {
    "functional": stn,
    "functional, positional": lambda x, t, s: F.grid_sample(x, F.affine_grid(t, s, False), "bilinear", "zeros", False),
    "names imported earlier": lambda x, t, s: early_grid_sample(
        x, early_affine_grid(t, s, align_corners=False), align_corners=False
    ),
    "held in a class": lambda x, t, s: Holder.grid_sample(x, Holder.affine_grid(t, s, False), align_corners=False),
    "torch": lambda x, t, s: torch.grid_sampler(x, torch.affine_grid_generator(t, s, False), 0, 0, False),
    "torch, by dimension": lambda x, t, s: getattr(torch, f"grid_sampler_{len(s) - 2}d")(
        x, torch.affine_grid_generator(theta=t, size=s, align_corners=False), 0, 0, False
    ),
    "after a conversion that changes nothing": lambda x, t, s: F.grid_sample(
        x, F.affine_grid(t, s, False).to(x.device).type_as(x).contiguous(), align_corners=False
    ),
}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("road", ROADS)
def test_the_two_calls_become_one_operator_that_keeps_no_grid(road, dims):
    image, theta, size = inputs(dims)
    expected = with_gradients(lambda x, t: ROADS[road](x, t, size), image, theta)
    saved = set()
    with (
        tri_stn.fuse(),
        Calls() as calls,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(tuple(t.shape)) or t, lambda t: t),
    ):
        output = ROADS[road](image, theta, size)
    assert calls.names == FUSED
    grid_shape = (2, *size[2:], dims)
    assert grid_shape not in saved and grid_shape not in calls.sizes
    assert saved, "something is kept for the backward pass: the hook works"
    with Calls() as backward_calls:
        actual = with_gradients(lambda x, t: output, image, theta)
    assert backward_calls.names == {"tri_stn::warp_backward"}
    assert_same(actual, expected)


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_options_arrive(mode, padding_mode, align_corners):
    image, theta, size = inputs()
    options = {"mode": mode, "padding_mode": padding_mode}
    expected = with_gradients(lambda x, t: stn(x, t, size, align_corners, **options), image, theta)
    with tri_stn.fuse(), Calls() as calls:
        actual = with_gradients(lambda x, t: stn(x, t, size, align_corners, **options), image, theta)
    assert calls.names >= FUSED
    assert_same(actual, expected)


# --- what makes an ordinary tensor of a lazy grid ----------------------------------------------------


class Square(torch.autograd.Function):
    """Takes its argument to C++ before anybody can look at its class."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def saved_and_loaded(grid):
    file = io.BytesIO()
    torch.save(grid, file)
    file.seek(0)
    return torch.load(file)


def held_weakly(grid):
    reference = weakref.ref(grid)
    grid[..., 0].mul_(3)
    return reference() * 2


def squared_then_edited(grid):
    square = Square.apply(grid)
    with torch.no_grad():
        return square.detach() + grid.add_(1)


def in_inference_mode(run):
    with torch.inference_mode():
        return run().clone()


def in_no_grad(run):
    with torch.no_grad():
        return run()


def hooked(grid):
    if grid.requires_grad:
        grid.register_hook(lambda grad: grad * 3)


TOUCHES = {
    "indexed": lambda g: g[..., 0] * 2,
    "arithmetic": lambda g: 1 - g / 2,
    "edited": lambda g: g.mul_(2),
    "edited by an operator": lambda g: g.__iadd__(1),
    "edited by an index": lambda g: g.__setitem__((..., 0), 0.5),
    "edited through a view": lambda g: g[..., 0].mul_(3),
    "edited through data": lambda g: g.data.mul_(2),
    "edited through detach": lambda g: g.detach()[..., 1].mul_(0.5) * 1,
    "edited, held weakly": held_weakly,
    "written to as out=": lambda g: None if g.requires_grad else torch.add(g.clone(), 1, out=g),
    "converted": lambda g: g.to(torch.float32),
    "cat": lambda g: torch.cat([g, g]),
    "stack in a list": lambda g: torch.stack([g, 2 * g]),
    "iterated": lambda g: torch.stack([x * x for x in g]),
    "permuted and interpolated": lambda g: F.interpolate(g.permute(0, 3, 1, 2), scale_factor=2),
    "added to a flow": lambda g: g + torch.linspace(-0.1, 0.1, 112, dtype=g.dtype).view(2, 7, 4, 2),
    "cloned": lambda g: g.clone(),
    "detached": lambda g: g.detach(),
    "numpy": lambda g: torch.from_numpy(np.array(g.detach().numpy())),
    "numpy by itself": lambda g: torch.from_numpy(np.asarray(g.detach()) * 2),
    "list": lambda g: torch.tensor(g.tolist()),
    "address": lambda g: torch.tensor(g.data_ptr() != 0),
    "saved": saved_and_loaded,
    "pickled": lambda g: pickle.loads(pickle.dumps(g)),
    "copied": lambda g: copy.copy(g),
    "copied deeply": lambda g: copy.deepcopy(g.detach()),
    "laid out otherwise": lambda g: torch.tensor(g.contiguous(memory_format=torch.channels_last).stride()),
    "read in no_grad": lambda g: in_no_grad(lambda: g * 2),
    "read in inference mode": lambda g: in_inference_mode(lambda: g.sum()).clone(),
    "converted to its own kind": lambda g: g.type_as(g) * 2,
    "custom function": Square.apply,
    "custom function, then edited": squared_then_edited,
    "custom function, then indexed": lambda g: Square.apply(g) + g[..., :1],
    "custom function, then a pointer": lambda g: Square.apply(g) * (g.data_ptr() != 0),
    "checkpointed": lambda g: checkpoint(lambda x: x.sin() * x, g, use_reentrant=False),
    "checkpointed, reentrant": lambda g: checkpoint(lambda x: x.sin() * x, g, use_reentrant=True),
    "vmap": lambda g: torch.vmap(lambda x: x.sin() * x)(g),
    "vmap around it": lambda g: torch.vmap(lambda x: (x * g).sum())(torch.arange(3.0, dtype=g.dtype)),
    "hooked": hooked,
    "asked for its gradient": lambda g: None if g.requires_grad_() is g else g,
}


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_touched_grid_is_the_ordinary_one(touch, requires_grad):
    """What the touch returns, what the grid is worth afterwards, and the gradients through both."""

    def touch_and_sample(image, theta):
        grid = F.affine_grid(theta, size, align_corners=False)
        touched = TOUCHES[touch](grid)
        return touched, F.grid_sample(image, grid, align_corners=False), 2 * grid

    image, theta, size = inputs(requires_grad=requires_grad)
    expected = with_gradients(touch_and_sample, image, theta)
    with tri_stn.fuse():
        actual = with_gradients(touch_and_sample, image, theta)
    assert_same(actual, expected)


@pytest.mark.parametrize(
    "look",
    [
        lambda g: isinstance(g, torch.Tensor) and torch.is_tensor(g),
        lambda g: g.shape == g.size() == (2, 7, 4, 2) and g.size(1) == 7 and len(g) == 2,
        lambda g: g.dim() == g.ndim == 4 and g.numel() == 112 and g.dtype == torch.float64 and g.is_floating_point(),
        lambda g: g.device.type == "cpu" and not g.is_cuda and g.layout == torch.strided,
        lambda g: g.requires_grad and not g.is_leaf and g.is_contiguous() and g.stride(0) == 56,
        lambda g: (
            g.to("cpu") is g and g.double() is g and g.contiguous() is g and g.type_as(torch.eye(2).double()) is g
        ),
        lambda g: {g: "a key"}[g] == "a key",
    ],
)
def test_what_is_known_without_values_makes_none(look):
    _, theta, size = inputs()
    with Calls() as calls:
        grid = tri_stn.affine_grid(theta, size, align_corners=False)
        assert look(grid)
    assert not calls.names and type(grid) is LazyGrid


def test_a_touched_grid_is_of_torchs_own_class_and_keeps_its_attributes():
    _, theta, size = inputs()
    grid = tri_stn.affine_grid(theta, size, align_corners=False)
    alias, grid.note = grid, "mine"
    assert type(grid) is LazyGrid and str(grid).startswith("tensor(")
    assert type(alias) is torch.Tensor and alias.note == "mine"
    assert type(alias.grad_fn).__name__ == "AffineGridGeneratorBackward0"


@pytest.mark.parametrize("edit", [lambda t: t.mul_(2), lambda t: t.data.mul_(2)])
@pytest.mark.parametrize("sampled", [True, False])
def test_theta_may_be_edited_after_the_call(edit, sampled):
    """As torch: the grid has the values of before, and its gradient does not need theta."""

    def run(image, theta):
        theta = theta * 1
        grid = F.affine_grid(theta, size, align_corners=False)
        result = F.grid_sample(image, grid, align_corners=False) if sampled else None
        edit(theta)
        return result, grid * 1 if not sampled else F.grid_sample(image, grid, align_corners=False)

    image, theta, size = inputs()
    expected = with_gradients(run, image, theta)
    with tri_stn.fuse():
        assert_same(with_gradients(run, image, theta), expected)


@pytest.mark.parametrize("touch", [lambda g: None, lambda g: g.data])
def test_a_grid_made_without_gradient_has_none(touch):
    def run(image, theta):
        with torch.no_grad():
            grid = F.affine_grid(theta, size, align_corners=False)
        touch(grid)
        return F.grid_sample(image, grid, align_corners=False)

    image, theta, size = inputs()
    expected = with_gradients(run, image, theta)
    assert expected[2] is None
    with tri_stn.fuse():
        assert_same(with_gradients(run, image, theta), expected)


def test_the_grids_own_gradient_is_there_if_asked_for_in_time():
    image, theta, size = inputs()

    def run(image, theta, early):
        grid = F.affine_grid(theta, size, align_corners=False)
        if early:
            grid.retain_grad()
        F.grid_sample(image, grid, align_corners=False).sum().backward(retain_graph=True)
        if not early:
            with pytest.warns(UserWarning, match="retain_grad will not see that sample's gradient") as record:
                grid.retain_grad()
            assert record[0].filename == __file__
        return grid.grad

    expected = run(image, theta, early=True)
    with tri_stn.fuse():
        torch.testing.assert_close(run(image, theta, early=True), expected)
        assert run(image, theta, early=False) is None


@pytest.mark.parametrize("threads", [8])
def test_threads_that_touch_one_grid_find_one_tensor(threads):
    """The first to touch it makes the values; an edit by another must not be lost to a second copy."""
    _, theta, size = inputs()
    for _ in range(20):
        grid, start = tri_stn.affine_grid(theta, size, align_corners=False), threading.Barrier(threads)
        pointers = []

        def touch(grid=grid, start=start, pointers=pointers):
            start.wait()
            pointers.append(grid.data_ptr())

        workers = [threading.Thread(target=touch) for _ in range(threads)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
        assert len(pointers) == threads and len(set(pointers)) == 1


# --- surroundings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sample_inside", [True, False])
def test_autocast_keeps_dtypes_and_betters_coordinates(image_dtype, sample_inside):
    """The dtypes are those of the ordinary calls, the coordinates fp32."""
    width = 200
    image = torch.linspace(-1, 1, width).expand(1, 1, 1, width).to(image_dtype)
    theta = torch.tensor([[[0.9, 0, 0], [0, 1, 0]]])

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            grid = F.affine_grid(theta, image.shape, align_corners=False)
            if sample_inside:
                return grid.dtype, F.grid_sample(image, grid, padding_mode="border", align_corners=False)
        if image.dtype != grid.dtype:
            with pytest.raises(RuntimeError):  # torch refuses two dtypes
                F.grid_sample(image, grid, align_corners=False)
            return grid.dtype, grid * 1
        return grid.dtype, F.grid_sample(image, grid, padding_mode="border", align_corners=False)

    grid_dtype, expected = run()
    with tri_stn.fuse(), Calls() as calls:
        fused_dtype, actual = run()
    assert fused_dtype == grid_dtype == torch.bfloat16
    assert actual.dtype == expected.dtype
    if sample_inside or image_dtype == torch.bfloat16:
        assert calls.names == FUSED
    if sample_inside and image_dtype == torch.float32:
        error, torchs_error = ((output - 0.9 * image).abs().max() for output in (actual, expected))
        assert error < 1e-5 < 1e-3 < torchs_error, "half a pixel"


@pytest.mark.parametrize("touch", [lambda g: g * 1, Square.apply], ids=["python", "c++"])
def test_a_grid_touched_under_autocast_has_16_bits(touch):
    def run(theta):
        with torch.autocast("cpu", torch.bfloat16):
            return touch(F.affine_grid(theta, size, align_corners=False))

    _, theta, size = inputs(dtype=torch.float32)
    expected = with_gradients(run, theta)
    assert expected[0].dtype == torch.bfloat16
    with tri_stn.fuse():
        assert_same(with_gradients(run, theta), expected, rtol=0.05, atol=0.02)  # a few roundings of 2 ** -8


def in_a_device_context(run):
    with torch.device("cpu"):  # a TorchFunctionMode: every call goes through Python
        return run()


@pytest.mark.parametrize("surrounding", [in_inference_mode, in_a_device_context, in_no_grad])
def test_modes_of_torch(surrounding):
    image, theta, size = inputs()
    expected = surrounding(lambda: stn(image, theta, size))
    with tri_stn.fuse(), Calls() as calls:
        actual = surrounding(lambda: stn(image, theta, size))
    assert calls.names == FUSED
    assert_same([actual], [expected])


def batched(image, theta):
    return torch.vmap(lambda x, t: stn(x[None], t[None], (1, 3, 7, 4))[0])(image, theta)


def differentiated(image, theta):
    return torch.func.grad(lambda t: stn(image.detach(), t).square().sum())(theta.detach())


def around_a_grid(image, theta):
    grid = F.affine_grid(theta, (2, 3, 7, 4), align_corners=False)
    grad = torch.func.grad(lambda x: F.grid_sample(x, grid, align_corners=False).square().sum())(image.detach())
    return grad.detach(), 2 * grid, torch.tensor(grid.requires_grad)  # nothing of a transform that is over


def with_dual_numbers(image, theta):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(theta.detach(), theta.detach() + 1)
        grid = F.affine_grid(dual, (2, 3, 7, 4), align_corners=False)
        return torch.autograd.forward_ad.unpack_dual(2 * grid).tangent


def traced(image, theta):
    return torch.jit.trace(stn, (image.detach(), theta.detach()))(image, theta)


def scripted(image, theta):
    def plain(image: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        return F.grid_sample(image, F.affine_grid(theta, [2, 3, 7, 4], False), align_corners=False)

    return torch.jit.script(plain)(image, theta)


def exported(image, theta):
    class Model(nn.Module):
        def forward(self, image, theta):
            return stn(image, theta)

    return torch.export.export(Model(), (image.detach(), theta.detach())).module()(image, theta)


@pytest.mark.parametrize(
    "transform", [batched, differentiated, around_a_grid, with_dual_numbers, traced, scripted, exported]
)
@pytest.mark.filterwarnings("ignore")  # the JIT is deprecated, and vmap finds these calls slow
def test_what_transforms_or_traces_code_gets_torchs_own_operators(transform):
    image, theta, _ = inputs()
    with tri_stn.fuse():  # first, as the JIT remembers what it made of torch's functions
        actual = with_gradients(transform, image, theta)
    assert_same(actual, with_gradients(transform, image, theta))


class Subclass(torch.Tensor):
    pass


OTHERS = {
    "a subclass": lambda x, t: stn(x.as_subclass(Subclass), t),
    "theta of a subclass": lambda x, t: stn(x, t.as_subclass(Subclass)),
    "no storage": lambda x, t: stn(x.to("meta"), t.to("meta")),
    "a grid of its own": lambda x, t: F.grid_sample(x, x[:, :2].movedim(1, -1) * 2 - 1, align_corners=True),
    "the other align_corners": lambda x, t: F.grid_sample(
        x, F.affine_grid(t, (2, 3, 7, 4), align_corners=True), align_corners=False
    ),
    "no channels": lambda x, t: stn(x[:, :0], t),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_ours_goes_to_torch(case):
    image, theta, _ = inputs()
    image, theta = image.detach(), theta.detach()
    expected = OTHERS[case](image, theta)
    with tri_stn.fuse(), Calls() as calls:
        actual = OTHERS[case](image, theta)
    assert not FUSED & calls.names
    assert_same([actual.to("cpu") if actual.is_meta else actual], [expected]) if not actual.is_meta else None
    assert (actual.shape, actual.device) == (expected.shape, expected.device)


BAD = {
    "a line": lambda x, t: F.affine_grid(t[:, :1, :2], (2, 3, 5), align_corners=False),
    "integers": lambda x, t: F.affine_grid(t.long(), x.shape, align_corners=False),
    "another batch": lambda x, t: F.affine_grid(t, (3, 3, 5, 6), align_corners=False),
    "theta of 3-D": lambda x, t: F.affine_grid(t, (2, 3, 4, 5, 6), align_corners=False),
    "no pixels": lambda x, t: F.affine_grid(t, (2, 3, 0, 6), align_corners=False),
    "no tensor": lambda x, t: F.affine_grid(None, x.shape, align_corners=False),
    "mode": lambda x, t: stn(x, t, mode="cubic"),
    "padding_mode": lambda x, t: stn(x, t, padding_mode="wrap"),
    "dtypes": lambda x, t: stn(x.float(), t),
    "one image": lambda x, t: stn(x[:1], t),
    "an unbatched image": lambda x, t: stn(x[0], t),
    "an empty image": lambda x, t: stn(x[:, :, :0], t),
    "no image": lambda x, t: stn(None, t),
    "no grid": lambda x, t: F.grid_sample(x, None, align_corners=False),
    "3-D bicubic": lambda x, t: stn(x[:, :, None], F.pad(t, (1, 0, 1, 0)), (2, 3, 2, 7, 4), mode="bicubic"),
    "the sampler of 3-D": lambda x, t: torch.grid_sampler_3d(x, F.affine_grid(t, x.shape, False), 0, 0, False),
}


@pytest.mark.parametrize("case", BAD)
def test_what_torch_refuses_is_refused_in_its_words(case):
    image, theta, _ = inputs()
    with pytest.raises(Exception) as expected:
        BAD[case](image, theta)
    with tri_stn.fuse(), pytest.raises(expected.type) as actual:
        BAD[case](image, theta)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("height, align_corners", [(5, None), (1, True)])
def test_warnings_are_torchs_and_point_at_the_caller(height, align_corners):
    image, theta, _ = inputs()

    def heard():
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            output = F.grid_sample(image, F.affine_grid(theta, (2, 3, height, 4), align_corners))
        return output, [(str(w.message), w.category, w.filename, w.lineno) for w in record]

    expected, expected_warnings = heard()
    with tri_stn.fuse():
        actual, actual_warnings = heard()
    assert actual_warnings == expected_warnings != []
    assert_same([actual], [expected])


# --- the context -------------------------------------------------------------------------------------


def patched():
    return [getattr(torch, name) is not getattr(torch._C._VariableFunctions, name) for name in PATCHED]


def test_nothing_is_patched_before_and_all_is_restored_after():
    tag = torch.compiler.config.cache_key_tag
    assert patched() == [False] * 4
    with tri_stn.fuse() as context:
        assert patched() == [True] * 4
        assert torch.compiler.config.cache_key_tag != tag, "or torch would mix up compiled graphs in its cache"
        with context, tri_stn.fuse():
            pass
        assert patched() == [True] * 4
    assert patched() == [False] * 4 and torch.compiler.config.cache_key_tag == tag
    with pytest.raises(KeyError), tri_stn.fuse():
        raise KeyError
    assert patched() == [False] * 4
    with pytest.raises(RuntimeError, match="left more often than it was entered"):
        context.__exit__()


def test_decorator_may_call_itself():
    @tri_stn.fuse()
    def depth(n):
        assert patched() == [True] * 4
        return n and 1 + depth(n - 1)

    assert depth(3) == 3 and depth.__name__ == "depth"
    assert patched() == [False] * 4


def test_other_peoples_patches_are_respected(monkeypatch):
    """One below is called, one on top stays, and what they kept of ours only passes on."""
    original, called = torch.grid_sampler, []
    monkeypatch.setattr(torch, "grid_sampler", lambda *args: called.append("below") or original(*args))
    below = torch.grid_sampler
    image, theta, size = inputs()
    with tri_stn.fuse():
        F.grid_sample(image, torch.zeros(2, 7, 4, 2, dtype=image.dtype), align_corners=False)
        assert called == ["below"]
        ours = torch.grid_sampler
        torch.grid_sampler = above = lambda *args: ours(*args)
    assert torch.grid_sampler is above
    with Calls() as calls:
        stn(image, theta, size)
    assert called == ["below"] * 2 and not FUSED & calls.names
    torch.grid_sampler = below


def test_it_holds_for_threads_that_run_replicas():
    """DataParallel runs each replica in a thread of its own."""
    image, theta, size = inputs()
    expected, names, start = stn(image, theta, size), [], threading.Barrier(4)

    def replica():
        start.wait()
        with Calls() as calls:
            torch.testing.assert_close(stn(image, theta, size), expected)
        names.append(calls.names)

    with tri_stn.fuse():
        workers = [threading.Thread(target=replica) for _ in range(4)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
    assert names == [FUSED] * 4


def test_distributed_replicas(tmp_path):
    """A lazy grid that a model returns goes to a function of DDP's own, in C++."""
    code = """
import os, sys, torch, tri_stn
import torch.nn.functional as F

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.eye(2, 3).repeat(2, 1, 1) * 0.7)

    def forward(self, image):
        grid = F.affine_grid(self.theta, (2, 3, 7, 4), align_corners=False)
        return F.grid_sample(image, grid, align_corners=False), F.affine_grid(self.theta, (2, 3, 7, 4), False)

torch.manual_seed(0)
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
model, image = torch.nn.parallel.DistributedDataParallel(Model()), torch.rand(2, 3, 5, 6)

def step():
    model.zero_grad()
    output, grid = model(image)
    (output.square().sum() + grid.exp().sum()).backward()
    return output, grid * 1, model.module.theta.grad

expected = step()
with tri_stn.fuse():
    for got, want in zip(step(), expected):
        torch.testing.assert_close(got, want)
print("same", flush=True)
os._exit(0)  # taking a process group down may wait for ever
"""
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "same\n", result.stderr


# --- torch.compile -----------------------------------------------------------------------------------


def sampled_by_early_names(image, theta):
    return early_grid_sample(image, early_affine_grid(theta, (2, 3, 7, 4), align_corners=False), align_corners=False)


def sampled_by_torch(image, theta):
    return torch.grid_sampler(image, torch.affine_grid_generator(theta, (2, 3, 7, 4), False), 0, 0, False)


def edited_through_a_view(image, theta):
    grid = F.affine_grid(theta, (2, 3, 7, 4), align_corners=False)
    grid[..., 0].mul_(0.5)
    return F.grid_sample(image, grid, align_corners=False)


def edited_through_data(image, theta):
    grid = F.affine_grid(theta, (2, 3, 7, 4), align_corners=False)
    grid.data.mul_(0.5)
    return F.grid_sample(image, grid, align_corners=False)


def edited_after_sampling(image, theta):
    grid = F.affine_grid(theta.detach(), (2, 3, 7, 4), align_corners=False)
    before = F.grid_sample(image.detach(), grid, align_corners=False)
    grid += 0.5
    return before, F.grid_sample(image, grid, align_corners=False)


def theta_edited(image, theta):
    theta = theta * 1
    grid = F.affine_grid(theta, (2, 3, 7, 4), align_corners=False)
    theta.mul_(2)
    return F.grid_sample(image, grid, align_corners=False)


def grid_returned(image, theta):
    grid = F.affine_grid(theta, (2, 3, 7, 4), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False), grid


def other_align_corners(image, theta):
    return F.grid_sample(image, F.affine_grid(theta, (2, 3, 7, 4), align_corners=True), align_corners=False)


def made_without_gradient(image, theta):
    with torch.no_grad():
        grid = F.affine_grid(theta, (2, 3, 7, 4), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)


def entered_inside(image, theta):
    with tri_stn.fuse():
        return stn(image, theta)


def our_own_functions(image, theta):
    return tri_stn.grid_sample(image, tri_stn.affine_grid(theta, (2, 3, 7, 4), False), align_corners=False)


def compiled(function, dynamic=None):
    """Compiled into one graph, and the operators of its forward, in a list that fills when it runs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    operators = []

    def keep(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic), operators


@pytest.mark.parametrize(
    "function, fuses",
    [
        (stn, True),
        (sampled_by_early_names, True),
        (sampled_by_torch, True),
        (theta_edited, True),
        (edited_through_a_view, False),
        (edited_through_data, False),
        (edited_after_sampling, None),  # the first of the two
        (grid_returned, None),  # sampled fused, and made for the caller
        (other_align_corners, False),
        (made_without_gradient, True),
    ],
)
def test_compiled_code_drops_the_grid_unless_it_is_needed(function, fuses):
    image, theta, _ = inputs()
    expected = with_gradients(function, image, theta)
    with tri_stn.fuse():
        run, operators = compiled(function)
        assert_same(with_gradients(run, image, theta), expected)
    assert any("warp" in name for name in operators) == (fuses is not False)
    assert any("affine_grid" in name or "bmm" in name for name in operators) == (fuses is not True)


@pytest.mark.parametrize("function", [entered_inside, our_own_functions])
def test_compiled_code_that_names_tri_stn_is_one_graph(function):
    image, theta, _ = inputs()
    expected = with_gradients(stn, image, theta)
    run, _ = compiled(function)
    assert_same(with_gradients(run, image, theta), expected)
    assert patched() == [False] * 4


def test_compiled_for_any_size_and_autocast():
    theta = inputs(dtype=torch.float32)[1]

    def function(image, theta):
        with torch.autocast("cpu", torch.bfloat16):
            # A size that changes would be a constant of the graph: torch's affine_grid compares it with 1.
            return F.grid_sample(image, F.affine_grid(theta, (2, 3, 7, 4), False), align_corners=False)

    with tri_stn.fuse():
        run, operators = compiled(function, dynamic=True)
        for height in (5, 7, 9):
            image = torch.rand(2, 3, height, 6, requires_grad=True)
            # Half a pixel of a bf16 grid would show.
            assert_same(with_gradients(run, image, theta), with_gradients(function, image, theta), rtol=1e-5, atol=1e-5)
    assert sum("warp" in name for name in operators) == 1, "fused, and compiled once"


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        lambda g, x: F.grid_sample(x, g, align_corners=False),
        lambda g, x: g * 2 + x.sum(),
        lambda g, x: g.mul_(2) + x.sum(),
        lambda g, x: g[..., 0].mul_(2) + x.sum(),
    ],
)
def test_a_lazy_grid_may_enter_compiled_code(function, requires_grad):
    """Made in eager code, it arrives with values and edits come back."""

    def run(image, theta):
        grid = F.affine_grid(theta, (2, 3, 7, 4), align_corners=False)
        return inner(grid, image), grid * 1

    image, theta, _ = inputs(requires_grad=requires_grad)
    inner = function
    expected = with_gradients(run, image, theta)
    inner, _ = compiled(function)
    with tri_stn.fuse():
        assert_same(with_gradients(run, image, theta), expected)


def test_compiling_for_the_first_time_inside_and_again_outside():
    """Dynamo makes a table of torch's functions when it is first used: it must not keep ours."""
    code = """
import torch, tri_stn
def sample(image, grid):
    return torch.grid_sampler(image, grid, 0, 0, False)
image, grid = torch.rand(1, 1, 3, 4), torch.rand(1, 5, 6, 2)
expected = sample(image, grid)
for _ in range(2):
    with tri_stn.fuse():
        torch._dynamo.reset()
        assert torch.equal(torch.compile(sample, fullgraph=True, backend="eager")(image, grid), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(sample, fullgraph=True, backend="eager")(image, grid), expected)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- by our own names --------------------------------------------------------------------------------


def test_affine_grid_has_the_signature_of_torchs():
    ours, theirs = (inspect.signature(module.affine_grid).parameters for module in (tri_stn, F))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("align_corners", [False, True])
def test_our_affine_grid_and_grid_sample_fuse_without_a_context(dims, align_corners):
    image, theta, size = inputs(dims)
    expected = tri_stn.warp(image, tri_stn.Affine(theta), size[2:], align_corners=align_corners)
    samplers = [tri_stn.grid_sample] if dims == 1 else [tri_stn.grid_sample, F.grid_sample, early_grid_sample]
    for sample in samplers:
        with Calls() as calls:
            grid = tri_stn.affine_grid(theta, size, align_corners)
            actual = sample(image, grid, align_corners=align_corners)
        assert calls.names == FUSED
        torch.testing.assert_close(actual, expected)
    for got, want in zip(
        torch.autograd.grad(actual.sum(), (image, theta)),
        torch.autograd.grad(expected.sum(), (image, theta)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("touch", [lambda g: g * 1, Square.apply], ids=["python", "c++"])
def test_a_line_has_a_grid(align_corners, touch):
    theta = torch.tensor([[[2.0, 0.5]], [[-1.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64) * (1 if align_corners else 0.8)
    expected = with_gradients(lambda t: touch((t[..., :1] * x + t[..., 1:]).movedim(1, -1)), theta)
    actual = with_gradients(lambda t: touch(tri_stn.affine_grid(t, (2, 1, 5), align_corners)), theta)
    assert_same(actual, expected)


@pytest.mark.parametrize("case", ["integers", "another batch", "theta of 3-D", "no pixels"])
def test_our_affine_grid_refuses_what_torchs_does(case, monkeypatch):
    image, theta, _ = inputs()
    with pytest.raises(Exception) as expected:
        BAD[case](image, theta)
    monkeypatch.setattr(F, "affine_grid", tri_stn.affine_grid)
    with pytest.raises(expected.type) as actual:
        BAD[case](image, theta)
    assert str(actual.value) == str(expected.value)


# --- models that people have -------------------------------------------------------------------------


class Classifier(nn.Module):
    """As in PyTorch's tutorial on spatial transformers, made smaller."""

    def __init__(self):
        super().__init__()
        self.localization = nn.Sequential(
            nn.Conv2d(1, 4, kernel_size=7), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
            nn.Conv2d(4, 5, kernel_size=5), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
        )  # fmt: skip
        self.fc_loc = nn.Sequential(nn.Linear(5 * 3 * 3, 8), nn.ReLU(True), nn.Linear(8, 3 * 2))
        self.fc_loc[2].weight.data.normal_(std=0.05)
        self.fc_loc[2].bias.data.copy_(torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float))
        self.classify = nn.Sequential(nn.Conv2d(1, 4, kernel_size=5, stride=3), nn.Flatten(), nn.Linear(4 * 8 * 8, 10))

    def stn(self, x):
        xs = self.localization(x)
        xs = xs.view(-1, 5 * 3 * 3)
        theta = self.fc_loc(xs)
        theta = theta.view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size())
        return F.grid_sample(x, grid)

    def forward(self, x):
        return F.log_softmax(self.classify(self.stn(x)), dim=1)


class Rectifier(nn.Module):
    """As in ASTER: a thin-plate spline from predicted control points gives a grid of its own."""

    def __init__(self, height=4, width=6, points=6):
        super().__init__()
        self.size, self.points = (height, width), points
        self.predict = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 8, 2 * points))
        self.predict[1].weight.data.normal_(std=0.01)
        across = torch.linspace(0.1, 0.9, points // 2)
        target = torch.cat([torch.stack([across, torch.full_like(across, y)], 1) for y in (0.1, 0.9)])
        self.predict[1].bias.data.copy_(target.flatten())
        y, x = torch.meshgrid(torch.arange(height) / (height - 1), torch.arange(width) / (width - 1), indexing="ij")
        pixels = torch.stack([x.flatten(), y.flatten()], 1)
        kernel = torch.zeros(points + 3, points + 3)
        kernel[:points, :points] = self.radial(target, target)
        kernel[:points, -3:] = torch.cat([torch.ones(points, 1), target], 1)
        kernel[-3:, :points] = kernel[:points, -3:].T
        self.register_buffer("inverse_kernel", torch.inverse(kernel))
        basis = torch.cat([self.radial(pixels, target), torch.ones(len(pixels), 1), pixels], 1)
        self.register_buffer("target_coordinate_repr", basis)

    @staticmethod
    def radial(a, b):
        distance = (a[:, None] - b[None]).square().sum(-1)
        return torch.where(distance == 0, 0, 0.5 * distance * distance.clamp(min=1e-12).log())

    def forward(self, x):
        source = self.predict(x).view(-1, self.points, 2)
        y = torch.cat([source, source.new_zeros(len(x), 3, 2)], 1)
        mapping = torch.matmul(self.inverse_kernel, y)
        coordinates = torch.matmul(self.target_coordinate_repr, mapping)
        grid = coordinates.view(-1, *self.size, 2)
        grid = torch.clamp(grid, 0, 1)
        grid = 2.0 * grid - 1.0
        return F.grid_sample(x, grid, align_corners=False)


class Registration(nn.Module):
    """As VoxelMorph: a flow in pixels, added to a grid of pixel numbers, normalised, axes reversed."""

    def __init__(self, size):
        super().__init__()
        dims = len(size)
        self.flow = (nn.Conv2d if dims == 2 else nn.Conv3d)(2, dims, 3, padding=1)
        vectors = [torch.arange(0, s) for s in size]
        grid = torch.stack(torch.meshgrid(vectors, indexing="ij"))
        self.register_buffer("grid", grid.unsqueeze(0).float(), persistent=False)

    def forward(self, pair):
        moving, flow = pair[:, :1], self.flow(pair)
        new_locs = self.grid + flow
        shape = flow.shape[2:]
        for i in range(len(shape)):
            new_locs[:, i, ...] = 2 * (new_locs[:, i, ...] / (shape[i] - 1) - 0.5)
        new_locs = new_locs.movedim(1, -1).flip(-1)
        return F.grid_sample(moving, new_locs, align_corners=True, mode="bilinear"), flow


class AffineThenFlow(nn.Module):
    """Registration whose identity comes from affine_grid: a lazy grid that arithmetic makes ordinary."""

    def __init__(self):
        super().__init__()
        self.flow = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, pair):
        identity = torch.eye(2, 3, dtype=pair.dtype, device=pair.device).expand(len(pair), 2, 3)
        grid = F.affine_grid(identity, pair.shape, align_corners=True)
        return F.grid_sample(pair[:, :1], grid + self.flow(pair).permute(0, 2, 3, 1), align_corners=True)


GENERATOR, TORCHS = {"aten::affine_grid_generator"}, {"aten::grid_sampler_2d"}


@pytest.mark.parametrize(
    "make, shape, on_kernels, on_reference",
    [
        (Classifier, (2, 1, 28, 28), FUSED, FUSED),
        (Rectifier, (2, 3, 6, 8), FUSED, TORCHS),
        (lambda: Registration((6, 5)), (2, 2, 6, 5), FUSED, TORCHS),
        (lambda: Registration((4, 3, 5)), (1, 2, 4, 3, 5), FUSED, {"aten::grid_sampler_3d"}),
        (
            AffineThenFlow,
            (2, 2, 6, 5),
            FUSED | {"aten::affine_grid_generator"},
            TORCHS | {"aten::affine_grid_generator"},
        ),
    ],
    ids=["STN classifier", "TPS rectifier", "2-D registration", "3-D registration", "affine plus flow"],
)
@pytest.mark.filterwarnings("ignore:Default grid_sample and affine_grid")
def test_models_unmodified(backend, make, shape, on_kernels, on_reference):
    """Outputs, and gradients of the input and every parameter; a grid of its own stays with torch on the CPU."""
    torch.manual_seed(0)
    model = make().double().to(backend)
    image = torch.rand(shape, dtype=torch.float64, device=backend, requires_grad=True)
    tensors = image, *model.parameters()
    expected = with_gradients(lambda x, *_: model(x), *tensors)
    with tri_stn.fuse():
        actual = with_gradients(lambda x, *_: model(x), *tensors)
        with torch.no_grad(), Calls() as calls:
            model(image)
    on_kernels_now = backend == "cuda" or "TRITON_INTERPRET" in os.environ
    assert calls.names == (on_kernels if on_kernels_now else on_reference)
    assert_same(actual, expected)
