"""Second derivatives, forward mode and vmap."""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from test_operators import Allocations
from test_warp import MODES, PADDING_MODES
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import tri_stn
from tri_stn.testing import Case

SIZES = {1: ((5,), (4,)), 2: ((3, 4), (3, 2)), 3: ((3, 2, 3), (2, 1, 2))}
DOUBLE = {"dtype": torch.float64, "theta_dtype": torch.float64}


def warp(case):
    return lambda image, parameters: tri_stn.warp(image, case.transform(parameters), case.size, **case.options)


KINDS = ["affine", "grid", "displacement", "projective"]


@pytest.mark.parametrize("kind,mode,padding_mode,dims", covering(KINDS, MODES, PADDING_MODES, list(SIZES)))
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_gradcheck_of_everything(backend, kind, dims, mode, padding_mode):
    """First and second order, reverse and forward mode, with batches of gradients: against differences in fp64."""
    align_corners = kind in ("grid", "projective")
    if (kind, dims) == ("projective", 1):
        dims = 2  # a projective map takes 2-D and 3-D images
    case = Case(kind=kind, mode=mode, padding_mode=padding_mode, align_corners=align_corners, channels=1, **DOUBLE)
    case = case.with_(input_size=SIZES[dims][0], size=SIZES[dims][1])
    image, parameters, _ = case.tensors(backend)
    inputs = image.requires_grad_(), parameters.requires_grad_()
    fast = dims == 3 or mode == "bicubic"
    assert gradcheck(warp(case), inputs, check_forward_ad=True, check_batched_grad=not fast, fast_mode=fast)
    assert gradgradcheck(warp(case), inputs, check_fwd_over_rev=True, fast_mode=fast)


