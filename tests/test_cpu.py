"""The CPU's fast road, torch's own sampler: right by the same tests as the others, in parts too, and where it is taken.

Elsewhere the backend "reference" is the reference alone. Here `backend` is the CPU as users have it, and the tests that
are imported run on it once more: fp64 truth, ties, coordinates that are nowhere, memory orders.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from test_swap_in import (  # noqa: F401
    test_any_order_of_a_volumes_dimensions_in_memory,
    test_any_order_of_dimensions_in_memory,
    test_coordinates_that_are_nowhere_in_volumes,
    test_edges_of_five_pixels,
    test_expanded_tensors,
    test_identity_grids_have_torchs_slopes,
    test_nearest_has_a_grid_gradient_of_zeros,
    test_nearest_rounds_half_to_even,
    test_nothing_to_do,
    test_one_gradient_alone,
    test_the_corners_of_the_grid_are_the_corners_of_the_image,
    test_ties_in_volumes,
    test_ties_on_pixels_borders_and_corners,
)
from test_swap_in import test_coordinates_that_are_nowhere as test_grids_that_are_nowhere  # noqa: F401
from test_warp import (  # noqa: F401
    OPTIONS,
    compare,
    small_tiles,
    test_a_pixel_that_nobody_reads_spoils_nothing,
    test_a_rounded_distance_adds_no_pixel,
    test_any_pair_of_dtypes,
    test_any_strides,
    test_backward_reads_the_pixels_that_the_forward_read,
    test_channels_last_is_kept,
    test_coordinates_that_are_nowhere,
    test_degenerate_maps,
    test_dense_maps_match_torch,
    test_empty,
    test_error_in_16_bits_is_never_above_that_of_torch,
    test_gradcheck,
    test_identity_is_exact,
    test_input_is_not_kept_where_only_its_gradient_is_asked_for,
    test_matches_torch,
    test_not_a_number_everywhere,
    test_odd_sizes,
    test_one_image_many_maps_equals_repeated_images,
    test_one_map_serves_every_image,
    test_several_maps_per_image,
    test_slope_at_a_pixel_is_the_one_to_its_right,
    test_ties_follow_torch,
    test_volumes_match_torch,
)

import tri_stn
from bench.measure import peak_bytes
from tri_stn import cpu, cpu_maps, reference
from tri_stn.testing import Case

MILD = torch.tensor([[1.1, 0.2, 0.1], [-0.1, 0.9, -0.2], [0.1, -0.2, 1.3]])


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return "cpu"


@pytest.fixture
def served(backend, monkeypatch):
    """What the fast road has answered: for each call whether it served."""
    answers = []

    def ask(real, *arguments):
        result = real(*arguments)
        answers.append(result is not None)
        return result

    for real in (cpu.warp, cpu.warp_backward):
        monkeypatch.setattr(cpu, real.__name__, functools.partial(ask, real))
    return answers


def results(case, image, parameters, grad):
    image, parameters = image.detach().requires_grad_(), parameters.detach().requires_grad_()
    output = tri_stn.warp(image, case.transform(parameters), case.size, **case.options)
    return output, *torch.autograd.grad(output, (image, parameters), grad)


def mild(case):
    """A case's tensors, with homographies that stay far from infinity."""
    image, parameters, grad = case.tensors()
    if case.kind == "projective":
        generator = torch.Generator().manual_seed(1)
        parameters = MILD.to(parameters) + 0.1 * torch.rand(parameters.shape, generator=generator).to(parameters)
    return image, parameters, grad


KINDS = ("affine", "projective", "grid", "displacement", "pixel_displacement")
COMMON = [
    *[Case(kind=kind, **option.values[0]) for kind in KINDS[:2] for option in OPTIONS],
    *[Case(kind=kind, padding_mode="border") for kind in KINDS[2:]],
    *[Case(kind=kind, maps=3, images=2, size=(6, 7)) for kind in KINDS],
    Case(kind="projective", images=1, maps=3, padding_mode="reflection", dtype=torch.float64),
    Case(size=(3, 4, 5), input_size=(4, 3, 6), arrangement="channels_last"),
    Case(size=(3, 4, 5), input_size=(4, 3, 6), kind="displacement", maps=2, dtype=torch.float64),
    Case(arrangement="channels_last", channels=5, maps=2, align_corners=True),
    Case(images=1, size=(40, 30), input_size=(5, 4), dtype=torch.bfloat16),
    Case(size=(9, 13), input_size=(9, 13), theta=((0.5, 0.0, 0.25), (0.0, -1.0, 0.0))),
]


