"""Images of many channels in channels_last on the CPU, whose pixels are rows of a table: right by the others' tests.

Here `backend` is the CPU with every image that rows could hold read by rows, whatever its channels and its layout.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from test_cpu import (  # noqa: F401
    COMMON,
    KINDS,
    mild,
    results,
    served,
    small_tiles,
    test_a_grid_with_one_bad_number_is_the_references,
    test_a_homography_that_nears_infinity_is_the_references,
    test_a_jacobian_maps_over_the_outputs_gradient_alone,
    test_a_pixel_that_nobody_reads_spoils_nothing,
    test_a_rounded_distance_adds_no_pixel,
    test_any_pair_of_dtypes,
    test_any_strides,
    test_backward_reads_the_pixels_that_the_forward_read,
    test_coordinates_that_are_nowhere,
    test_coordinates_that_are_nowhere_in_volumes,
    test_degenerate_maps,
    test_edges_of_five_pixels,
    test_empty,
    test_expanded_tensors,
    test_gradcheck,
    test_identity_grids_have_torchs_slopes,
    test_identity_is_exact,
    test_input_is_not_kept_where_only_its_gradient_is_asked_for,
    test_matches_torch,
    test_nearest_has_a_grid_gradient_of_zeros,
    test_nearest_rounds_half_to_even,
    test_not_a_number_everywhere,
    test_odd_sizes,
    test_one_gradient_alone,
    test_one_image_many_maps_equals_repeated_images,
    test_one_map_onto_pixels_leaves_a_batch_served,
    test_one_map_serves_every_image,
    test_pixels_on_pixels_have_the_references_slopes,
    test_several_maps_per_image,
    test_slope_at_a_pixel_is_the_one_to_its_right,
    test_splines_of_one_set_of_targets_are_served_and_right,
    test_the_backward_in_parts_reads_what_the_forward_read,
    test_the_backward_of_a_spline_in_blocks_reads_what_the_forward_read,
    test_the_corners_of_the_grid_are_the_corners_of_the_image,
    test_the_same_bits_again,
    test_ties_follow_torch,
    test_ties_in_volumes,
    test_ties_on_pixels_borders_and_corners,
    test_volumes_match_torch,
    test_what_stays_on_pixels_is_exact,
)
from test_warp import compare

import tri_stn
from bench.measure import peak_bytes
from tri_stn import cpu, cpu_maps, cpu_rows
from tri_stn.testing import Case


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu_rows, "suits", lambda like, _: like.dtype in (torch.float32, torch.float64))
    return "cpu"


@pytest.fixture
def roads(monkeypatch):
    """What has been asked of rows, name by name."""
    asked = []

    def ask(name, real, *arguments, **options):
        asked.append(name)
        return real(*arguments, **options)

    for name in ("warp", "warp_backward", "gather", "adjoint"):
        monkeypatch.setattr(cpu_rows, name, functools.partial(ask, name, getattr(cpu_rows, name)))
    return asked


@pytest.fixture
def many(monkeypatch):
    """As users have it, but that 16 channels are many."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu_rows, "FEWEST_CHANNELS", 16)


ROWS = [
    *[
        case.with_(arrangement="channels_last")
        for case in COMMON
        if case.mode != "bicubic" and case.dtype != torch.bfloat16
    ],
    Case(kind="grid", images=2, maps=2, size=(1, 2048), input_size=(9, 8), channels=5, arrangement="channels_last"),
    Case(input_size=(1, 7), arrangement="channels_last"),
    Case(kind="grid", input_size=(1, 7), arrangement="channels_last", padding_mode="reflection", align_corners=True),
]


@pytest.mark.parametrize("chunk_bytes", [None, 11000, 300], ids=["whole", "maps", "rows"])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_common_cases_are_served_and_right(served, roads, case, chunk_bytes, monkeypatch):  # noqa: F811
    """Whole, some maps at a time, some rows at a time: fp64 truth, and the same output to the bit."""
    tensors = mild(case)
    whole = results(case, *tensors)
    if chunk_bytes is not None:
        monkeypatch.setattr(cpu_maps, "CHUNK_BYTES", chunk_bytes)
    compare(case, *tensors)
    assert torch.equal(results(case, *tensors)[0], whole[0])
    layout = torch.channels_last if len(case.size) == 2 else torch.channels_last_3d
    for image in (whole[0] if case.maps is None else whole[0].flatten(0, 1), whole[1]):
        assert image.is_contiguous(memory_format=layout)
    assert all(served) and set(roads) == {"warp", "warp_backward"}


