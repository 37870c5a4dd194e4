"""Velocity fields: flows that are known, the usual torch code in fp64, derivatives and memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import tri_stn
from tri_stn.testing import Case, warp_truth

DOUBLE = torch.float64
SIZES = {1: (9,), 2: (7, 6), 3: (4, 5, 3)}
DIMS = pytest.mark.parametrize("dims", SIZES)
ALIGN_CORNERS = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
REFERENCE = pytest.mark.parametrize("backend", ["reference"], indirect=True)


def identity(size, align_corners):
    """Where the pixels are, (*size, d), normalised, x first, in fp64."""
    axes = [torch.arange(n, dtype=DOUBLE) * 2 / (n - 1) - 1 if align_corners else
            (torch.arange(n, dtype=DOUBLE) * 2 + 1) / n - 1 for n in size]  # fmt: skip
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)


def random_field(size, batch=(1,), dtype=DOUBLE, seed=4):
    """Normalised; up to half of the image's width, so that some of it looks outside."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*batch, *size, len(size), generator=generator, dtype=DOUBLE) - 0.5).to(dtype)


def scaling_and_squaring(field, steps, align_corners):
    """The truth: each step a `F.grid_sample` in fp64 (a line as an image of height one)."""
    size = tuple(field.shape[1:-1])
    case = Case(kind="displacement", input_size=size, size=size, padding_mode="border", align_corners=align_corners)
    moved = field.double() / 2**steps
    for _ in range(steps):
        moved = moved + warp_truth(case, moved.movedim(-1, 1), moved).movedim(1, -1)
    return moved


def per_unit(size, align_corners):
    return torch.tensor([(n - align_corners) / 2 for n in reversed(size)], dtype=DOUBLE)


@ALIGN_CORNERS
@DIMS
@REFERENCE
def test_a_linear_field_gives_the_matrix_exponential(backend, dims, align_corners):
    """Its trajectories point inwards at every side, so borders play no part, and linear reading is exact."""
    generator = torch.Generator().manual_seed(0)
    linear = 0.25 * (torch.rand(dims, dims, generator=generator, dtype=DOUBLE) * 2 - 1)
    linear = linear - 0.8 * torch.eye(dims, dtype=DOUBLE)
    places = identity(SIZES[dims], align_corners)
    field = (places @ linear.mT)[None]
    errors = []
    for steps in (0, 6, 7):
        moved = tri_stn.Velocity(field, steps, align_corners=align_corners).parameters[0]
        first = torch.eye(dims, dtype=DOUBLE) + linear / 2**steps
        powers = torch.linalg.matrix_power(first, 2**steps)
        torch.testing.assert_close(places + moved, places @ powers.mT, rtol=0, atol=1e-13)
        errors.append((places + moved - places @ torch.matrix_exp(linear).mT).abs().max())
    print(f"off exp by {errors}")
    # (I + A/m)^m is off exp(A) by at most |A|²/2m, as exp of a contraction is at most 1, and by half of it with 2m.
    norm = torch.linalg.matrix_norm(linear, float("inf"))
    assert errors[2] <= norm**2 / 2 / 2**7
    torch.testing.assert_close(errors[2] / errors[1], torch.tensor(0.5, dtype=DOUBLE), rtol=0.02, atol=0)


@ALIGN_CORNERS
@pytest.mark.parametrize("unit", ["normalized", "pixel"])
@DIMS
def test_matches_the_usual_torch_code_in_fp64(backend, dims, unit, align_corners):
    """The warped image, 1e-5 off at most for an image in [0, 1] in fp32."""
    size = {1: (9,), 2: (5, 4), 3: (3, 2, 4)}[dims]
    field = random_field(size, batch=(2,), dtype=torch.float32)
    image = torch.rand(2, 2, *size, generator=torch.Generator().manual_seed(1))
    truth = scaling_and_squaring(field, 4, align_corners)
    given = field if unit == "normalized" else (field * per_unit(size, align_corners)).float()
    transform = tri_stn.Velocity(given.to(backend), 4, unit, align_corners)
    actual = tri_stn.warp(image.to(backend), transform, align_corners=align_corners).cpu()
    case = Case(kind="displacement", input_size=size, size=size, align_corners=align_corners)
    torch.testing.assert_close(actual.double(), warp_truth(case, image, truth), rtol=0, atol=1e-5)