@pytest.mark.parametrize("chunk_bytes", [None, 3000, 300], ids=["whole", "images", "rows"])
@pytest.mark.parametrize("case", COMMON, ids=str)
def test_common_cases_are_served_and_right(served, case, chunk_bytes, monkeypatch):
    """Whole, some images at a time, some rows at a time: fp64 truth, and the same output to the bit."""
    tensors = mild(case)
    whole = results(case, *tensors)[0]
    if chunk_bytes is not None:
        monkeypatch.setattr(cpu_maps, "CHUNK_BYTES", chunk_bytes)
    compare(case, *tensors)
    # ATen rounds bicubic otherwise in the last vector of a part than in the others.
    one_ulp = 2**-22 if case.mode == "bicubic" else 0.0
    torch.testing.assert_close(results(case, *tensors)[0], whole, rtol=0, atol=one_ulp)
    assert all(served)


@pytest.mark.parametrize("case", COMMON, ids=str)
def test_equals_the_reference(backend, case, monkeypatch):
    tensors = mild(case)
    fast = results(case, *tensors)
    monkeypatch.setattr(tri_stn.ops, "_is_plain", lambda *_: False)
    for got, expected in zip(fast, results(case, *tensors), strict=True):
        # Nearest may choose the other pixel on a half; with these seeds it does not.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
        assert got.stride() == expected.stride() and got.dtype == expected.dtype


@pytest.mark.parametrize(
    "theta",
    [
        ((1.0, 9 / 13, 0.0), (0.0, 1.0, 0.1)),
        ((0.8, 0.1, float("nan")), (0.3, 0.7, 0.1)),
        ((0.8, 0.1, 0.3), (0.3, -float("inf"), 0.1)),
        ((0.8, 0.1, 0.3), (0.3, 2e4, 0.1)),
    ],
    ids=["shear", "nan", "inf", "far"],
)
@pytest.mark.parametrize("projective", [False, True])
def test_the_reference_has_what_a_grid_would_spoil(served, theta, projective):
    theta = torch.tensor([theta])
    if projective:
        theta = torch.cat([theta, torch.tensor([[[0.0, 0.0, 1.0]]])], 1)
    transform = (tri_stn.Projective if projective else tri_stn.Affine)(theta)
    tri_stn.warp(torch.rand(1, 1, 9, 13), transform)
    assert served == [False]


@pytest.mark.parametrize("theta", [((0.7, 0.0, 0.1), (0.0, 0.61, -0.2)), ((0.5, 0.0, 0.123), (0.0, 1.0, 0.0456))])
def test_crops_that_fall_between_pixels_are_served(served, theta):
    tri_stn.warp(torch.rand(1, 1, 32, 32), tri_stn.Affine(torch.tensor([theta])))
    assert served == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_atens_samples_on_pixels_lie_no_less_than_there(dims, align_corners, dtype):
    """The slope at pixels -1 to n is the one to the right; on edges that padding continues, there is none."""
    sample = torch.grid_sampler_2d if dims == 2 else torch.grid_sampler_3d
    for n in (1, 2, 3, 5, 7, 8, *range(20, 60), 224, 225, 1000, 1001, 4095, 4096):
        pixels = torch.arange(n + 2, dtype=dtype) ** 2
        for padding in (0, 1):
            *_, g = cpu_maps._axes((1, n), align_corners, padding == 0, dtype)
            g = g[0, padding : n + 2 - padding, None]
            grid = torch.cat([g, g.new_zeros(len(g), dims - 1)], 1)
            grid = grid.view(1, *[1] * (dims - 1), -1, dims).requires_grad_()
            image = pixels[1:-1].view(1, *[1] * dims, n)
            (grad,) = torch.autograd.grad(sample(image, grid, 0, padding, align_corners).sum(), grid)
            padded = F.pad(pixels[1:-1], (1, 2)) if padding == 0 else torch.cat([pixels[1:-1], pixels[-2:-1]])
            slopes = padded.diff() * ((n - align_corners) / 2)
            if padding:
                slopes[0] = 0
            if n > align_corners:
                torch.testing.assert_close(grad[..., 0].flatten(), slopes, rtol=1e-4, atol=0.1)


