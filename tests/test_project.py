"""Volumes reduced along their depth as they are sampled: warp(…, project=…), against the same in two steps."""

import os

import pytest
import torch
from conftest import DEVICE
from test_antialias import truth
from test_derivatives import looped
from test_operators import Allocations, silence
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import tri_stn
from tri_stn.testing import Case, assert_accurate, warp_truth

PROJECTIONS = {"sum": lambda v: v.sum(-3), "mean": lambda v: v.mean(-3), "max": lambda v: v.amax(-3)}
DOUBLE = {"dtype": torch.float64, "theta_dtype": torch.float64}
VOLUME = Case(input_size=(4, 5, 3), size=(3, 2, 4), **DOUBLE)


def check(case, project, device):
    """Values and both gradients; in fp64, where random places come near no discontinuity."""
    print(case)
    image, theta, _ = case.tensors(device)
    given = image.detach().requires_grad_(), theta.requires_grad_()
    output = tri_stn.warp(given[0], case.transform(given[1]), case.size, project=project, **case.options)
    exact = image.detach().cpu().double().requires_grad_(), theta.detach().cpu().double().requires_grad_()
    wanted = PROJECTIONS[project](warp_truth(case, *exact))
    assert output.shape == wanted.shape and output.dtype == case.dtype
    g = torch.rand(output.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    got = output, *torch.autograd.grad(output, given, g.to(device))
    want = wanted, *torch.autograd.grad(wanted, exact, g.double())
    for what, a, b in zip(("output", "grad_input", "grad of the map"), got, want, strict=True):
        assert_accurate(a.cpu(), b, image_dtype=case.dtype, magnitude=b.abs().amax().clamp(min=1), what=what)
    return output


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode,align_corners", [("bilinear", False), ("bilinear", True), ("nearest", False)])
def test_is_the_reduction_of_the_volume(backend, mode, padding_mode, align_corners, project):
    check(VOLUME.with_(mode=mode, padding_mode=padding_mode, align_corners=align_corners), project, backend)


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {"images": 2, "maps": 2},
        {"kind": "projective", "padding_mode": "border"},
        {"size": (1, 3, 2)},
        {"size": (2, 1, 2), "input_size": (3, 2, 4), "mode": "bicubic", "channels": 1},
    ],
    ids=["maps", "projective", "one_layer", "bicubic"],
)
def test_maps_kinds_and_shapes(backend, changes, project):
    check(VOLUME.with_(**changes), project, backend)


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_channels_last(backend, dtype, project):
    """Summed in fp32 and rounded once; of 4 layers, so that the mean's gradient rounds as the sum's."""
    case = Case(input_size=(4, 5, 3), size=(4, 2, 3), channels=9, dtype=dtype, arrangement="channels_last")
    output = check(case, project, backend)
    assert project == "max" or output.is_contiguous(memory_format=torch.channels_last)


def test_the_first_of_equals_is_the_largest(backend):
    image = torch.tensor([1.0, 3.0, 3.0, 2.0], device=backend).view(1, 1, 4, 1, 1)
    theta = torch.eye(3, 4, device=backend)[None, None]
    options = "affine", "bilinear", "zeros", False, 1
    assert torch.ops.tri_stn.warp_argmax(image, theta, (4, 1, 1), *options).tolist() == [[[[1]]]]
    nothing = torch.full_like(image, float("nan"))
    assert torch.ops.tri_stn.warp_argmax(nothing, theta, (4, 1, 1), *options).tolist() == [[[[0]]]]


@pytest.mark.parametrize("project", ["sum", "mean"])
def test_with_several_samples_per_place(backend, project):
    case = VOLUME.with_(size=(2, 1, 2), channels=1)
    image, theta, _ = case.tensors(backend)
    output = tri_stn.warp(image, tri_stn.Affine(theta), case.size, supersample=2, project=project)
    expected = PROJECTIONS[project](truth(image.cpu(), theta.cpu(), case.size, 2))
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-10, atol=1e-10)