CHANGES = [
    *(Case(mode=m, padding_mode=p) for m, p in itertools.product(("bilinear", "bicubic"), PADDING_MODES)),
    Case(kind="grid", padding_mode="reflection", maps=2),
    Case(kind="displacement", mode="bicubic", align_corners=True),
    Case(kind="projective", padding_mode="border"),
    Case(kind="projective", mode="bicubic", maps=2),
    Case(kind="projective", input_size=(3, 2, 4), size=(2, 3, 2)),
    Case(maps=2, padding_mode="border", arrangement="channels_last", channels=9),
    Case(input_size=(4,), size=(3,), padding_mode="border"),
    Case(input_size=(3, 2, 4), size=(2, 3, 2)),
    Case(input_size=(3, 2, 3), size=(1, 2, 2), mode="bicubic", channels=1),
    Case(theta=((0.1, 0.02, 0.3), (-0.03, 0.1, 0.2)), size=(9, 7)),  # magnifies: lanes share out a pixel's rows
]


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@pytest.mark.parametrize(
    "case", [c if c.theta or len(c.size) != 2 else c.with_(size=(4, 3), input_size=(3, 5)) for c in CHANGES], ids=str
)
def test_kernels_change_as_the_reference_does(backend, monkeypatch, case):
    """Each operator along a random direction of both its tensors, and of the parameters alone."""
    if case.theta:
        tiling = pytest.importorskip("tri_stn.kernels.tiling")
        tile = tiling.Tile((8, 4), 1, 2, 2, num_warps=1, max_registers=255)
        monkeypatch.setattr(tiling, "walk_tile", lambda *_: tile)
    case = case.with_(**DOUBLE)
    image, parameters, output_grad = case.tensors(backend)
    changes = [torch.rand_like(image), torch.rand_like(parameters)]
    if case.maps is None:
        parameters, changes[1] = parameters.unsqueeze(1), changes[1].unsqueeze(1)
    else:
        output_grad = output_grad.flatten(0, 1)
    options = (case.kind, case.mode, case.padding_mode, case.align_corners, 1)
    layout = (case.input_size, case.arrangement == "channels_last")
    forward = (case.size, "", False)
    operators = torch.ops.tri_stn

    def run(device):
        x, theta, g, dx, dtheta = (t.to(device) for t in (image, parameters, output_grad, *changes))
        return [
            operators.warp_forward(x, theta, None, None, dx, dtheta, *forward, *options)[0],
            operators.warp_forward(x, theta, None, None, None, dtheta, *forward, *options)[0],
            *operators.warp_backward(g, x, theta, None, None, dx, dtheta, *layout, True, True, False, *options)[:2],
            operators.warp_backward(g, x, theta, None, None, None, dtheta, *layout, False, True, False, *options)[1],
            operators.warp_backward(g, None, theta, None, None, None, dtheta, *layout, True, False, False, *options)[0],
        ]

    actual = run(backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for got, want in zip(actual, run("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_derivatives_in_16_bits(backend, dtype):
    """Sums are fp32 and rounded once; the pixels are those that the forward read."""
    case = Case(size=(4, 3), input_size=(3, 5), dtype=dtype)
    image, theta, g = case.tensors(backend)
    direction = torch.rand_like(theta)

    def second(image, g):
        inputs = image.detach().requires_grad_(), theta.detach().requires_grad_(), g.detach().requires_grad_()
        first = torch.autograd.grad(warp(case)(*inputs[:2]), inputs[1], inputs[2], create_graph=True)
        return torch.autograd.grad(first, inputs, direction)

    for got, want in zip(second(image, g), second(image.float(), g.float()), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


def composed(image, theta):
    """What torch makes of `sampled`."""
    grid = F.affine_grid(theta, (len(theta), 1, 3, 2), align_corners=False)
    return F.grid_sample(image, grid.expand(len(image), -1, -1, -1), padding_mode="border", align_corners=False)


def sampled(image, theta):
    return tri_stn.warp(image, tri_stn.Affine(theta), (3, 2), padding_mode="border")


def loss(sample):
    return lambda image, theta: sample(image, theta).square().sum()


def assert_equal_trees(actual, expected):
    if isinstance(actual, torch.Tensor):
        return torch.testing.assert_close(actual, expected)
    for a, e in zip(actual, expected, strict=True):
        assert_equal_trees(a, e)


@pytest.fixture
def image_and_theta():
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(3, 2, 2, 4, 5, generator=generator, dtype=torch.float64)
    theta = torch.eye(2, 3) + 0.3 * torch.rand(3, 2, 2, 3, generator=generator, dtype=torch.float64)
    return image, theta


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_func_transforms(backend, image_and_theta):
    image, theta = (t[0, :1] for t in image_and_theta)
    both = (0, 1)
    first = jacrev(composed, both)(image, theta)
    assert_equal_trees(jacrev(sampled, both)(image, theta), first)
    assert_equal_trees(jacfwd(sampled, both)(image, theta), first)
    second = jacrev(jacrev(loss(composed), both), both)(image, theta)
    assert_equal_trees(hessian(loss(sampled), both)(image, theta), second)
    assert_equal_trees(jacrev(jacrev(loss(sampled), both), both)(image, theta), second)
    assert_equal_trees(jacrev(jacfwd(loss(sampled), both), both)(image, theta), second)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 0)])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_vmap(backend, image_and_theta, images, in_dims):
    """Over either argument or both, forward and backward."""
    tensors = [
        t[:, :images] if dim is not None else t[0, :images] for t, dim in zip(image_and_theta, in_dims, strict=True)
    ]

    def one_by_one(function):
        calls = [function(*(t if d is None else t[i] for t, d in zip(tensors, in_dims, strict=True))) for i in range(3)]
        return (
            torch.stack(calls)
            if isinstance(calls[0], torch.Tensor)
            else [torch.stack(c) for c in zip(*calls, strict=True)]
        )

    arguments = [t if not d else t.movedim(0, d) for t, d in zip(tensors, in_dims, strict=True)]
    assert_equal_trees(vmap(sampled, in_dims)(*arguments), one_by_one(composed))
    gradients = vmap(grad(loss(sampled), (0, 1)), in_dims)(*arguments)
    assert_equal_trees(gradients, one_by_one(grad(loss(composed), (0, 1))))


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
def test_vmap_in_the_kernels(backend, image_and_theta):
    """The kernels themselves read one image, and one gradient, for all of a mapped batch."""
    image, theta = image_and_theta[0][0].to(backend), image_and_theta[1].to(backend)

    def backward(image, theta):
        return torch.func.vjp(sampled, image, theta)[1](torch.ones(2, 2, 3, 2, device=backend, dtype=image.dtype))

    assert_equal_trees(vmap(sampled, (None, 0))(image, theta), torch.stack([sampled(image, t) for t in theta]))
    expected = [torch.stack(g) for g in zip(*(backward(image, t) for t in theta), strict=True)]
    assert_equal_trees(vmap(backward, (None, 0))(image, theta), expected)
    tangents = torch.rand_like(theta)
    expected = torch.stack([jvp(lambda t: sampled(image, t), (theta[0],), (t,))[1] for t in tangents])
    actual = vmap(lambda t: jvp(lambda theta: sampled(image, theta), (theta[0],), (t,))[1])(tangents)
    assert_equal_trees(actual, expected)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_vmap_of_vmap(backend, image_and_theta):
    image, theta = image_and_theta
    expected = torch.stack([torch.stack([sampled(i, t) for t in theta]) for i in image])
    assert_equal_trees(vmap(vmap(sampled, (None, 0)), (0, None))(image, theta), expected)
    assert_equal_trees(vmap(vmap(sampled, (0, None)), (None, 0))(image, theta), expected.transpose(0, 1))


SHARED = [(0, None), (None, 0), (1, None)]


def looped(function, in_dims, calls):
    """`vmap`, one call after the other."""

    def run(*tensors):
        each = [
            [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)]
            for i in range(calls)
        ]
        return torch.stack([function(*given) for given in each])

    return run