@pytest.mark.parametrize("chunk_bytes", [2**23, 8000, 300], ids=["whole", "maps", "rows"])
@pytest.mark.parametrize("kind", ["affine", "projective", "grid", "pixel_displacement"])
def test_parts_of_maps_of_several_images_read_and_give_back_the_same_pixels(
    roads, backend, kind, chunk_bytes, monkeypatch
):
    """Three maps of each of two images, in parts of two, one across the images: each pixel counts its reads."""
    monkeypatch.setattr(cpu_maps, "CHUNK_BYTES", chunk_bytes)
    case = Case(kind=kind, images=2, maps=3, size=(6, 7), mode="nearest")
    _, parameters, _ = mild(case)
    pixels = 2 * 13 * 9
    image = torch.arange(1.0, pixels + 1).view(2, 1, 13, 9).repeat(1, 2, 1, 1).requires_grad_()
    output = tri_stn.warp(image, case.transform(parameters), case.size, mode="nearest")
    (reads,) = torch.autograd.grad(output.sum(), image)
    counted = output.detach()[:, :, 0].flatten().long().bincount(minlength=pixels + 1)[1:]
    for channel in reads.unbind(1):
        assert torch.equal(channel.flatten().long(), counted)
    assert roads == ["warp", "warp_backward"]
    maps = cpu_maps.Maps.of(parameters, image.shape, case.size, torch.float32, kind, "nearest", "zeros", False)
    parts = maps.equal_parts(64, 8)
    shapes = {2**23: [(6, 6)], 8000: [(2, 6)] * 3, 300: [(1, 1)] * 36}
    assert [(part.maps, part.stop - part.start) for part in parts] == shapes[chunk_bytes]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("over", ["maps", "images", "gradients"])
