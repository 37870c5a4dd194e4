"""warp against torch in fp64: values, both gradients, layouts, dtypes, batches and edge cases."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tri_stn
from tri_stn.testing import ARRANGEMENTS, Case, assert_accurate, near_discontinuity, warp_truth

MODES = ("bilinear", "nearest", "bicubic")
PADDING_MODES = ("zeros", "border", "reflection")
OPTIONS = [
    pytest.param({"mode": m, "padding_mode": p, "align_corners": a}, id=f"{m}-{p}-{'corners' if a else 'edges'}")
    for m, p, a in itertools.product(MODES, PADDING_MODES, (False, True))
]
DEGENERATE = {
    "zero": ((0.0, 0.0, 0.1), (0.0, 0.0, -0.2)),
    "rank_1": ((1.0, 0.7, 0.05), (0.9, 0.63, 0.03)),
    "constant_x": ((0.0, 0.0, 0.11), (0.3, 1.0, 0.02)),
    "scale_1e-3": ((1e-3, 0.0, 0.03), (0.0, 1e-3, 0.07)),
    "scale_1e3": ((1e3, 11.0, 0.3), (-7.0, 1e3, 0.7)),
    "quarter_turn": ((0.0, 1.03, 0.01), (-0.98, 0.0, 0.02)),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Walks of 32 lanes, so that a small output has more rows than a tile has lanes."""
    tiling = pytest.importorskip("tri_stn.kernels.tiling")
    monkeypatch.setattr(
        tiling, "walk_tile", lambda *_, **__: tiling.Tile((8, 4), 1, 2, 2, num_warps=1, max_registers=255)
    )


def check(case: Case, device: str) -> None:
    """warp and both its gradients equal the truth, outside the band of discontinuities."""
    print(case)
    compare(case, *case.tensors(device))


def compare(case: Case, image: Tensor, parameters: Tensor, grad: Tensor) -> None:
    """The same for these very tensors, whatever the case would draw."""
    channel = -1 - len(case.size)
    band = near_discontinuity(case, parameters).unsqueeze(channel)
    grad = torch.where(band, 0, grad)

    image, parameters = image.detach().requires_grad_(), parameters.detach().requires_grad_()
    output = tri_stn.warp(image, case.transform(parameters), case.size, **case.options)
    assert output.dtype == image.dtype and output.shape == grad.shape
    grad_image, grad_parameters = torch.autograd.grad(output, (image, parameters), grad)

    exact = image.detach().double().requires_grad_(), parameters.detach().double().requires_grad_()
    truth = warp_truth(case, *exact)
    truth_image, truth_parameters = torch.autograd.grad(truth, exact, grad.double(), retain_graph=True)
    (magnitude,) = torch.autograd.grad(truth, exact[0], grad.double().abs())
    if case.mode == "bicubic":  # weights of both signs: what cancels in this sum had rounded all the same
        magnitude = magnitude.abs() + 4

    strict = ~(band & (case.mode == "nearest"))
    for what, actual, expected, size in (
        ("output", torch.where(strict, output, 0), torch.where(strict, truth, 0), 1.0 + 2 * (case.mode == "bicubic")),
        ("grad_input", grad_image, truth_image, magnitude),
        ("grad of the transform", grad_parameters, truth_parameters, truth_parameters.abs().amax()),
    ):
        assert_accurate(actual, expected, image_dtype=case.dtype, magnitude=size, what=what)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last"])
def test_matches_torch(backend, options, arrangement):
    check(Case(**options, arrangement=arrangement), backend)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["grid", "displacement"])
def test_dense_maps_match_torch(backend, kind, options):
    check(Case(**options, kind=kind, size=(6, 7), input_size=(9, 5)), backend)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "edges" in o.id])
@pytest.mark.parametrize("kind", ["affine", "grid"])
def test_lines_match_torch(backend, kind, options):
    check(Case(**options, kind=kind, size=(13,), input_size=(9,)), backend)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "corners" in o.id])