def test_several_maps_per_image(backend):
    field = random_field((4, 3), batch=(1, 2), dtype=torch.float32).to(backend)
    image = torch.rand(1, 1, 4, 3, device=backend)
    both = tri_stn.warp(image, tri_stn.Velocity(field, 2))
    for k in range(2):
        torch.testing.assert_close(both[:, k], tri_stn.warp(image, tri_stn.Velocity(field[:, k], 2)))


def bump(n, dims):
    """Smooth, up to 0.24 normalised, and nothing at the borders."""
    places = identity((n,) * dims, False)
    window = (1 - places**2).square().prod(-1, keepdim=True)
    return 0.3 * (window * torch.stack([(2 * places[..., i - 1] + i).cos() for i in range(dims)], -1))[None]


@pytest.mark.parametrize("dims,sizes", [(2, (32, 64, 128)), (3, (12, 24, 48))])
@REFERENCE
def test_there_and_back_is_close_to_the_identity(backend, dims, sizes):
    """exp(v) after exp(-v): little is left beside the way there, and less on finer fields.

    Each doubling that moves over more than a pixel adds an error of reading linearly, of the order of a pixel's square;
    those that move over less add ever less. As a finer field has more of the former, what is left falls
    by a little less than its square, but by more than the pixel itself.
    """
    left = []
    for n in sizes:
        there = tri_stn.Velocity(bump(n, dims), steps=16)  # so many that the first displacement's error is nothing
        back = there.inverse().parameters
        image = there.parameters.movedim(-1, 1)
        both = back + tri_stn.warp(image, tri_stn.Displacement(back), padding_mode="border").movedim(1, -1)
        left.append(both.abs().max().item())
        assert (there.inverse().inverse().parameters == there.parameters).all()
    moved = there.parameters.abs().max().item()
    pixels = [x * n / 2 for x, n in zip(left, sizes, strict=True)]
    print(f"moved by {moved:.3f}; off the identity by {left}, in pixels {pixels}")
    assert left[0] < moved / 15  # on 12³ voxels 0.08 of one, of a way of 1.75
    for coarse, fine in itertools.pairwise(left):
        assert coarse / fine > 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@REFERENCE
def test_fields_in_16_bits_are_integrated_in_fp32(backend, dtype):
    field = random_field((7, 6), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual = tri_stn.Velocity(field).parameters
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, scaling_and_squaring(field, 7, False).float(), rtol=0, atol=1e-5)


