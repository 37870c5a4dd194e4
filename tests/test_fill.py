"""What lies outside the image under zeros padding, and how much of each output pixel comes from inside."""

import itertools

import numpy as np
import pytest
import torch
from covering import covering
from test_derivatives import DOUBLE, SIZES, assert_equal_trees
from test_warp import MODES, PADDING_MODES, small_tiles  # noqa: F401
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import tri_stn
from tri_stn.testing import Case, assert_accurate, near_discontinuity, warp_truth

FILL = (-1.5, 0.75)
MEAN = np.array(FILL)


def truth_mask(case: Case, image: Tensor, parameters: Tensor) -> Tensor:
    """By torch in fp64: ones, read by the same map under zeros padding."""
    ones = torch.ones_like(image[:, :1], dtype=torch.float64)
    return warp_truth(case.with_(padding_mode="zeros"), ones, parameters)


def filled_truth(case: Case, image: Tensor, parameters: Tensor, fill: Tensor) -> Tensor:
    channel = fill.double().view(-1, *[1] * len(case.size))
    return warp_truth(case, image, parameters) + channel * (1 - truth_mask(case, image, parameters))


def shifted(device: str, shift: float, dtype: torch.dtype = torch.float32) -> tri_stn.Affine:
    """A map that looks `shift` units to the right."""
    theta = torch.eye(2, 3, dtype=dtype, device=device)[None]
    theta[0, 0, 2] = shift
    return tri_stn.Affine(theta)