def test_fill_counts_in_every_layer(backend):
    image, theta, _ = VOLUME.tensors(backend)
    transform, fill = tri_stn.Affine(theta), torch.tensor([0.5, -2.0], device=backend, dtype=torch.float64)
    output = tri_stn.warp(image, transform, VOLUME.size, fill=fill, project="sum")
    expected = tri_stn.warp(image, transform, VOLUME.size, fill=fill).sum(2)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("kind", ["affine", "projective"])
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_gradcheck(backend, kind, project):
    """First and second order, reverse and forward mode: against differences in fp64."""
    case = Case(kind=kind, channels=2, maps=2, input_size=(3, 2, 3), size=(2, 1, 2), padding_mode="border", **DOUBLE)
    image, theta, _ = case.tensors(backend)
    inputs = image.requires_grad_(), theta.requires_grad_()

    def sample(image, theta):
        return tri_stn.warp(image, case.transform(theta), case.size, padding_mode="border", project=project)

    assert gradcheck(sample, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(sample, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("project", ["sum", "mean"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
def test_kernels_change_as_the_reference_does(backend, monkeypatch, padding_mode, project):
    case = VOLUME.with_(padding_mode=padding_mode)
    image, theta, _ = case.tensors()
    changes = torch.rand_like(image), torch.rand_like(theta)

    def run(device):
        x, t, dx, dt = (
            tensor.to(device) for tensor in (image, theta.unsqueeze(1), changes[0], changes[1].unsqueeze(1))
        )
        options = case.size, project, False, "affine", "bilinear", padding_mode, False, 1
        forward = torch.ops.tri_stn.warp_forward
        return [forward(x, t, None, None, tangent, dt, *options)[0] for tangent in (dx, None)]

    actual = run(backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for got, want in zip(actual, run("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_function_transforms_and_compile(backend, project):
    case = VOLUME.with_(images=3)
    image, theta, _ = case.tensors(backend)

    def sampled(x, t):
        return tri_stn.warp(x[None], tri_stn.Affine(t[None]), case.size, project=project)[0]

    expected = tri_stn.warp(image, tri_stn.Affine(theta), case.size, project=project)
    torch.testing.assert_close(vmap(sampled)(image, theta), expected)
    each = vmap(grad(lambda x, t: sampled(x, t).square().sum(), (0, 1)))(image, theta)
    given = image.clone().requires_grad_(), theta.clone().requires_grad_()
    whole = tri_stn.warp(given[0], tri_stn.Affine(given[1]), case.size, project=project)
    for got, want in zip(each, torch.autograd.grad(whole.square().sum(), given, retain_graph=True), strict=True):
        torch.testing.assert_close(got, want)
    _, change = jvp(sampled, (image[0], theta[0]), (image[1], theta[1]))
    # The change is linear in its direction: two reverse passes give it too.
    g = torch.rand_like(change)
    gradients = torch.autograd.grad(whole[0], given, g)
    torch.testing.assert_close(
        (change * g).sum(), (gradients[0][0] * image[1]).sum() + (gradients[1][0] * theta[1]).sum()
    )
    torch._dynamo.reset()
    compiled = torch.compile(sampled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image[0].clone(), theta[0].clone()), expected[0])


@pytest.mark.parametrize("project,calls", [("mean", 2), ("max", 2), ("max", 3)])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0)])
def test_vmap_over_one_of_both(backend, in_dims, calls, project):
    """Two images at a time; values and gradients are those of a loop."""
    image, theta, _ = Case(input_size=(3, 2, 3), size=(2, 1, 2), images=2 * calls, channels=1, **DOUBLE).tensors(
        backend
    )
    mapped = [
        t.unflatten(0, (calls, 2)) if d is not None else t[:2] for t, d in zip((image, theta), in_dims, strict=True)
    ]

    def call(x, t):
        return tri_stn.warp(x, tri_stn.Affine(t), (2, 1, 2), project=project)

    expected = looped(call, in_dims, calls)
    torch.testing.assert_close(vmap(call, in_dims)(*mapped), expected(*mapped))
    if "TRITON_INTERPRET" not in os.environ:  # slow, and the kernels' own no otherwise
        gradients = [grad(lambda x, t, f=f: f(x, t).square().sum(), (0, 1)) for f in (vmap(call, in_dims), expected)]
        torch.testing.assert_close(*(of(*mapped) for of in gradients))


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize(
    "shape,maps,size",
    [((0, 2), (0,), (2, 2, 2)), ((2, 0), (2,), (2, 2, 2)), ((2, 2), (2,), (2, 0, 2)), ((2, 2), (2, 0), (2, 2, 2))],
)
def test_empty(backend, shape, maps, size, project):
    image = torch.rand(*shape, 3, 4, 5, device=backend, requires_grad=True)
    theta = torch.rand(*maps, 3, 4, device=backend, requires_grad=True)
    output = tri_stn.warp(image, tri_stn.Affine(theta), size, project=project)
    assert output.shape == (shape[0], *maps[1:], shape[1], *size[1:])
    for gradient in torch.autograd.grad(output.sum(), (image, theta)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("project", PROJECTIONS)
def test_the_sampled_volume_is_never_stored(project, monkeypatch):
    """Forward and backward, nothing has as many elements as a volume of the output's depth."""
    silence(monkeypatch)
    depth, height, width = 2048, 64, 64
    image = torch.zeros(1, 2, 8, 16, 16, device=DEVICE, requires_grad=True)
    theta = torch.eye(3, 4, device=DEVICE)[None].requires_grad_()
    with Allocations() as log:
        output = tri_stn.warp(
            image, tri_stn.Affine(theta), (depth, height, width), project=project, padding_mode="border"
        )
        output.sum().backward()
    assert output.shape == (1, 2, height, width)
    largest = max(t.untyped_storage().nbytes() for t in log.tensors)
    # The partial sums of theta's gradient; for "max" 3 numbers per element, and what torch takes to make them.
    assert largest <= 2**20 + 2**12 < depth * height * width * output.element_size() / 8


@pytest.mark.parametrize(
    "message,size,changes",
    [
        ("must be one of 'sum'", (2, 2, 2), {"project": "median"}),
        ("at least 1", (0, 2, 2), {"project": "sum"}),
        ("has no mask", (2, 2, 2), {"project": "sum", "return_mask": True}),
        ("one sample per place", (2, 2, 2), {"project": "max", "supersample": 2}),
        ("one sample per place", (2, 2, 2), {"project": "max", "antialias": True}),
        ("one sample per place", (2, 2, 2), {"project": "max", "fill": 1.0}),
    ],
)
def test_bad_choices(message, size, changes):
    with pytest.raises(ValueError, match=message):
        tri_stn.warp(torch.rand(1, 1, 3, 3, 3), tri_stn.Affine(torch.eye(3, 4)[None]), size, **changes)


@pytest.mark.parametrize("project", PROJECTIONS)
def test_takes_volumes_and_maps_of_few_numbers(project):
    for image, transform in (
        (torch.rand(1, 1, 3, 3), tri_stn.Affine(torch.eye(2, 3)[None])),
        (torch.rand(1, 1, 3, 3, 3), tri_stn.Grid(torch.rand(1, 2, 2, 2, 3))),
    ):
        with pytest.raises(ValueError, match="takes a volume and an affine or projective map"):
            tri_stn.warp(image, transform, project=project)


def test_complex_volumes(backend):
    image = torch.complex(*(VOLUME.with_(seed=s).tensors(backend)[0] for s in (0, 1)))
    theta = VOLUME.tensors(backend)[1]
    output = tri_stn.warp(image, tri_stn.Affine(theta), VOLUME.size, project="mean")
    for part in ("real", "imag"):
        expected = tri_stn.warp(getattr(image, part).clone(), tri_stn.Affine(theta), VOLUME.size, project="mean")
        torch.testing.assert_close(getattr(output, part), expected)
    with pytest.raises(ValueError, match="no order"):
        tri_stn.warp(image, tri_stn.Affine(theta), VOLUME.size, project="max")