def lattice(name, input_size, align_corners, dtype):
    """A map that puts pixels on pixels, or some of them, and the size of its output: theta of float64, rounded."""
    dims, odd = len(input_size), torch.tensor([1.0, -1.0, 1.0][: len(input_size)], dtype=torch.float64)
    n, size = torch.tensor(input_size[::-1], dtype=torch.float64), input_size
    first, steps = 0 * n, torch.eye(dims, dtype=torch.float64)
    if name == "flips":
        first, steps = n - 1, -steps
    elif name == "flip":
        first, steps = (n - 1) * (odd < 0), steps * odd
    elif name == "quarter turn":
        steps[:2, :2] = torch.tensor([[0, 1], [-1, 0]])
        first, size = (n - 1) * (odd < 0), (*size[:-2], size[-1], size[-2])
    elif name == "shift":
        first = 3 * odd
    elif name == "crop":
        first, size = 1 + 0 * n, tuple(s // 2 + 1 for s in size)
    elif name == "steps of 1/2":
        first, steps, size = odd, steps / 2, tuple(2 * s - 1 for s in size)
    elif name == "steps of 2":
        first, steps, size = odd, steps * 2, tuple(s // 2 + 1 for s in size)
    m = torch.tensor(size[::-1], dtype=torch.float64)
    per_unit, out_per_unit = (n - align_corners * 1) / 2, (m - align_corners * 1) / 2
    offset = first - (n - 1) / 2 + steps @ ((m - 1) / 2)
    theta = torch.cat([steps * out_per_unit, offset[:, None]], 1) / per_unit.clamp(min=0.5)[:, None]
    return theta.to(dtype)[None], size


LATTICES = ("identity", "flips", "flip", "quarter turn", "shift", "crop", "steps of 1/2", "steps of 2")
TURN = ((0.813, 0.317, 0.123), (-0.411, 0.907, 0.219))


def equals_the_reference(image, transform, parameters, size, monkeypatch, **options):
    """Outputs and gradients, wherever the reference, too, has a pixel's place as exact as it should be."""
    sampling = reference._Sampling(transform(parameters).kind, "bilinear", "zeros", options["align_corners"])
    numbers, shape = parameters[:, None], (len(parameters), 1, *size)
    looks = next(sampling.chunks(torch.Size(shape), reference.PLAIN, image, numbers, None, 0)).looks
    away = [(x - x.round()).abs() for x in looks]
    exact = functools.reduce(torch.logical_and, ((a == 0) | (a > 1e-3) for a in away)).view(shape)
    assert exact.double().mean() > 0.5
    generator = torch.Generator().manual_seed(0)
    grad = torch.rand(len(image), image.shape[1], *size, generator=generator, dtype=image.dtype) * exact

    def results():
        leaves = image.clone().requires_grad_(), parameters.clone().requires_grad_()
        output = tri_stn.warp(leaves[0], transform(leaves[1]), size, **options)
        return output, *torch.autograd.grad(output, leaves, grad)

    fast = results()
    with monkeypatch.context() as patch:
        patch.setattr(tri_stn.ops, "_is_plain", lambda *_: False)
        truth = results()
    # A normalised place is rounded to a step or two of a half eps; that many pixels, and what sums round.
    tolerance = torch.finfo(image.dtype).eps * (4 * max(image.shape[2:]) + 100)
    for got, expected in zip(fast, truth, strict=True):
        atol = tolerance * max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("input_size", [(1, 2), (5, 4), (28, 47), (224, 9), (3, 1000), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_pixels_on_pixels_have_the_references_slopes(served, input_size, align_corners, padding_mode, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for name in LATTICES:
            theta, size = lattice(name, input_size, align_corners, dtype)
            image = torch.rand(1, 2, *input_size, generator=generator, dtype=dtype)
            options = {"align_corners": align_corners, "padding_mode": padding_mode}
            equals_the_reference(image, tri_stn.Affine, theta, size, monkeypatch, **options)
            may_leave = padding_mode == "reflection" and name not in LATTICES[:4]
            assert all(served) or may_leave
            served.clear()


@pytest.mark.parametrize("projective", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
def test_one_map_onto_pixels_leaves_a_batch_served(served, projective, align_corners, monkeypatch):
    names = ("identity", "flips", "flip", "shift")
    theta = [lattice(name, (41, 47), align_corners, torch.float32)[0] for name in names]
    theta = torch.cat([*theta, torch.tensor([TURN, ((0.7, 0.0, 0.1), (0.0, 0.61, 0.2)), ((1.0, 0.0, 0.0), TURN[1])])])
    transform = tri_stn.Affine
    if projective:
        theta = torch.cat([theta, torch.tensor([[[0.0, 0.0, 1.0]]]).expand(len(theta), -1, -1)], 1)
        theta[4, 2, 0] = 0.2
        transform = tri_stn.Projective
    image = torch.rand(len(theta), 2, 41, 47, generator=torch.Generator().manual_seed(0))
    equals_the_reference(image, transform, theta, (41, 47), monkeypatch, align_corners=align_corners)
    assert all(served)


def test_what_stays_on_pixels_is_exact(served):
    image = torch.randn(2, 1, 41, 47)
    for name, expected in (("identity", image), ("flips", image.flip(2, 3)), ("quarter turn", image.rot90(-1, (2, 3)))):
        theta, size = lattice(name, (41, 47), False, torch.float32)
        assert torch.equal(tri_stn.warp(image, tri_stn.Affine(theta.repeat(2, 1, 1)), size), expected)
    assert torch.equal(tri_stn.warp(image, tri_stn.Displacement(torch.zeros(2, 41, 47, 2))), image)
    assert served == [True] * 4


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("unit", ["normalized", "pixel"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(2, 3), (5, 4), (28, 47), (224, 9), (3, 1000), (2, 3, 4)], ids=str)
def test_fields_that_stay_have_the_references_slopes(served, size, align_corners, unit, padding_mode, monkeypatch):
    """Everywhere, or in half of the image; in pairs, and in planes."""
    generator = torch.Generator().manual_seed(0)
    options = {"align_corners": align_corners, "padding_mode": padding_mode}
    for dtype in (torch.float32, torch.float64):
        image = torch.rand(1, 2, *size, generator=generator, dtype=dtype)
        zero = torch.zeros(1, *size, len(size), dtype=dtype)
        half = zero.clone()
        half[:, size[0] // 2 :] = torch.rand(half[:, size[0] // 2 :].shape, generator=generator, dtype=dtype)
        for field in (zero, half, half.movedim(-1, 1).contiguous().movedim(1, -1)):
            transform = functools.partial(tri_stn.Displacement, unit=unit)
            equals_the_reference(image, transform, field, size, monkeypatch, **options)
    assert all(served)


def test_a_homography_that_nears_infinity_is_the_references(served):
    matrix = torch.tensor([[[1.0, 0.1, 0.0], [0.1, 1.0, 0.0], [0.6, 0.5, 1.0]]])
    tri_stn.warp(torch.rand(1, 1, 9, 13), tri_stn.Projective(matrix))
    assert served == [False]


def test_a_grid_with_one_bad_number_is_the_references(served):
    grid = torch.rand(1, 9, 13, 2)
    for bad in (float("nan"), float("inf"), -1e30):
        grid[0, 4, 5, 1] = bad
        assert tri_stn.warp(torch.rand(1, 1, 9, 13), tri_stn.Grid(grid))[0, 0, 4, 5] == 0
    assert served == [False] * 3


@pytest.mark.parametrize("kind", ["affine", "projective", "grid"])
def test_the_backward_in_parts_reads_what_the_forward_read(backend, kind, monkeypatch):
    """Parts of rows forward, whole images backward: each pixel's gradient counts its reads."""
    monkeypatch.setattr(cpu_maps, "CHUNK_BYTES", 3000)
    case = Case(kind=kind, images=1, channels=1, input_size=(17, 31), size=(60, 50), mode="nearest")
    _, parameters, _ = mild(case)
    numbers = torch.arange(1.0, 17 * 31 + 1).view(1, 1, 17, 31).requires_grad_()
    output = tri_stn.warp(numbers, case.transform(parameters), case.size, mode="nearest")
    (reads,) = torch.autograd.grad(output.sum(), numbers)
    counted = output.flatten().long().bincount(minlength=numbers.numel() + 1)[1:]
    assert torch.equal(counted, reads.flatten().long())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_again(backend, kind):
    case = Case(kind=kind, images=3, size=(40, 30), input_size=(5, 4))
    first, again = (results(case, *mild(case)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_large_outputs_take_less_memory_than_torchs(backend):
    """Beyond what is returned; a hundred images whose grids are 12 MiB together."""
    image = torch.rand(100, 1, 128, 128).requires_grad_()
    theta = (torch.tensor([[0.9, 0.2, 0.1], [-0.1, 0.8, 0.1]]) + 0.1 * torch.rand(100, 2, 3)).requires_grad_()

    def ours():
        return tri_stn.warp(image, tri_stn.Affine(theta))

    def torchs():
        return F.grid_sample(image, F.affine_grid(theta, list(image.shape), align_corners=False), align_corners=False)

    grad = torch.rand_like(image)

    def step(warp):
        output = warp()
        return output.detach(), *torch.autograd.grad(output, (image, theta), grad)

    for measure in (lambda warp: (warp().detach(),), step):
        mine, others = (peak_bytes(functools.partial(measure, warp), torch.device("cpu")) for warp in (ours, torchs))
        assert mine < 2.1 * cpu_maps.CHUNK_BYTES and mine < 0.7 * others


@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last"])
def test_a_long_row_of_points_goes_part_by_part(served, arrangement, monkeypatch):
    case = Case(kind="grid", images=2, maps=2, size=(1, 2048), input_size=(9, 8), channels=5, arrangement=arrangement)
    monkeypatch.setattr(cpu_maps, "CHUNK_BYTES", 20000)
    image, points, _ = case.tensors()
    image, points = image.requires_grad_(), points.requires_grad_()
    compare(case, *case.tensors())
    assert all(served)
    output = tri_stn.warp(image, tri_stn.Grid(points), case.size)
    layout = torch.channels_last if arrangement == "channels_last" else torch.contiguous_format
    assert output.flatten(0, 1).is_contiguous(memory_format=layout)
    peak = peak_bytes(lambda: (tri_stn.warp(image, tri_stn.Grid(points), case.size).detach(),), torch.device("cpu"))
    assert peak < 5 * cpu_maps.CHUNK_BYTES < output.numel() * 4


def test_autocast_leaves_the_grid_alone(backend):
    case = Case(images=3)
    expected = results(case, *case.tensors())
    with torch.autocast("cpu"):
        got = results(case, *case.tensors())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["affine", "grid"])
def test_a_jacobian_maps_over_the_outputs_gradient_alone(backend, kind):
    """Many gradients of the output for one image and one map, as `torch.vmap` hands them over."""
    case = Case(kind=kind, images=1, input_size=(4, 3), size=(2, 3))
    image, parameters, _ = case.tensors()

    def output(image, parameters):
        return tri_stn.warp(image, case.transform(parameters), case.size)

    rows = []
    for one in torch.eye(12).view(12, 1, 2, 2, 3):
        tensors = image.clone().requires_grad_(), parameters.clone().requires_grad_()
        rows.append(torch.autograd.grad(output(*tensors), tensors, one))
    for got, *expected in zip(torch.func.jacrev(output, (0, 1))(image, parameters), *rows, strict=True):
        torch.testing.assert_close(got.flatten(0, 3), torch.stack(expected))


def spline(images=3, maps=None, bend=0.1, dtype=torch.float64, scale=0.8):
    generator = torch.Generator().manual_seed(3)
    targets = torch.tensor([[-0.9, -0.8], [0.8, -0.9], [-0.7, 0.9], [0.9, 0.7], [0.1, -0.2]], dtype=dtype)
    lead = (images,) if maps is None else (images, maps)
    noise = torch.rand(*lead, 5, 2, generator=generator, dtype=dtype) - 0.5
    return targets, (targets * scale + bend * noise).requires_grad_()


@pytest.mark.parametrize("chunk_bytes", [None, 3000, 300], ids=["whole", "images", "rows"])
@pytest.mark.parametrize("maps", [None, 2])
@pytest.mark.parametrize("images", [1, 3])
def test_splines_of_one_set_of_targets_are_served_and_right(served, images, maps, chunk_bytes, monkeypatch):
    targets, sources = spline(images, maps)
    image = torch.rand(images, 2, 9, 11, dtype=torch.float64, requires_grad=True)

    def results():
        output = tri_stn.warp(image, tri_stn.ThinPlateSpline(targets, sources), (12, 7))
        grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        return output, *torch.autograd.grad(output, (image, sources), grad)

    whole = results()
    if chunk_bytes is not None:
        monkeypatch.setattr(cpu_maps, "CHUNK_BYTES", chunk_bytes)
    fast = results()
    assert served == [True] * 4
    monkeypatch.setattr(tri_stn.ops, "_is_plain", lambda *_: False)
    for a, b, expected in zip(whole, fast, results(), strict=True):
        torch.testing.assert_close(a, expected)
        torch.testing.assert_close(b, expected)


def test_splines_with_targets_of_their_own_or_none_of_their_own_bends_are_the_references(served):
    image = torch.rand(2, 1, 9, 11)
    targets, sources = spline(2, dtype=torch.float32)
    own = tri_stn.ThinPlateSpline(targets, sources).parameters.detach().clone()
    own[1, :10] += 0.1
    size = (9, 11)
    options = "thin_plate[5]", "bilinear", "zeros", False, 1
    torch.ops.tri_stn.warp(image, own[:, None], None, None, size, "", *options)
    tri_stn.warp(image, tri_stn.ThinPlateSpline(*spline(2, bend=0, dtype=torch.float32, scale=1.0)), size)
    tri_stn.warp(image, tri_stn.ThinPlateSpline(*spline(2, bend=0, dtype=torch.float32, scale=0.83)), size)
    assert served == [False, False, True]


def test_the_backward_of_a_spline_in_blocks_reads_what_the_forward_read(backend, monkeypatch):
    """Blocks of terms, parts of rows forward, the whole image backward: each pixel's gradient counts its reads."""
    monkeypatch.setattr(cpu_maps, "CHUNK_BYTES", 8000)
    targets, sources = spline(1, 3, dtype=torch.float32)
    numbers = torch.arange(1.0, 17 * 31 + 1).view(1, 1, 17, 31).requires_grad_()
    output = tri_stn.warp(numbers, tri_stn.ThinPlateSpline(targets, sources), (61, 50), mode="nearest")
    (reads,) = torch.autograd.grad(output.sum(), numbers)
    counted = output.detach().flatten().long().bincount(minlength=numbers.numel() + 1)[1:]
    assert torch.equal(counted, reads.flatten().long())


@pytest.mark.parametrize("fixed", ["nothing", "image", "map"])
@pytest.mark.parametrize(
    "case",
    [
        Case(images=1, size=(60, 90), input_size=(30, 31)),
        Case(images=1, maps=3, size=(40, 90), input_size=(30, 31), kind="projective"),
        Case(images=1, size=(63, 90), input_size=(30, 31), kind="displacement", channels=5),
        Case(images=1, size=(16, 17, 18), input_size=(9, 10, 11), kind="grid"),
        Case(images=1, size=(67, 89), input_size=(30, 31)),
        Case(images=1, size=(1, 6000), input_size=(30, 31), kind="grid"),
        Case(images=1, maps=60, size=(13, 17), input_size=(30, 31)),
        Case(images=1, maps=61, size=(13, 17), input_size=(30, 31), kind="grid"),
    ],
    ids=str,
)
def test_one_image_on_several_threads(served, case, fixed):
    """In bands of rows, where they can be equal: what one thread finds, but for the order of sums."""
    image, parameters, grad = mild(case)
    tensors = image.requires_grad_(fixed != "image"), parameters.requires_grad_(fixed != "map")
    wanted = [t for t in tensors if t.requires_grad]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            output = tri_stn.warp(image, case.transform(parameters), case.size, **case.options)
            found.append((output.detach(), *torch.autograd.grad(output, wanted, grad)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0]) and all(served)
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("kind", ["grid", "displacement", "pixel_displacement"])
@pytest.mark.parametrize(
    "order",
    [
        lambda f: f[:1].movedim(-1, 1).contiguous().movedim(1, -1).expand_as(f),
        lambda f: torch.cat([f, f, f], -1).movedim(-1, 1).contiguous()[:, 1:3].movedim(1, -1),
        lambda f: f.transpose(1, 2).contiguous().transpose(1, 2),
        lambda f: torch.cat([f, f], 2).movedim(-1, 1).contiguous().movedim(1, -1)[:, :, : f.shape[2]],
        lambda f: f.movedim(-1, 1).contiguous().movedim(1, -1),
    ],
    ids=["one plane for all", "channels of more", "columns first", "part of more", "planes"],
)
@pytest.mark.parametrize("chunk_bytes", [2**23, 300])
def test_fields_of_any_order_in_memory(served, kind, order, chunk_bytes, monkeypatch):
    monkeypatch.setattr(cpu_maps, "CHUNK_BYTES", chunk_bytes)
    case = Case(kind=kind, images=4, size=(7, 6))
    image, field, grad = case.tensors()
    field = order(field)
    for got, expected in zip(
        results(case, image, field, grad), results(case, image, field.contiguous(), grad), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all(served)


def test_parts_of_a_field_of_planes_are_rounded_as_the_whole(backend):
    """Rows forward, the whole backward: both read the same pixels."""
    generator = torch.Generator().manual_seed(0)
    field = (torch.randn(1, 2, 61, 47, generator=generator) * 5).floor() + torch.rand(1, 2, 61, 47, generator=generator)
    maps = cpu_maps.Maps.of(
        field.movedim(1, -1)[:, None],
        (1, 1, 61, 47),
        (61, 47),
        torch.float32,
        "pixel_displacement",
        "nearest",
        "zeros",
        False,
    )
    whole = maps.grid(cpu_maps.Part(slice(None), 0, 1, 0, 61, 1))
    rows = [maps.grid(cpu_maps.Part(slice(0, 1), 0, 1, start, start + 1, 1)) for start in range(61)]
    assert torch.equal(torch.cat(rows, 1), whole)


@pytest.mark.parametrize(
    ("field", "size", "options"),
    [
        (torch.full((1, 50, 50, 2), 0.5), (50, 50), {"unit": "pixel", "mode": "nearest"}),
        (torch.full((1, 50, 50, 2), 2 / 50), (50, 50), {"unit": "normalized"}),
        (torch.full((1, 25, 25, 2), 0.5), (50, 50), {"unit": "pixel"}),
    ],
    ids=["halves, nearest", "a pixel, normalized", "onto pixels of a larger image"],
)
def test_fields_that_end_on_pixels_are_the_references(served, field, size, options):
    options = dict(options)
    tri_stn.warp(torch.rand(1, 1, *size), tri_stn.Displacement(field, unit=options.pop("unit")), **options)
    assert served == [False]


def test_pixels_along_an_axis_of_one_have_no_unit(served):
    field = torch.rand(1, 1, 40, 2) * 3
    tri_stn.warp(torch.rand(1, 1, 1, 40), tri_stn.Displacement(field, unit="pixel"), align_corners=True)
    assert served == [False]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_output_of_a_long_row_may_be_edited(layout):
    """It is wrapped into many rows and back, but no view."""
    image = torch.rand(1, 2, 8, 8).contiguous(memory_format=layout).requires_grad_()
    grid = torch.rand(1, 1, 2**10, 2) * 2 - 1
    output = tri_stn.grid_sample(image, grid, align_corners=False)
    torch.testing.assert_close(output, F.grid_sample(image, grid, align_corners=False))
    output.relu_().sum().backward()
    assert output.is_contiguous(memory_format=layout)
