"""The operators as PyTorch sees them: registration, tracing, autocast, what they allocate."""

import os

import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tri_stn.kernels import launch

import tri_stn
from tri_stn import ops
from tri_stn.testing import Case

OPTIONS = ("affine", "bilinear", "border", False, 1)


def arguments(device, dtype=torch.float32, channels_last=False):
    arrangement = "channels_last" if channels_last else "contiguous"
    case = Case(maps=2, size=(4, 5), input_size=(5, 4), dtype=dtype, arrangement=arrangement)
    return case.tensors(device)


@pytest.mark.parametrize("dtype,channels_last", [(torch.float32, False), (torch.bfloat16, True)])
def test_opcheck(backend, dtype, channels_last):
    image, theta, grad = arguments(backend, dtype, channels_last)
    ops = torch.ops.tri_stn
    interpreted = "TRITON_INTERPRET" in os.environ  # slow, and registered no otherwise
    for tangents in ((None, None), (image, theta), (None, theta))[: 1 if interpreted else 3]:
        args = (image, theta, None, None, *tangents, [4, 5], "", False, *OPTIONS)
        torch.library.opcheck(ops.warp_forward.default, args)
        for needs in ((True, True), (True, False), (False, True))[: 1 if interpreted else 3]:
            kept = image if needs[1] else None
            tensors = (grad.flatten(0, 1), kept, theta, None, None, *tangents)
            args = (*tensors, list(image.shape[2:]), channels_last, *needs, False, *OPTIONS)
            torch.library.opcheck(ops.warp_backward.default, args)
    torch.library.opcheck(
        ops.warp.default, (image.requires_grad_(), theta.requires_grad_(), None, None, [4, 5], "", *OPTIONS)
    )
    torch.library.opcheck(ops.splat.default, (grad.flatten(0, 1).requires_grad_(), theta, None, [5, 4], *OPTIONS))


def test_compile_with_dynamic_batch(backend):
    """One graph, no breaks, compiled once for all batch sizes and image sizes; the same numbers."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(image, theta):
        return tri_stn.warp(image * 2, tri_stn.Affine(theta), (5, 7), padding_mode="border").square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for images, height in ((5, 9), (4, 9), (4, 8)):
        case = Case(images=images, input_size=(height, 6), size=(5, 7))
        image, theta, _ = case.tensors(backend)
        inputs = image.requires_grad_(), theta.requires_grad_()
        actual, expected = compiled(*inputs), loss(*inputs)
        torch.testing.assert_close(actual, expected)
        for got, want in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_export_keeps_the_operator(backend):
    class Model(torch.nn.Module):
        def forward(self, image, theta):
            return tri_stn.warp(image, tri_stn.Affine(theta), (5, 7))

    image, theta, _ = Case(size=(5, 7)).tensors(backend)
    program = torch.export.export(Model(), (image, theta))
    assert any("tri_stn.warp" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(image, theta), Model()(image, theta))


def test_autocast_leaves_coordinates_alone(backend):
    """Under autocast F.affine_grid is a 16-bit matrix product, half a pixel off; warp is not."""
    case = Case(images=1, channels=1, input_size=(1, 200), size=(1, 200))
    image, theta, _ = case.tensors(backend)
    expected = tri_stn.warp(image, tri_stn.Affine(theta), padding_mode="border")
    with torch.autocast(backend, torch.bfloat16):
        actual = tri_stn.warp(image, tri_stn.Affine(theta), padding_mode="border")
    assert torch.equal(actual, expected)


TARGETS = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1], [0.1, 0]])
MAPS = {
    "affine": ((2, 3), tri_stn.Affine),
    "thin_plate": ((5, 2), lambda s: tri_stn.ThinPlateSpline(TARGETS.to(s.device), TARGETS.to(s.device) + s)),
    "linear_basis": (
        (2, 4),
        lambda c: tri_stn.LinearBasis(c, torch.linspace(-1, 1, 144, device=c.device).view(4, 6, 6)),
    ),
    "chain": (
        (2, 3),
        lambda t: tri_stn.Compose(
            tri_stn.Affine(t), tri_stn.ThinPlateSpline(TARGETS.to(t.device), (TARGETS[None] ** 3 / 2).to(t.device))
        ),
    ),
}


@pytest.mark.parametrize("way", ["fill", "mask", "antialias", "func", "deterministic"])
@pytest.mark.parametrize("name", MAPS)
def test_autocast_leaves_maps_and_their_gradients_alone(backend, monkeypatch, name, way):
    """Also where a map goes through products of matrices: to the reference, and to a grid that is stored."""
    shape, make = MAPS[name]
    if way == "antialias" and name == "linear_basis":
        pytest.skip("one place per pixel")
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 2, 6, 6, generator=generator).to(backend)
    numbers = (0.3 * torch.randn(1, *shape, generator=generator)).to(backend)
    options = {"fill": {"fill": 0.5}, "mask": {"return_mask": True}, "antialias": {"antialias": True}}.get(way, {})
    monkeypatch.setattr(ops, "is_deterministic", lambda: way == "deterministic")

    def loss(image, numbers):
        output = tri_stn.warp(image, make(numbers), (6, 6), **options)
        output = torch.cat(output, 1) if way == "mask" else output
        return output.square().sum(), output

    def results():
        if way == "func":
            gradients, output = torch.func.grad(loss, (0, 1), has_aux=True)(image, numbers)
            return *gradients, output
        inputs = image.clone().requires_grad_(), numbers.clone().requires_grad_()
        value, output = loss(*inputs)
        return *torch.autograd.grad(value, inputs), output

    expected = results()
    with torch.autocast(backend, torch.bfloat16):
        actual = results()
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # fp32, on a GPU summed in any order


class Allocations(TorchDispatchMode):
    """Every tensor that an operator of torch returns, inside ours too, and that is not a view of one it was given."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tri_stn":  # otherwise what it allocates for itself would go unseen
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and "(a!)" not in str(func._schema):
            self.tensors.append(result)
        return result