def test_vmap_over_something_gives_back_what_was_read(many, over, layout):
    """Over maps of one image, images of one map, or gradients of one output."""
    height, width = 12, 900  # so wide that roundings differ, where roads do
    image = torch.arange(1.0, height * width + 1).view(1, 1, height, width).repeat(1, 16, 1, 1).to(memory_format=layout)
    generator = torch.Generator().manual_seed(0)
    maps = torch.tensor([[0.9, 0.2, 0.1], [-0.1, 0.8, 0.1]]) + 0.1 * torch.rand(4, 1, 2, 3, generator=generator)

    def warp(image, theta):
        return tri_stn.warp(image, tri_stn.Affine(theta), (100, 300), mode="nearest")

    if over == "gradients":
        output, vjp = torch.func.vjp(lambda image: warp(image, maps[:, 0][None]), image)  # four of one image
        found = torch.func.vmap(vjp)(torch.ones(2, *output.shape))[0][:, 0]
    else:
        leaf = image.clone().requires_grad_()
        if over == "maps":
            output = torch.func.vmap(warp, (None, 0))(leaf, maps)
        else:
            output = torch.func.vmap(warp, (0, None))(leaf.expand(3, 1, -1, -1, -1), maps[0])
        (found,) = torch.autograd.grad(output.sum(), leaf)
    counted = output.detach()[..., 0, :, :].flatten().long().bincount(minlength=image[0, 0].numel() + 1)[1:]
    for of_channel in found.flatten(0, 1):
        assert torch.equal(of_channel.flatten().long(), counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_it_looks_where_torchs_sampler_does(mode, padding_mode, align_corners, dtype):
    """On pixels, halfway between them, and a step of the dtype beside, within the image and beyond."""
    options = cpu._MODES[mode], cpu._PADDINGS[padding_mode], align_corners
    for n in (2, 3, 5, 6, 7, 10, 11, 28, 31, 224, 333, 1000):
        x = torch.arange(-3, n + 3, 0.5, dtype=torch.float64)
        x = (2 * x / (n - 1) if align_corners else (2 * x + 1) / n).sub_(1).to(dtype)
        x = torch.cat([x, *(torch.nextafter(x, torch.full_like(x, far)) for far in (-9.0, 9.0))])
        grid = torch.stack([x, torch.zeros_like(x)], -1)[None, None]
        image = torch.arange(1.0, n + 1, dtype=dtype).square_().div_(n).view(1, 1, 1, n)  # no two slopes are equal
        maps = cpu_maps.Maps.of(
            grid[None], image.shape, grid.shape[1:3], dtype, "grid", mode, padding_mode, align_corners
        )
        output = cpu_rows.warp(image, maps, torch.contiguous_format, mode)
        grad = torch.linspace(-1, 1, x.numel(), dtype=dtype).view_as(output)
        found = cpu_rows.warp_backward(grad, image, maps, torch.contiguous_format, True, True, mode)
        expected = torch.ops.aten.grid_sampler_2d_backward(grad, image, grid, *options, [True, True])
        torch.testing.assert_close(output, torch.grid_sampler_2d(image, grid, *options), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(found, (expected[0], expected[1]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_indices_of_64_bits(served, kind, monkeypatch):  # noqa: F811
    case = Case(kind=kind, images=2, maps=2)
    found = results(case, *mild(case))
    monkeypatch.setattr(cpu_rows, "INDEX_LIMIT", 1)
    for got, expected in zip(results(case, *mild(case)), found, strict=True):
        assert torch.equal(got, expected)
    assert all(served)


@pytest.mark.parametrize(
    "case",
    [
        Case(theta=((0.8, 0.1, 0.3), (0.3, 2e4, 0.1)), channels=16, arrangement="channels_last"),
        Case(
            theta=((1.0, 9 / 13, 0.0), (0.0, 1.0, 0.1)),
            channels=17,
            arrangement="channels_last",
            size=(9, 13),
            input_size=(9, 13),
        ),
    ],
    ids=str,
)
def test_the_reference_reads_by_rows_what_is_not_served(many, roads, case):
    compare(case, *case.tensors())
    assert set(roads) == {"gather", "adjoint"}


@pytest.mark.parametrize("chunk_bytes", [2**23, 30000], ids=["whole", "parts"])
@pytest.mark.parametrize("pixels", [32, 33])
def test_many_points_read_rows_of_a_copy(many, roads, pixels, chunk_bytes, monkeypatch):
    """Of an image in NCHW with no more pixels than they are; output and gradients are in NCHW, too."""
    monkeypatch.setattr(cpu_maps, "CHUNK_BYTES", chunk_bytes)
    case = Case(kind="grid", size=(1, 1024), input_size=(32, pixels), channels=16, images=2)
    compare(case, *case.tensors())
    output, grad_image, _ = results(case, *case.tensors())
    assert output.is_contiguous() and grad_image.is_contiguous()
    assert set(roads) == ({"warp", "warp_backward"} if pixels == 32 else set())
    nothing = tri_stn.grid_sample(torch.rand(0, 16, 4, 4), torch.rand(0, 1, 1024, 2), align_corners=False)
    assert nothing.shape == (0, 16, 1, 1024)


def test_rows_of_pixels_that_nobody_reads_spoil_nothing(many):
    """Neither NaN nor infinity, in the corner pixel that stands for those outside, or beside a sample."""
    image = torch.full((1, 16, 4, 4), float("nan")).to(memory_format=torch.channels_last)
    image[:, :, :, 2] = float("inf")
    image[:, :, :, 3] = 1
    theta = torch.tensor([[[1.0, 0.0, 1.4], [0.0, 0.9, 0.1]]])
    output = tri_stn.warp(image, tri_stn.Affine(theta), (4, 4))  # columns 2.8, 3.8, 4.8, 5.8
    assert output[0, :, 1:3, 0].isposinf().all() and output[0, :, 1:3, 1].isfinite().all()
    assert (output[..., 2:] == 0).all()
    theta[..., 0, 2] += 0.5
    theta.requires_grad_()
    (grad,) = torch.autograd.grad(tri_stn.warp(image, tri_stn.Affine(theta), (4, 4)).sum(), theta)
    assert grad.isfinite().all() and grad.any()


def test_slopes_beside_an_infinite_pixel_are_torchs(many):
    image = torch.rand(1, 16, 6, 6).to(memory_format=torch.channels_last)
    image[:, :, 2, 2] = float("inf")
    grid = torch.tensor([[[[-0.2, -0.2], [-0.1, -0.3]]]]).requires_grad_()
    ours, torchs = (
        torch.autograd.grad(sample(image, grid, align_corners=False).sum(), grid)[0]
        for sample in (tri_stn.grid_sample, F.grid_sample)
    )
    assert torch.equal(ours, torchs) and ours.isinf().all()


def test_an_expanded_image_is_not_copied(many, roads):
    case = Case(images=8, channels=16, input_size=(64, 64), size=(8, 8), arrangement="channels_last")
    _, theta, grad = case.tensors()
    image = torch.rand(1, 16, 64, 64).to(memory_format=torch.channels_last)
    expanded, copied = (
        image.expand(8, -1, -1, -1),
        image.repeat(8, 1, 1, 1).contiguous(memory_format=torch.channels_last),
    )
    for got, expected in zip(results(case, expanded, theta, grad), results(case, copied, theta, grad), strict=True):
        torch.testing.assert_close(got, expected)
    peak = peak_bytes(lambda: (tri_stn.warp(expanded, tri_stn.Affine(theta), (8, 8)),), torch.device("cpu"))
    assert peak < image.numel() * 4 / 2 and set(roads) == {"warp", "warp_backward"}


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_gradients_of_samples_outside_spoil_nothing(many, padding_mode):
    """An image's gradient where a sample that lies outside gets what is not a number."""
    image = torch.rand(1, 16, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    theta = torch.tensor([[[1.0, 0.0, 1.4], [0.0, 0.9, 0.1]]])  # as above
    output = tri_stn.warp(image, tri_stn.Affine(theta), (4, 4), padding_mode=padding_mode)
    grad = torch.ones_like(output)
    grad[..., 2:] = float("nan")
    (grad_image,) = torch.autograd.grad(output, image, grad)
    last = grad_image[..., 3]
    assert grad_image[..., :3].isfinite().all() and (last.isnan() if padding_mode == "border" else last > 0).all()


@pytest.mark.parametrize("more", ["supersample", "mask", "fill", "tangent", "slice"])
def test_rows_do_all_that_the_reference_does(many, more, monkeypatch):
    case = Case(channels=16, arrangement="channels_last")
    image, parameters, _ = case.tensors()
    if more == "slice":
        image = image.repeat(1, 1, 1, 2)[..., : case.input_size[1]]
    extra = {"supersample": {"supersample": 2}, "mask": {"return_mask": True}, "fill": {"fill": 0.5}}.get(more, {})

    def found():
        def warp(image, parameters):
            found = tri_stn.warp(image, case.transform(parameters), case.size, **extra)
            return found if isinstance(found, tuple) else (found,)

        if more == "tangent":
            return torch.func.jvp(warp, (image, parameters), (image.cos(), parameters.cos()))[1]
        leaves = image.clone().requires_grad_(), parameters.clone().requires_grad_()
        output = warp(*leaves)
        return *output, *torch.autograd.grad(output[0].square().sum(), leaves)

    by_rows = found()
    monkeypatch.setattr(cpu_rows, "suits", lambda *_: False)
    monkeypatch.setattr(tri_stn.ops, "_is_plain", lambda *_: False)
    for got, expected in zip(by_rows, found(), strict=True):
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


def test_an_output_may_be_edited(many):
    """It is no view of the rows it was made of."""
    image = torch.rand(1, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    for size in ((8, 8), (1, 2**10)):
        tri_stn.grid_sample(image, torch.rand(1, *size, 2), align_corners=False).relu_().sum().backward()


def test_large_outputs_take_little_memory_beside(many, monkeypatch):
    """In parts: what their taps take, twice, as they are sorted for an image's gradient, and their rows."""
    monkeypatch.setattr(cpu_maps, "CHUNK_BYTES", 2**18)
    case = Case(images=4, channels=16, input_size=(24, 24), size=(96, 96), arrangement="channels_last")
    image, theta, grad = case.tensors()
    leaves = image.requires_grad_(), theta.requires_grad_()
    output = tri_stn.warp(image, tri_stn.Affine(theta), case.size)

    def both():
        return torch.autograd.grad(output, leaves, grad, retain_graph=True)

    forward = peak_bytes(lambda: (tri_stn.warp(image, tri_stn.Affine(theta), case.size).detach(),), torch.device("cpu"))
    assert forward < 2.5 * 2**18 < output.numel() * 4 / 3
    assert peak_bytes(both, torch.device("cpu")) < 5 * 2**18