@pytest.mark.parametrize("in_dims", SHARED)
def test_a_gradient_over_vmap_is_the_sum_of_all_turns(backend, image_and_theta, in_dims):
    """Of what is not mapped over: first and second order, and of the first gradient's own."""
    image_and_theta = [t.to(backend) for t in image_and_theta]
    shared = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(image_and_theta, in_dims, strict=True)]

    def gradients(sample):
        given = [t.clone().requires_grad_() for t in shared]
        output = vmap(sample, in_dims)(*given)
        along = torch.ones_like(output).requires_grad_()
        first = torch.autograd.grad(output, given, along, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (along, *given))

    assert_equal_trees(gradients(sampled), gradients(composed))


@pytest.mark.parametrize("in_dims", SHARED[:2])
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_func_transforms_over_vmap(backend, image_and_theta, in_dims):
    """Against torch's, whose sampler has no forward mode: second derivatives are symmetric."""
    shared = [t[:2] if dim is not None else t[0] for t, dim in zip(image_and_theta, in_dims, strict=True)]
    directions = tuple(torch.rand_like(t) for t in shared)
    both = (0, 1)

    def along(gradients):
        return sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    ours, theirs = vmap(sampled, in_dims), vmap(composed, in_dims)
    first = jacrev(theirs, both)(*shared)
    assert_equal_trees(jacrev(ours, both)(*shared), first)
    assert_equal_trees(jacfwd(ours, both)(*shared), first)
    second = grad(lambda *given: along(grad(loss(theirs), both)(*given)), both)(*shared)
    assert_equal_trees(grad(lambda *given: along(grad(loss(ours), both)(*given)), both)(*shared), second)
    assert_equal_trees(jvp(grad(loss(ours), both), tuple(shared), directions)[1], second)
    assert_equal_trees(grad(lambda *given: jvp(loss(ours), given, directions)[1], both)(*shared), second)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_gradients_over_and_between_vmaps(backend, image_and_theta):
    inner, outer = (0, None), (None, 0)
    for function in (
        lambda sample: grad(loss(vmap(vmap(sample, inner), outer)), (0, 1)),
        lambda sample: vmap(grad(loss(vmap(sample, inner)), (0, 1)), outer),
    ):
        assert_equal_trees(function(sampled)(*image_and_theta), function(composed)(*image_and_theta))