def test_the_dispatcher_is_left_out_only_where_it_does_nothing():
    image = torch.rand(1, 1, 2, 2)
    ordinary = image, torch.nn.Parameter(image), image.double().requires_grad_()[:, :, :1], None
    assert ops._is_direct(ordinary)
    with torch.inference_mode(), torch.autocast("cpu"):
        assert ops._is_direct((*ordinary, torch.rand(1)))
    others = [
        image.to("meta"),
        torch.complex(image, image).conj().imag,
        torch._efficientzerotensor(2),
        image.to_sparse(),
    ]
    others.append(image.as_subclass(type("Subclass", (torch.Tensor,), {})))
    with FakeTensorMode() as mode:
        others.append(mode.from_tensor(image))
        assert not ops._is_direct(ordinary)
    for listener in (torch.device("meta"), torch.profiler.profile()):
        with listener:
            assert not ops._is_direct(ordinary)
    assert not any(ops._is_direct((image, other)) for other in others)
    with Allocations():
        assert not ops._is_direct(ordinary)
    seen = []
    torch.vmap(lambda x: seen.append(ops._is_direct((image, x))) or x)(image)
    torch.jit.trace(lambda x: seen.append(ops._is_direct((x,))) or x + 1, image, check_trace=False)
    assert seen == [False, False]