@ALIGN_CORNERS
@DIMS
@REFERENCE
def test_gradients(backend, dims, align_corners):
    """First and second order and forward mode, through the warp of an image."""
    size = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}[dims]
    field = random_field(size).requires_grad_()
    image = torch.rand(1, 1, *size, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def run(image, field):
        return tri_stn.warp(image, tri_stn.Velocity(field, 2, align_corners=align_corners), align_corners=align_corners)

    assert gradcheck(run, (image, field), check_forward_ad=True, fast_mode=dims == 3)
    assert gradgradcheck(run, (image, field), fast_mode=True)


def test_kernels_have_the_references_gradient(backend):
    field = random_field((4, 3), dtype=torch.float32)
    weight = torch.rand(1, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    given, exact = field.to(backend).requires_grad_(), field.double().requires_grad_()
    (actual,) = torch.autograd.grad(tri_stn.Velocity(given, 3).parameters, given, weight.to(backend))
    (truth,) = torch.autograd.grad(scaling_and_squaring(exact, 3, False), exact, weight.double())
    torch.testing.assert_close(actual.cpu().double(), truth, rtol=0, atol=1e-5 * truth.abs().max().item())


def saved_bytes(run):
    """What autograd keeps for the backward pass, each piece of memory once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("layout", ["components_last", "planes"])
@REFERENCE
def test_autograd_keeps_one_field_per_step(backend, dims, layout):
    """No grids: half of what the leanest torch code keeps, which is VoxelMorph's 42 volumes for 7 steps in 3-D."""
    size, steps = (12, 10, 11)[:dims], 7
    field = random_field(size, dtype=torch.float32)
    if layout == "planes":  # as a network gives it
        field = field.movedim(-1, 1).contiguous().movedim(1, -1)
    field.requires_grad_()
    image = torch.rand(1, 1, *size)
    ours = saved_bytes(lambda: tri_stn.Velocity(field, steps).parameters)
    assert ours == steps * field.nbytes
    warped = saved_bytes(lambda: tri_stn.warp(image, tri_stn.Velocity(field, steps)))
    assert warped == (steps + 1) * field.nbytes + image.nbytes  # and the map itself, and the image that it reads

    def usual():
        places = identity(size, False).float()
        moved = field / 2**steps
        for _ in range(steps):
            image = moved.movedim(-1, 1)
            moved = moved + F.grid_sample(image, places + moved, "bilinear", "border", False).movedim(1, -1)
        return moved

    torch.testing.assert_close(usual(), tri_stn.Velocity(field, steps).parameters, rtol=0, atol=1e-5)
    theirs = saved_bytes(usual)
    print(f"kept, in fields: {ours / field.nbytes:g}; by torch code {theirs / field.nbytes:g}")
    assert theirs >= 2 * ours


@pytest.mark.parametrize(
    "use",
    [
        lambda flow: tri_stn.warp(torch.rand(1, 1, 4, 4), flow),
        lambda flow: tri_stn.warp(torch.rand(1, 1, 4, 4, dtype=torch.complex64), flow, return_mask=True),
        lambda flow: tri_stn.splat(torch.rand(1, 1, 4, 4, dtype=torch.complex64), flow, (5, 5), normalize=True),
        lambda flow: tri_stn.warp(torch.rand(1, 1, 4, 4), tri_stn.Compose(tri_stn.Affine(torch.eye(2, 3)[None]), flow)),
    ],
    ids=["plain", "complex", "splat", "chain"],
)
@REFERENCE
def test_integrates_once_a_call_and_when_asked(backend, use, monkeypatch):
    calls = []
    monkeypatch.setattr(tri_stn.diffeomorphic, "warp", lambda *a, **k: calls.append(1) or tri_stn.warp(*a, **k))
    flow = tri_stn.Velocity(torch.zeros(1, 4, 4, 2), 3)
    assert (flow.batch, flow.size, flow.dims, flow.inverse().steps) == ((1,), (4, 4), 2, 3)
    assert not calls
    use(flow)
    assert len(calls) == 3


@REFERENCE
def test_compiles_to_one_graph(backend):
    def run(image, field):
        return tri_stn.warp(image, tri_stn.Velocity(field, 2))

    image, field = torch.rand(1, 1, 5, 4), random_field((5, 4), dtype=torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image, field), run(image, field))


@REFERENCE
@pytest.mark.parametrize("make", [tri_stn.Velocity, lambda field: tri_stn.Displacement(field).inverse()])
def test_a_field_without_pixels_makes_an_output_without(backend, make):
    """As a grid and a displacement do."""
    field = torch.zeros(2, 0, 4, 2, requires_grad=True)
    output = tri_stn.warp(torch.rand(2, 3, 5, 6), make(field))
    assert output.shape == (2, 3, 0, 4) and torch.autograd.grad(output.sum(), field)[0].shape == field.shape


FIELD = torch.zeros(1, 3, 4, 2)


@pytest.mark.parametrize(
    "call,error,says",
    [
        (lambda: tri_stn.Velocity(FIELD[0]), ValueError, r"Velocity takes field of shape .*got \(3, 4, 2\)"),
        (lambda: tri_stn.Velocity(FIELD.long()), TypeError, "Velocity takes field in a floating-point dtype"),
        (lambda: tri_stn.Velocity(FIELD, -1), ValueError, "steps must not be negative; got -1"),
        (lambda: tri_stn.Velocity(FIELD, 2000), ValueError, "steps must be at most 100.*got 2000"),
        (lambda: tri_stn.Velocity(FIELD, True), TypeError, "steps must be an integer; got True"),
        (lambda: tri_stn.Velocity(FIELD, unit="voxel"), ValueError, "Velocity takes unit .*got 'voxel'"),
        (lambda: tri_stn.Velocity(FIELD, align_corners=None), TypeError, "must be True or False; got None"),
        (
            lambda: tri_stn.warp(torch.zeros(1, 1, 3, 4), tri_stn.Velocity(FIELD), align_corners=True),
            ValueError,
            "This Velocity was made for align_corners=False; got align_corners=True",
        ),
        (
            lambda: tri_stn.splat(torch.zeros(1, 1, 3, 4), tri_stn.Velocity(FIELD), (3, 4), align_corners=True),
            ValueError,
            "This Velocity was made for align_corners=False; got align_corners=True",
        ),
    ],
)
def test_what_does_not_fit(call, error, says):
    with pytest.raises(error, match=says):
        call()