CALLS = {
    "maps": lambda x, t: tri_stn.warp(x, tri_stn.Affine(torch.stack([t, t.sin()], 1)), (3, 2)),
    "grid": lambda x, t: tri_stn.warp(x, tri_stn.Grid(t[..., :2].unsqueeze(1))),
    "chain": lambda x, t: tri_stn.warp(
        x, tri_stn.Compose(tri_stn.Affine(t), tri_stn.Displacement(x.new_ones(1, 3, 2, 2) / 9))
    ),
    "mask": lambda x, t: tri_stn.warp(x, tri_stn.Affine(t), (3, 2), return_mask=True)[0],
    "antialias": lambda x, t: tri_stn.warp(x, tri_stn.Affine(t), (3, 2), antialias=True),
    "nearest": lambda x, t: tri_stn.warp(x, tri_stn.Affine(t), (3, 2), mode="nearest"),
    "splat": lambda x, t: tri_stn.splat(x, tri_stn.Affine(t), (3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("in_dims", SHARED[:2])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_every_call_over_vmap(backend, image_and_theta, name, in_dims):
    """Reverse and forward mode are those of a loop; of nearest's map, of which nothing depends, too."""
    shared = [t if dim is not None else t[0] for t, dim in zip(image_and_theta, in_dims, strict=True)]
    for index in (0, 1):
        found = []
        for function in (vmap(CALLS[name], in_dims), looped(CALLS[name], in_dims, 3)):

            def of_one(given, function=function, index=index):
                return function(*shared[:index], given, *shared[index + 1 :])

            change = jvp(of_one, (shared[index],), (shared[index].cos(),))[1]
            found.append([change, grad(lambda given: of_one(given).square().sum())(shared[index])])
        assert_equal_trees(*found)


@pytest.mark.parametrize("in_dims", SHARED[:2])
def test_vmap_over_nothing(backend, image_and_theta, in_dims):
    """An empty batch of calls: an empty output, and of what is not mapped over a gradient of zeros."""
    shared = [t[:0] if dim is not None else t[0] for t, dim in zip(image_and_theta, in_dims, strict=True)]
    given = [t.to(backend).requires_grad_() for t in shared]
    output = vmap(sampled, in_dims)(*given)
    assert output.shape == (0, 2, 2, 3, 2)
    for gradient, tensor in zip(torch.autograd.grad(output.sum(), given), given, strict=True):
        assert gradient.shape == tensor.shape and (gradient == 0).all()
    each = vmap(grad(loss(sampled), (0, 1)), in_dims)(*given)
    assert [g.shape for g in each] == [(0, *t.shape[1:]) for t in image_and_theta]


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_vmap_does_not_expand_the_image(backend):
    """Eight maps of two shared images: nothing is allocated that has their size, forward or backward."""
    image, thetas = torch.rand(2, 16, 40, 50), torch.eye(2, 3).repeat(8, 2, 1, 1)

    def change(theta):
        return grad(lambda theta: tri_stn.warp(image, tri_stn.Affine(theta), (3, 2)).sum())(theta)

    with Allocations() as log:
        vmap(change)(thetas)
    assert max(t.untyped_storage().nbytes() for t in log.tensors) < image.nbytes


def test_a_gradient_that_carries_a_tangent():
    """Forward mode through a backward pass of which no graph is kept."""
    image, theta, grad = Case(**DOUBLE).tensors("cpu")
    output = warp(Case(**DOUBLE))(image.requires_grad_(), theta.requires_grad_())
    tangent = torch.rand_like(grad)
    expected = torch.autograd.grad(output, (image, theta), tangent, retain_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(grad, tangent)
        found = torch.autograd.grad(output, (image, theta), dual)
        for change, linear in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(change).tangent, linear)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_what_is_not_implemented_says_so(backend, image_and_theta):
    image, theta = (t[0, :1] for t in image_and_theta)
    third = grad(lambda x: grad(lambda y: grad(loss(sampled), 1)(image, y).sum())(x).sum())
    with pytest.raises(NotImplementedError, match="Third derivatives"):
        third(theta)
    with pytest.raises(NotImplementedError, match="Forward mode over forward mode"):
        jacfwd(jacfwd(lambda t: sampled(image, t)))(theta)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_an_image_without_use_for_backward_is_freed(backend):
    """Kept for forward mode during the call alone: only the transform's gradient sees it again."""
    image = torch.rand(1, 1, 5, 5, requires_grad=True)
    layer = image * 2
    freed = weakref.ref(layer)
    output = tri_stn.warp(layer, tri_stn.Affine(torch.eye(2, 3)[None]))
    del layer
    assert freed() is None
    output.sum().backward()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("function", [
    lambda x, t: vmap(sampled)(x[:, None], t[:, None]),
    lambda x, t: grad(loss(sampled), (0, 1))(x, t),
    lambda x, t: vmap(grad(lambda x, t: loss(sampled)(x[None], t[None]), (0, 1)))(x, t),
    lambda x, t: grad(loss(vmap(sampled, (None, 0))), (0, 1))(x, torch.stack([t, t.sin()])),
    lambda x, t: jvp(sampled, (x, t), (2 * x, t.sin())),
    lambda x, t: tri_stn.splat(x, tri_stn.Affine(t), (3, 2), normalize=True),
    lambda x, t: tri_stn.grid_sample(x, t[:, None, :, :2], "bicubic", align_corners=False),
], ids=["vmap", "grad", "vmap_grad", "grad_vmap", "jvp", "splat", "grid_sample"])  # fmt: skip
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_compile(backend, image_and_theta, function):
    """In one graph, with the same results."""
    torch._dynamo.reset()
    arguments = [t[0].clone() for t in image_and_theta]  # torch's own views lose forward mode on a slice
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal_trees(compiled(*arguments), function(*arguments))