@pytest.mark.parametrize("options", [{}, {"mode": "bicubic", "supersample": 2}], ids=str)
def test_the_default_device_decides_nothing(options, monkeypatch):
    """Tensors that the CPU path makes for itself are on the CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    image, theta = torch.rand(2, 3, 8, 8), torch.eye(2, 3).repeat(2, 1, 1) + torch.rand(2, 2, 3) / 9
    expected = tri_stn.warp(image, tri_stn.Affine(theta), **options)
    with torch.device("meta"):
        torch.testing.assert_close(tri_stn.warp(image, tri_stn.Affine(theta), **options), expected)


def test_an_empty_batch_serves_no_other(backend):
    """A launch would read an image where there is no memory."""
    operators, (image, theta, grad) = torch.ops.tri_stn, arguments(backend)
    none = [None] * 4
    assert operators.warp_forward(image[:0], theta, *none, [4, 5], "", False, *OPTIONS)[0].numel() == 0
    flags = False, True, True, False
    gradients = operators.warp_backward(grad.flatten(0, 1), image[:0], theta, *none, [5, 4], *flags, *OPTIONS)
    assert all(g.numel() == 0 for g in gradients)


def test_a_negated_view_is_read_negated(backend):
    """The imaginary part of a conjugate is a view that torch negates only when it is read."""
    image = torch.rand(1, 1, 4, 4, dtype=torch.complex64, device=backend)
    theta = torch.tensor([[[1.0, 0.2, 0], [0, 0.9, 0.1]]], device=backend)
    expected = tri_stn.warp(image.imag.contiguous(), tri_stn.Affine(theta))
    assert torch.equal(tri_stn.warp(image.conj().imag, tri_stn.Affine(theta)), -expected)


def silence(monkeypatch):
    """The names of the kernels launched from here on. None is started: the interpreter allocates for itself."""
    names = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda self, *_: names.append(self.kernel.__name__))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_pass_allocates_nothing_the_size_of_an_image(dtype, layout, monkeypatch):
    """No grid, no fp32 twin, no copy into another layout: beside the results only partial sums."""
    launches = silence(monkeypatch)
    image = torch.empty(2, 8, 256, 256, dtype=dtype, device=DEVICE).contiguous(memory_format=layout)
    theta = torch.empty(2, 1, 2, 3, device=DEVICE)
    with Allocations() as log:
        options, none = ("affine", "bilinear", "zeros", False, 1), [None] * 4
        output, _ = ops._warp_forward(image, theta, *none, image.shape[2:], "", False, *options)
        flags = layout == torch.channels_last, True, True, False
        ops._warp_backward(output, image, theta, *none, image.shape[2:], *flags, *options)
    sizes = sorted(t.numel() * t.element_size() for t in log.tensors)
    assert launches == ["gather_kernel", "walk_kernel"]
    assert sizes[-2:] == [image.numel() * image.element_size()] * 2, "the output and grad_input, once each"
    assert sum(sizes[:-2]) < image.numel() // 8  # a grid alone: 4 bytes a number, 2 numbers a pixel


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_never_waits_for_the_device(padding_mode, deterministic, monkeypatch):
    """First and second derivatives, and the adjoint."""
    monkeypatch.setattr(ops, "is_deterministic", lambda: deterministic)
    image, theta, grad = Case(padding_mode=padding_mode).tensors("cuda")
    image.requires_grad_(), theta.requires_grad_()
    for check in (False, True):  # the first round compiles
        torch.cuda.set_sync_debug_mode("error" if check else "default")
        try:
            output = tri_stn.warp(image, tri_stn.Affine(theta), (11, 14), padding_mode=padding_mode)
            (first,) = torch.autograd.grad(output, theta, grad, create_graph=True)
            torch.autograd.grad(first.sum(), (image, theta))
            tri_stn.splat(grad, tri_stn.Affine(theta), (13, 9), padding_mode=padding_mode, normalize=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_captures_into_a_cuda_graph(padding_mode):
    """Replayed on another theta, the graph takes the road that the new theta needs."""
    image, theta, grad = Case(padding_mode=padding_mode, images=1, size=(300, 20)).tensors("cuda")
    image.requires_grad_(), theta.requires_grad_()

    def step():
        output = tri_stn.warp(image, tri_stn.Affine(theta), (300, 20), padding_mode=padding_mode)
        return torch.autograd.grad(output, (image, theta), grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        theta.mul_(0.001)  # a map that magnifies
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_results(dtype):
    image = torch.randn(4, 16, 512, 512, device="cuda", dtype=dtype, requires_grad=True)
    theta = torch.eye(2, 3, device="cuda").repeat(4, 1, 1).requires_grad_()
    tri_stn.warp(image, tri_stn.Affine(theta)).sum().backward()  # compiles
    image.grad = theta.grad = None
    grad = torch.randn_like(image)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = tri_stn.warp(image, tri_stn.Affine(theta))
    output.backward(grad)
    extra = torch.cuda.max_memory_allocated() - before - 2 * image.numel() * image.element_size()
    partial_sums = 4 * (512 * 512 // 128) * (16 // 8) * 6 * 4
    assert extra <= 2**20 + 2 * partial_sums