@pytest.mark.parametrize("kind", ["affine", "displacement"])
def test_volumes_match_torch(backend, kind, options):
    case = Case(**options, kind=kind, size=(3, 4, 5), input_size=(4, 3, 6))
    if options["mode"] == "bicubic":
        case = case.with_(size=(2, 2, 3), input_size=(3, 2, 4))
    check(case.with_(arrangement="channels_last" if kind == "affine" else "contiguous"), backend)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("theta_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_pair_of_dtypes(backend, dtype, theta_dtype, padding_mode):
    if padding_mode != "border" and theta_dtype not in (torch.float32, dtype):
        pytest.skip("every pair of dtypes meets every line of code under border")
    check(Case(images=1, size=(6, 7), dtype=dtype, theta_dtype=theta_dtype, padding_mode=padding_mode), backend)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("images,maps", [(2, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("kind", ["affine", "grid"])
def test_several_maps_per_image(backend, kind, images, maps, padding_mode):
    check(Case(kind=kind, images=images, maps=maps, size=(5, 7), padding_mode=padding_mode), backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize("theta", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_maps(backend, theta, mode, padding_mode, small_tiles):
    """Right and in finite time; tall enough that the walk's lanes share out one pixel's rows."""
    case = Case(images=1, channels=2, input_size=(6, 5), size=(36, 2), mode=mode, padding_mode=padding_mode)
    check(case.with_(theta=theta), backend)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 2.0**31])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_coordinates_that_are_nowhere(backend, value, mode, padding_mode):
    """Zeros padding reads nothing; the other modes read some pixel of the image. Nothing is NaN."""
    image = torch.rand(1, 2, 5, 6, device=backend) + 1
    image.requires_grad_()
    theta = torch.eye(2, 3, device=backend)[None].clone()
    theta[0, 0, 2] = value
    theta.requires_grad_()
    output = tri_stn.warp(image, tri_stn.Affine(theta), mode=mode, padding_mode=padding_mode)
    grad_image, grad_theta = torch.autograd.grad(output.sum(), (image, theta))
    if padding_mode == "zeros":
        assert (output == 0).all() and (grad_image == 0).all() and (grad_theta == 0).all()
    else:
        assert output.min() >= 1 and output.max() <= 2
        torch.testing.assert_close(grad_image.sum(), torch.tensor(float(output.numel()), device=backend))
        if (mode, padding_mode) == ("bicubic", "reflection"):  # folded somewhere, with the slope found there
            assert grad_theta.isfinite().all()
        else:
            assert (grad_theta[0, 0] == 0).all()


def test_not_a_number_everywhere(backend, small_tiles):
    theta = torch.full((1, 2, 3), float("nan"), device=backend)
    image = torch.rand(1, 2, 5, 6, device=backend, requires_grad=True)
    output = tri_stn.warp(image, tri_stn.Affine(theta), (40, 4))
    (grad,) = torch.autograd.grad(output.sum(), image)
    assert (output == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(2, 47), (41, 2), (7, 10)])
def test_identity_is_exact(backend, mode, align_corners, size):
    # 41 and 47: a reciprocal of these sizes, multiplied by them, would not be 1.
    image = torch.randn(1, 1, *size, device=backend).bfloat16().requires_grad_()
    theta = torch.eye(2, 3, device=backend)[None]
    output = tri_stn.warp(image, tri_stn.Affine(theta), mode=mode, align_corners=align_corners)
    grad = torch.randn_like(output)
    (grad_image,) = torch.autograd.grad(output, image, grad)
    assert torch.equal(output, image) and torch.equal(grad_image, grad)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("mode", MODES)
def test_ties_follow_torch(backend, mode, padding_mode):
    """Samples exactly on pixels, half pixels and edges, where only the convention decides; in fp64, no band."""
    image = torch.rand(4, 1, 5, 5, device=backend, dtype=torch.float64, requires_grad=True)
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": True}
    theta = torch.zeros(4, 2, 3, device=backend, dtype=torch.float64)
    for i, (scale, shift) in enumerate(zip((1.0, -1.0, 2.0, 0.5), (0.0, 0.25, 0.25, 0.0), strict=True)):
        theta[i, 0, 0] = theta[i, 1, 1] = scale
        theta[i, 0, 2], theta[i, 1, 2] = shift, -2 * shift
    theta.requires_grad_()
    output = tri_stn.warp(image, tri_stn.Affine(theta), (5, 9), **options)
    expected = F.grid_sample(image, F.affine_grid(theta, [4, 1, 5, 9], align_corners=True), **options)
    torch.testing.assert_close(output, expected)
    grad = torch.rand_like(output)
    for got, want in zip(
        torch.autograd.grad(output, (image, theta), grad),
        torch.autograd.grad(expected, (image, theta), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_pixel_that_nobody_reads_spoils_nothing(backend, value):
    image = torch.rand(1, 1, 8, 8, device=backend)
    image[0, 0, 0, 0] = value
    theta = torch.tensor([[[0.5, 0.0, 0.03], [0.0, 0.5, 0.02]]], device=backend)
    inputs = image.requires_grad_(), theta.requires_grad_()
    output = tri_stn.warp(image, tri_stn.Affine(theta))
    for tensor in (output, *torch.autograd.grad(output.sum(), inputs)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_in_16_bits_is_never_above_that_of_torch(backend, dtype):
    case = Case(images=1, input_size=(20, 30), size=(20, 30), dtype=dtype, theta_dtype=dtype)
    image, theta, grad = case.tensors(backend)

    def errors(sample):
        inputs = image.detach().requires_grad_(), theta.detach().requires_grad_()
        output = sample(*inputs)
        results = (output, *torch.autograd.grad(output, inputs, grad))
        return [float((r.detach() - t).abs().max()) for r, t in zip(results, truths, strict=True)]

    exact = image.double().requires_grad_(), theta.double().requires_grad_()
    truth = warp_truth(case, *exact)
    truths = (truth.detach(), *torch.autograd.grad(truth, exact, grad.double()))
    ours = errors(lambda x, t: tri_stn.warp(x, tri_stn.Affine(t), case.size))
    theirs = errors(lambda x, t: F.grid_sample(x, F.affine_grid(t, grad.shape, False), align_corners=False))
    assert all(a <= b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_slope_at_a_pixel_is_the_one_to_its_right(backend):
    """At the identity every sample lies on a pixel: ATen's sub-gradient is v[x + 1] - v[x]."""
    image = torch.rand(1, 1, 4, 5, device=backend, dtype=torch.float64)
    theta = torch.eye(2, 3, device=backend, dtype=torch.float64)[None].requires_grad_()
    output = tri_stn.warp(image, tri_stn.Affine(theta))
    (grad,) = torch.autograd.grad(output.sum(), theta)
    right = (F.pad(image, (0, 1))[..., 1:] - image).sum() * 5 / 2
    below = (F.pad(image, (0, 0, 0, 1))[..., 1:, :] - image).sum() * 4 / 2
    torch.testing.assert_close(grad[0, :, 2], torch.stack([right, below]))


def test_a_rounded_distance_adds_no_pixel(backend):
    """A hair left of pixel 0, the distance to pixel 1 rounds to one; the sample reads -1 and 0 all the same."""
    image = torch.tensor([[[[3.0, 5.0]]]], device=backend, requires_grad=True)
    theta = torch.eye(2, 3, device=backend)[None].clone()
    theta[0, 0, 2] = -(2.0**-23)  # half a pixel per unit, so pixel 0 looks at -2 ** -24
    theta.requires_grad_()
    output = tri_stn.warp(image, tri_stn.Affine(theta), align_corners=True)
    weights = torch.tensor([[[[1.0, 0.0]]]], device=backend)
    grad_image, grad = torch.autograd.grad(output, (image, theta), weights)
    assert 0 < 1 - grad_image[0, 0, 0, 0] < 1e-6, "a hair left"
    assert grad[0, 0, 2] == 1.5  # (pixel 0 minus nothing) per pixel, half a pixel per unit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("theta_dtype", [torch.bfloat16, torch.float32])
def test_backward_reads_the_pixels_that_the_forward_read(backend, dtype, theta_dtype):
    """Each pixel's gradient counts its reads; the forward names the pixel that each output read."""
    width = 200  # pixel numbers stay exact in bf16
    theta = torch.tensor([[[0.93, 0.0, 0.031], [0.0, 1.0, 0.0]]], device=backend, dtype=theta_dtype)
    numbers = torch.arange(width, device=backend, dtype=dtype).expand(1, 1, 1, width).clone().requires_grad_()
    output = tri_stn.warp(numbers, tri_stn.Affine(theta), mode="nearest", padding_mode="border")
    (reads,) = torch.autograd.grad(output.sum(), numbers)
    assert torch.equal(output.flatten().long().bincount(minlength=width), reads.flatten().long())


@pytest.mark.parametrize("padding_mode", ["zeros", "reflection"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_any_strides(backend, arrangement, padding_mode):
    check(Case(size=(5, 6), arrangement=arrangement, padding_mode=padding_mode), backend)


@pytest.mark.parametrize("channels", [2, 40])
def test_channels_last_is_kept(backend, channels):
    case = Case(channels=channels, arrangement="channels_last", size=(5, 6))
    image, theta, grad = case.tensors(backend)
    image.requires_grad_()
    output = tri_stn.warp(image, tri_stn.Affine(theta), case.size)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.backward(grad)
    assert image.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "case",
    [
        Case(input_size=(1, 1), size=(3, 2), align_corners=True),
        Case(input_size=(1, 7), size=(1, 1), padding_mode="border"),
        Case(input_size=(1, 1), size=(3, 2), padding_mode="reflection", align_corners=True),
        Case(input_size=(1, 5), size=(3, 2), padding_mode="reflection"),
        Case(channels=1, input_size=(3, 17), size=(19, 1)),
        Case(channels=19, input_size=(3, 4), size=(2, 5)),
        Case(images=1, channels=1, input_size=(11, 33), size=(18, 35)),
    ],
    ids=str,
)
def test_odd_sizes(backend, case):
    check(case, backend)


@pytest.mark.parametrize("shape,size", [((0, 3, 4, 5), (2, 2)), ((2, 0, 4, 5), (2, 2)), ((2, 3, 4, 5), (0, 2))])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_empty(backend, shape, size, padding_mode):
    image = torch.rand(shape, device=backend, requires_grad=True)
    theta = torch.rand(shape[0], 2, 3, device=backend, requires_grad=True)
    output = tri_stn.warp(image, tri_stn.Affine(theta), size, padding_mode=padding_mode)
    assert output.shape == (*shape[:2], *size)
    for grad in torch.autograd.grad(output.sum(), (image, theta)):
        assert (grad == 0).all()


def test_one_image_many_maps_equals_repeated_images(backend):
    case = Case(images=1, maps=4, size=(5, 6))
    image, theta, grad = case.tensors(backend)
    image.requires_grad_()
    output = tri_stn.warp(image, tri_stn.Affine(theta[0]), case.size)
    assert output.shape == (4, *grad.shape[2:])
    repeated = image.detach().repeat(4, 1, 1, 1).requires_grad_()
    expected = tri_stn.warp(repeated, tri_stn.Affine(theta[0]), case.size)
    torch.testing.assert_close(output, expected)
    (actual,) = torch.autograd.grad(output, image, grad[0])
    (separate,) = torch.autograd.grad(expected, repeated, grad[0])
    torch.testing.assert_close(actual, separate.sum(0, keepdim=True))


def test_one_map_serves_every_image(backend):
    image, theta, _ = Case(images=3).tensors(backend)
    theta = theta[:1].requires_grad_()
    output = tri_stn.warp(image, tri_stn.Affine(theta))
    expected = tri_stn.warp(image, tri_stn.Affine(theta.expand(3, 2, 3)))
    assert torch.equal(output, expected)
    assert torch.autograd.grad(output.sum(), theta)[0].shape == theta.shape


@pytest.mark.parametrize("options", [o for o in OPTIONS if "edges" in o.id])
@pytest.mark.parametrize("wanted", ["input", "theta"])
def test_one_gradient_alone_equals_the_same_of_both(backend, options, wanted):
    case = Case(**options, images=1, size=(5, 6))
    image, theta, grad = case.tensors(backend)
    both = image.clone().requires_grad_(), theta.clone().requires_grad_()
    expected = torch.autograd.grad(
        tri_stn.warp(both[0], tri_stn.Affine(both[1]), case.size, **case.options), both, grad
    )
    index = ["input", "theta"].index(wanted)
    alone = [image.clone(), theta.clone()]
    alone[index].requires_grad_()
    output = tri_stn.warp(alone[0], tri_stn.Affine(alone[1]), case.size, **case.options)
    (actual,) = torch.autograd.grad(output, alone[index], grad)
    torch.testing.assert_close(actual, expected[index], rtol=1e-4, atol=1e-4)


def test_input_is_not_kept_where_only_its_gradient_is_asked_for(backend):
    image, theta, _ = Case().tensors(backend)
    output = tri_stn.warp(image.requires_grad_(), tri_stn.Affine(theta))
    assert sum(t is not None and t.numel() > theta.numel() for t in output.grad_fn.saved_tensors) == 0


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("maps", [None, 2])
def test_gradcheck(backend, padding_mode, maps):
    """In fp64. The fast mode probes a random direction, which the interpreter can afford."""
    case = Case(images=1, maps=maps, channels=2, input_size=(4, 3), size=(3, 4), dtype=torch.float64)
    image, theta, _ = case.with_(theta_dtype=torch.float64, padding_mode=padding_mode).tensors(backend)

    def run(image, theta):
        return tri_stn.warp(image, tri_stn.Affine(theta), case.size, padding_mode=padding_mode)

    interpreted = "TRITON_INTERPRET" in os.environ
    assert torch.autograd.gradcheck(run, (image.requires_grad_(), theta.requires_grad_()), fast_mode=interpreted)


def test_large_output_in_bounded_memory(monkeypatch):
    """The reference goes through an output in chunks, and the chunks fit together."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tri_stn.reference, "CHUNK_ELEMENTS", 100)
    check(Case(size=(23, 17)), "cpu")


def test_new_memory_is_poisoned(backend):
    """The other tests find unwritten elements by this."""
    assert torch.rand(1, device=backend).new_empty(1000).isnan().all()