CASES = [
    *(Case(mode=m, align_corners=a, size=(5, 6)) for m, a in itertools.product(MODES, (False, True))),
    Case(arrangement="channels_last", channels=40, size=(5, 6)),
    Case(arrangement="channels_last", dtype=torch.bfloat16, size=(5, 6)),
    Case(dtype=torch.float16, size=(5, 6), mode="bicubic"),
    Case(dtype=torch.float64, theta_dtype=torch.float64, size=(5, 6)),
    Case(dtype=torch.bfloat16, theta_dtype=torch.float64, size=(5, 6)),
    Case(images=2, maps=3, size=(5, 4)),
    Case(images=1, maps=3, kind="grid", size=(5, 4), mode="bicubic"),
    Case(kind="displacement", size=(6, 7), input_size=(9, 5)),
    Case(kind="projective", size=(5, 6)),
    Case(input_size=(9,), size=(13,)),
    Case(input_size=(9,), size=(13,), kind="grid", mode="bicubic"),
    Case(input_size=(4, 3, 6), size=(3, 4, 5)),
    Case(input_size=(4, 3, 6), size=(3, 4, 5), kind="displacement"),
    Case(input_size=(3, 2, 4), size=(2, 2, 3), mode="bicubic"),
    Case(theta=((0.1, 0.02, 0.9), (-0.03, 0.1, 0.9)), size=(40, 4)),  # magnifies a corner: lanes share out its rows
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_torch(backend, case, request):
    """Output and both gradients, with another fill for each channel; and the mask."""
    if case.theta:
        request.getfixturevalue("small_tiles")
    image, parameters, weights = case.tensors(backend)
    channel = -1 - len(case.size)
    band = near_discontinuity(case, parameters).unsqueeze(channel)
    weights = torch.where(band, 0, weights)
    fill = torch.tensor(FILL * (case.channels // 2), device=backend)

    image, parameters = image.requires_grad_(), parameters.requires_grad_()
    options = {"mode": case.mode, "align_corners": case.align_corners}
    output, mask = tri_stn.warp(image, case.transform(parameters), case.size, fill=fill, return_mask=True, **options)
    exact = image.detach().double().requires_grad_(), parameters.detach().double().requires_grad_()
    truth = filled_truth(case, *exact, fill)
    truths = torch.autograd.grad(truth, exact, weights.double(), retain_graph=True)
    (magnitude,) = torch.autograd.grad(truth, exact[0], weights.double().abs())
    # Cubic weights of both signs: what cancels had rounded all the same.
    cubic = case.mode == "bicubic"
    magnitude = magnitude.abs() + 4 * cubic
    strict = ~(band & (case.mode == "nearest"))
    sizes = (2.0 + 4 * cubic, magnitude, truths[1].abs().amax())
    grads = torch.autograd.grad(output, (image, parameters), weights)
    for what, actual, expected, size in zip(
        ("output", "grad_input", "grad of the transform"),
        (torch.where(strict, output, 0), *grads),
        (torch.where(strict, truth, 0), *truths),
        sizes,
        strict=True,
    ):
        assert_accurate(actual, expected, image_dtype=case.dtype, magnitude=size, what=what)
    expected = torch.where(strict, truth_mask(case, *exact), 0)
    assert mask.dtype == case.dtype and mask.shape == expected.shape and not mask.requires_grad
    assert_accurate(torch.where(strict, mask, 0), expected, image_dtype=case.dtype, magnitude=1.0 + 2 * cubic)


@pytest.mark.parametrize("mode,padding_mode,kind", covering(MODES, PADDING_MODES, ["affine", "grid"]))
def test_the_mask_is_that_of_zeros_under_any_padding(backend, kind, mode, padding_mode):
    """And the output and its gradients are what they are without it."""
    case = Case(kind=kind, mode=mode, padding_mode=padding_mode, size=(5, 6), maps=2, **DOUBLE)
    image, parameters, weights = case.tensors(backend)
    inputs = image.requires_grad_(), parameters.requires_grad_()
    output, mask = tri_stn.warp(image, case.transform(parameters), case.size, return_mask=True, **case.options)
    expected = tri_stn.warp(image, case.transform(parameters), case.size, **case.options)
    assert torch.equal(output, expected)
    for got, want in zip(
        torch.autograd.grad(output, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        # An atomic scatter on a GPU adds in any order.
        torch.testing.assert_close(got, want)
    ones = torch.ones_like(image[:, :1])
    warped = tri_stn.warp(ones, case.transform(parameters), case.size, mode=mode)
    # A sum of 16 products of weights up to 1.2, not a product of sums of them: so many roundings of fp64 apart.
    torch.testing.assert_close(mask, warped, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_and_outside_are_exact(backend, mode, dtype):
    """Inside, the bits of no fill at all, whatever the fill is; outside, the fill's."""
    image = torch.randn(1, 2, 9, 11, device=backend).to(dtype)
    theta = torch.tensor([[[1.3, 0.4, 0.1], [-0.3, 1.4, 0.2]]], device=backend)
    plain = tri_stn.warp(image, tri_stn.Affine(theta), mode=mode)
    for fill in ((0.1, -1e4), (float("nan"), float("inf"))):
        output, mask = tri_stn.warp(image, tri_stn.Affine(theta), mode=mode, fill=fill, return_mask=True)
        ones = tri_stn.warp(torch.ones_like(image[:, :1], dtype=torch.float64), tri_stn.Affine(theta), mode=mode)
        inside, outside = (mask == 1).expand_as(output), (mask == 0).expand_as(output)
        assert inside.any() and outside.any()
        if mode == "bilinear" and dtype == torch.float32:
            assert ((mask == 1) == (ones > 1 - 1e-9)).all() and ((mask == 0) == (ones == 0)).all()
        # A 16-bit mask rounds to 1, and to 0 where cubic weights nearly cancel, a little before the sample is inside.
        if dtype == torch.float32:
            assert torch.equal(output[inside], plain[inside])
        filled = torch.tensor(fill, device=backend, dtype=dtype).view(1, 2, 1, 1).expand_as(output)
        whole = outside & (ones == 0).expand_as(output)
        assert output[whole].isnan().equal(filled[whole].isnan())
        assert output[whole].nan_to_num().equal(filled[whole].nan_to_num())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_identity_sees_no_fill(backend, mode, align_corners):
    image = torch.randn(1, 1, 7, 10, device=backend)
    options = {"mode": mode, "align_corners": align_corners, "fill": float("nan")}
    output, mask = tri_stn.warp(image, shifted(backend, 0.0), return_mask=True, **options)
    assert torch.equal(output, image) and (mask == 1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 2.0**31])
@pytest.mark.parametrize("mode", MODES)
def test_coordinates_that_are_nowhere_are_filled(backend, mode, value):
    image = torch.rand(1, 2, 5, 6, device=backend, requires_grad=True)
    theta = shifted(backend, value).parameters.clone().requires_grad_()
    output, mask = tri_stn.warp(image, tri_stn.Affine(theta), mode=mode, fill=(7.0, 0.1), return_mask=True)
    assert torch.equal(output, torch.tensor([7.0, 0.1], device=backend).view(1, 2, 1, 1).expand_as(output))
    assert (mask == 0).all()
    for gradient in torch.autograd.grad(output.sum(), (image, theta)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_coordinates_that_are_nowhere_are_masked(backend, padding_mode):
    image = torch.rand(1, 1, 3, 4, device=backend)
    _, mask = tri_stn.warp(image, shifted(backend, float("nan")), padding_mode=padding_mode, return_mask=True)
    assert (mask == 0).all()


def test_every_way_to_give_a_fill_is_the_same(backend):
    image, map = torch.rand(1, 2, 4, 5, device=backend), shifted(backend, 0.7)
    expected = tri_stn.warp(image, map, fill=0.3)
    tensor = torch.full((2,), 0.3, device=backend)
    for fill in (
        (0.3, 0.3),
        [0.3, 0.3],
        tensor,
        tensor.double(),
        tensor.expand(2),
        tensor.repeat(2)[::2],
        tensor[:1].expand(2),
        tensor[0],
        torch.tensor(0.3),  # a number, from whichever device
        np.float32(0.3),
        np.array(0.3),
        np.full(2, 0.3),
        np.array([0.3, 0.3, 0.3])[1::-1],
        [np.float32(0.3), 0.3],
    ):
        assert torch.equal(tri_stn.warp(image, map, fill=fill), expected)
    whole = tri_stn.warp(image, map, fill=(1, 0))
    for fill in (np.array([1, 0]), np.array([True, False]), [np.int64(1), 0], torch.tensor([1, 0], device=backend)):
        assert torch.equal(tri_stn.warp(image, map, fill=fill), whole)
    plain = tri_stn.warp(image, map)
    for fill in (0, 0.0, False, np.int64(0), np.bool_(False), (0, 0.0), 0 * tensor):
        assert torch.equal(tri_stn.warp(image, map, fill=fill), plain)


def test_complex(backend):
    """A fill for both parts, and one mask."""
    image, map = torch.randn(1, 2, 4, 5, device=backend, dtype=torch.complex64), shifted(backend, 0.7)
    output, mask = tri_stn.warp(image, map, fill=(1 + 2j, 3.0), return_mask=True)
    real, expected = tri_stn.warp(image.real, map, fill=(1.0, 3.0), return_mask=True)
    assert torch.equal(output, torch.complex(real, tri_stn.warp(image.imag, map, fill=(2.0, 0.0))))
    assert torch.equal(mask, expected) and mask.dtype == torch.float32
    for fill in ((2j, 2j), np.complex64(2j), np.full(2, 2j), [np.complex64(2j), 2j]):
        assert torch.equal(tri_stn.warp(image, map, fill=2j), tri_stn.warp(image, map, fill=fill))
    assert torch.equal(tri_stn.warp(image, map, return_mask=True)[0], tri_stn.warp(image, map))


@pytest.mark.parametrize("shape,size", [((0, 3, 4, 5), (2, 2)), ((2, 0, 4, 5), (2, 2)), ((2, 3, 4, 5), (0, 2))])
def test_empty(backend, shape, size):
    """An image without channels has a mask all the same."""
    map = tri_stn.Affine(torch.eye(2, 3, device=backend).repeat(shape[0], 1, 1))
    output, mask = tri_stn.warp(torch.rand(shape, device=backend), map, size, fill=1.0, return_mask=True)
    assert output.shape == (*shape[:2], *size) and mask.shape == (shape[0], 1, *size) and (mask == 1).all()


@pytest.mark.parametrize("kind,dims,mode", covering(["affine", "grid", "projective"], list(SIZES), MODES))
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_gradcheck_of_everything(backend, kind, dims, mode):
    """First and second order, reverse and forward mode: against differences in fp64."""
    if (kind, dims) == ("projective", 1):
        dims = 2  # a projective map takes 2-D and 3-D images
    case = Case(kind=kind, mode=mode, channels=2, input_size=SIZES[dims][0], size=SIZES[dims][1], **DOUBLE)
    image, parameters, _ = case.tensors(backend)
    inputs = image.requires_grad_(), parameters.requires_grad_()

    def run(image, parameters):
        map = case.transform(parameters)
        return tri_stn.warp(image, map, case.size, mode=mode, fill=FILL, return_mask=dims == 2)

    def output(image, parameters):
        result = run(image, parameters)
        return result[0] if dims == 2 else result

    fast = dims == 3 or mode == "bicubic"
    assert gradcheck(output, inputs, check_forward_ad=True, check_batched_grad=not fast, fast_mode=fast)
    assert gradgradcheck(output, inputs, check_fwd_over_rev=True, fast_mode=fast)


CHANGES = [
    *(Case(mode=m) for m in ("bilinear", "bicubic")),
    Case(kind="grid", maps=2),
    Case(kind="displacement", mode="bicubic", align_corners=True),
    Case(kind="projective"),
    Case(kind="projective", mode="bicubic", maps=2),
    Case(maps=2, arrangement="channels_last", channels=9),
    Case(input_size=(4,), size=(3,)),
    Case(input_size=(3, 2, 4), size=(2, 3, 2)),
    Case(input_size=(3, 2, 3), size=(1, 2, 2), mode="bicubic", channels=1),
    Case(kind="grid", input_size=(3, 2, 3), size=(1, 2, 2), mode="bicubic", channels=1),
]


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@pytest.mark.parametrize(
    "case", [c if len(c.size) != 2 else c.with_(size=(4, 3), input_size=(3, 5)) for c in CHANGES], ids=str
)
def test_kernels_are_the_reference(backend, monkeypatch, case):
    """Each operator at a point, along a direction of both its tensors, and of the parameters alone."""
    case = case.with_(**DOUBLE)
    image, parameters, weights = case.tensors(backend)
    changes = [torch.rand_like(image), torch.rand_like(parameters)]
    if case.maps is None:
        parameters, changes[1] = parameters.unsqueeze(1), changes[1].unsqueeze(1)
    else:
        weights = weights.flatten(0, 1)
    fill = torch.linspace(-2, 1, case.channels, dtype=torch.float64)
    options = (case.kind, case.mode, "zeros", case.align_corners, 1)
    layout = (case.input_size, case.arrangement == "channels_last")
    forward, backward = torch.ops.tri_stn.warp_forward, torch.ops.tri_stn.warp_backward

    def run(device):
        x, theta, g, f, dx, dtheta = (t.to(device) for t in (image, parameters, weights, fill, *changes))
        results = [*forward(x, theta, None, f, None, None, case.size, "", True, *options)]
        for tangents in ((None, None), (dx, dtheta), (None, dtheta)):
            results += backward(g, x, theta, None, f, *tangents, *layout, True, True, False, *options)[:2]
            results.append(backward(g, x, theta, None, f, *tangents, *layout, False, True, False, *options)[1])
        results += [forward(x, theta, None, f, t, dtheta, case.size, "", False, *options)[0] for t in (dx, None)]
        return results

    actual = run(backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for got, want in zip(actual, run("cpu"), strict=True):
        # The walk subtracts the fill from the image, the others from the sum: both in fp64.
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
def test_the_gradient_of_the_image_ignores_the_fill(backend, monkeypatch, deterministic):
    monkeypatch.setattr(tri_stn.ops, "is_deterministic", lambda: deterministic)
    for kind in ("affine", "grid"):
        case = Case(kind=kind, size=(4, 5), input_size=(5, 4))
        image, parameters, weights = case.tensors(backend)
        image.requires_grad_()
        calls = (tri_stn.warp(image, case.transform(parameters), case.size, fill=f) for f in (0.0, 5.0))
        plain, filled = (torch.autograd.grad(output, image, weights)[0] for output in calls)
        torch.testing.assert_close(filled, plain, rtol=0, atol=0 if deterministic or backend == "cpu" else 1e-6)


def sampled(image, theta, padding_mode="zeros"):
    options = {"fill": FILL} if padding_mode == "zeros" else {}
    return tri_stn.warp(image, tri_stn.Affine(theta), (3, 2), padding_mode=padding_mode, return_mask=True, **options)


def loss(image, theta):
    output, mask = sampled(image, theta)
    return (output * mask).square().sum()


@pytest.fixture
def image_and_theta():
    """Three of each, for vmap."""
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(3, 2, 2, 4, 5, generator=generator, dtype=torch.float64)
    return image, torch.eye(2, 3) + 0.4 * torch.randn(3, 2, 2, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
def test_vmap(backend, image_and_theta, in_dims):
    tensors = [t if d == 0 else t[0] for t, d in zip((t.to(backend) for t in image_and_theta), in_dims, strict=True)]
    calls = [[t if d is None else t[i] for t, d in zip(tensors, in_dims, strict=True)] for i in range(3)]
    for function in (sampled, grad(loss, (0, 1))):
        expected = [torch.stack(column) for column in zip(*(function(*call) for call in calls), strict=True)]
        assert_equal_trees(vmap(function, in_dims)(*tensors), expected)


def test_the_mask_is_constant_in_forward_mode(backend, image_and_theta):
    image, theta = (t[0].to(backend) for t in image_and_theta)
    directions = torch.rand_like(image), torch.rand_like(theta)
    values, changes = jvp(sampled, (image, theta), directions)
    assert_equal_trees(values, sampled(image, theta))
    expected = jvp(lambda *inputs: sampled(*inputs)[0], (image, theta), directions)[1]
    assert_equal_trees(changes, (expected, torch.zeros_like(values[1])))


FUNCTIONS = [
    sampled,
    lambda x, t: sampled(x, t, "border"),
    lambda x, t: grad(loss, (0, 1))(x, t),
    lambda x, t: vmap(sampled)(x[:, None], t[:, None]),
    lambda x, t: jvp(lambda *inputs: sampled(*inputs)[0], (x, t), (2 * x, t.sin())),
    lambda x, t: tri_stn.warp(x, tri_stn.Affine(t), fill=x.detach().amin((0, 2, 3))),
    lambda x, t: tri_stn.warp(x, tri_stn.Affine(t), fill=MEAN),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=["pair", "border", "grad", "vmap", "jvp", "fill", "array"])
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_compile(backend, image_and_theta, function):
    """In one graph, with the same results and gradients."""
    torch._dynamo.reset()
    arguments = [t[0].clone() for t in image_and_theta]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal_trees(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_compiled_gradients(backend, image_and_theta):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [t[0].clone().requires_grad_() for t in image_and_theta]
    assert_equal_trees(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs))


def test_export(backend, image_and_theta):
    class Model(torch.nn.Module):
        def forward(self, image, theta):
            return *sampled(image, theta), tri_stn.warp(image, tri_stn.Affine(theta), (3, 2), fill=0.5)

    arguments = tuple(t[0].to(backend) for t in image_and_theta)
    program = torch.export.export(Model(), arguments)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "tri_stn.warp_with_mask.default" in targets and "tri_stn.warp.default" in targets
    assert_equal_trees(program.module()(*arguments), Model()(*arguments))


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_opcheck(backend):
    image, theta, weights = Case(maps=2, size=(4, 5), input_size=(5, 4)).tensors(backend)
    fill = torch.tensor(FILL)
    ops, options = torch.ops.tri_stn, ("affine", "bilinear", "zeros", False, 1)
    for tangents in ((None, None), (image, theta)):
        args = (image, theta, None, fill, *tangents, [4, 5], "", tangents[0] is None, *options)
        torch.library.opcheck(ops.warp_forward.default, args)
        args = (weights.flatten(0, 1), image, theta, None, fill, *tangents, [5, 4], False, True, True, False, *options)
        torch.library.opcheck(ops.warp_backward.default, args)
    args = (image.requires_grad_(), theta.requires_grad_(), None, fill, [4, 5], "", *options)
    torch.library.opcheck(ops.warp.default, args)
    torch.library.opcheck(ops.warp_with_mask.default, args)


IMAGE, MAP = torch.rand(2, 3, 4, 5), tri_stn.Affine(torch.rand(2, 2, 3))


@pytest.mark.parametrize(
    "options,error,says",
    [
        ({"fill": 1.0, "padding_mode": "border"}, ValueError, "fill is for padding_mode 'zeros'.*got 'border'"),
        ({"fill": torch.zeros(3), "padding_mode": "reflection"}, ValueError, "got 'reflection'"),
        ({"fill": (1.0, 2.0)}, ValueError, r"each of the input's 3 channels; got shape \(2,\)"),
        ({"fill": torch.ones(3, 1)}, ValueError, r"got shape \(3, 1\)"),
        ({"fill": torch.ones(3, requires_grad=True)}, ValueError, r"no derivative .* fill.detach\(\)"),
        ({"fill": torch.ones(3, device="meta")}, ValueError, "same device; got cpu and meta"),
        ({"fill": np.ones((3, 1))}, ValueError, r"got shape \(3, 1\)"),
        ({"fill": torch.ones(3).to_sparse()}, TypeError, "dense tensor; got layout torch.sparse_coo"),
        ({"fill": "white"}, TypeError, "a sequence of C numbers, an array.*'white' of type str"),
        ({"fill": np.array("white")}, TypeError, "a sequence of C numbers, an array.*of type ndarray"),
        ({"fill": list(torch.ones(3))}, TypeError, "of type list"),
        ({"fill": np.complex64(1j)}, TypeError, "complex fill takes a complex input"),
        ({"fill": None}, TypeError, "got None"),
        ({"fill": 1j}, TypeError, "complex fill takes a complex input; got input of torch.float32"),
        ({"return_mask": 1}, TypeError, "return_mask must be True or False; got 1"),
    ],
)  # fmt: skip
def test_bad_input(options, error, says):
    with pytest.raises(error, match=says):
        tri_stn.warp(IMAGE, MAP, **options)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_a_fill_that_is_differentiated_or_mapped_says_so(backend):
    def run(fill):
        return tri_stn.warp(IMAGE, MAP, fill=fill)

    for transform in (lambda fill: grad(lambda f: run(f).sum())(fill), lambda fill: jvp(run, (fill,), (fill,))):
        with pytest.raises(ValueError, match="no derivative with respect to fill"):
            transform(torch.ones(3))
    with pytest.raises(ValueError, match="cannot map over fill"):
        vmap(run)(torch.ones(2, 3))
