"""Several samples per output pixel: warp(…, supersample=k) and antialias=True, against averages made by torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from covering import covering
from test_warp import MODES, PADDING_MODES
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, vmap

import tri_stn
from tri_stn.testing import ARRANGEMENTS, assert_accurate

DOUBLE = torch.float64
OPTIONS = [
    pytest.param({"mode": m, "padding_mode": p, "align_corners": a}, id=f"{m}-{p}-{'corners' if a else 'edges'}")
    for m, p, a in covering(MODES, PADDING_MODES, (False, True))
]


def matrices(maps, dims, scale=1.0, spread=0.3, last=0.0):
    """Random (maps, dims, dims + 1); with `last`, homogeneous ones of that much perspective."""
    generator = torch.Generator().manual_seed(dims)
    theta = torch.eye(dims, dims + 1, dtype=DOUBLE) * scale
    theta = theta + spread * torch.randn(maps, dims, dims + 1, generator=generator, dtype=DOUBLE)
    row = torch.tensor([*[last] * dims, 1.0], dtype=DOUBLE).expand(maps, 1, dims + 1)
    return torch.cat([theta, row], 1) if last else theta


def picture(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def fine_points(size, k, align_corners):
    """The normalised places of k samples per pixel along each axis, x first, (*k * size, d)."""
    axes = [(torch.arange(n * k, dtype=DOUBLE) - (n * k - 1) / 2) / k / ((n - align_corners) / 2) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)


def truth(image, matrix, size, k, align_corners=False, **options):
    """The average of k samples along each axis by torch alone, in fp64; 1-D to 3-D, affine and homogeneous matrices."""
    dims = len(size)
    points = fine_points(size, k, align_corners)
    points = torch.cat([points, torch.ones_like(points[..., :1])], -1)
    grid = (points.flatten(0, -2) @ matrix.double().mT).unflatten(1, [n * k for n in size])
    if matrix.shape[1] == dims + 1:
        grid = grid[..., :-1] / grid[..., -1:]
    if dims == 1:  # a line is an image of height one
        image, grid = image.unsqueeze(2), torch.stack([grid[..., 0], torch.zeros_like(grid[..., 0])], -1).unsqueeze(1)
    output = F.grid_sample(image.double(), grid, align_corners=align_corners, **options)
    if dims == 1:
        return F.avg_pool1d(output.squeeze(2), k)
    return (F.avg_pool2d if dims == 2 else F.avg_pool3d)(output, k)


def check(backend, image, matrix, size, k, transform=tri_stn.Affine, dtype=DOUBLE, expected=None, **options):
    """Values and both gradients. In fp64, where random places come near no discontinuity."""
    given = image.to(backend, dtype).requires_grad_(), matrix.to(backend).requires_grad_()
    choice = {"antialias": True} if k == 0 else {"supersample": k}
    output = tri_stn.warp(given[0], transform(given[1]), size, **choice, **options)
    exact = given[0].detach().cpu().double().requires_grad_(), matrix.detach().requires_grad_()
    if expected is None:
        expected = lambda x, theta: truth(x, theta, size, k, **options)  # noqa: E731
    wanted = expected(*exact)
    g = picture(*output.shape, seed=1).to(dtype)
    got = output, *torch.autograd.grad(output, given, g.to(backend))
    want = wanted, *torch.autograd.grad(wanted, exact, g.double())
    for what, a, b in zip(("output", "grad_input", "grad of the map"), got, want, strict=True):
        assert_accurate(a.cpu(), b, image_dtype=dtype, magnitude=b.abs().amax().clamp(min=1), what=what)
    return output


@pytest.mark.parametrize("options", OPTIONS)
def test_is_the_average_of_centred_samples(backend, options):
    check(backend, picture(2, 2, 7, 9), matrices(2, 2), (2, 3), 2, **options)


@pytest.mark.parametrize("dims,size,k", [(1, (5,), 5), (2, (3, 2), 3), (3, (1, 2, 2), 2)])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_dimensions(backend, dims, size, k, padding_mode):
    check(backend, picture(1, 2, *(5, 4, 6)[:dims]), matrices(1, dims), size, k, padding_mode=padding_mode)


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize("antialias", [False, True])
def test_in_16_bits_and_channels_last(backend, padding_mode, antialias):
    """Sums are fp32 and rounded once; the layout is kept."""
    image = ARRANGEMENTS["channels_last"](picture(1, 9, 7, 9).bfloat16())
    theta = torch.tensor([[[1.9, 0.13, 0.05], [-0.21, 1.7, 0.02]]], dtype=DOUBLE)
    # Steps of about 9 / 3 * 1.9 and 7 / 2 * 1.7 source pixels: 6 samples along each axis.
    k = 6 if antialias else 2
    output = check(
        backend, image, theta, (2, 3), 0 if antialias else 2, dtype=torch.bfloat16, padding_mode=padding_mode,
        expected=lambda x, t: truth(x, t, (2, 3), k, padding_mode=padding_mode),
    )  # fmt: skip
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_several_maps_per_image(backend):
    image, theta = picture(2, 2, 6, 5), matrices(6, 2).unflatten(0, (2, 3))

    def expected(x, t):
        return truth(x.repeat_interleave(3, 0), t.flatten(0, 1), (3, 2), 2, padding_mode="border").unflatten(0, (2, 3))

    check(backend, image, theta, (3, 2), 2, expected=expected, padding_mode="border")


def test_one_sample_is_no_other_road(backend):
    image, theta = picture(1, 2, 6, 5).float().to(backend), matrices(1, 2).float().to(backend)
    plain = tri_stn.warp(image, tri_stn.Affine(theta), (4, 3))
    for one in (1, np.int64(1)):
        assert torch.equal(tri_stn.warp(image, tri_stn.Affine(theta), (4, 3), supersample=one), plain)


TURN = (0.5**0.5, -(0.5**0.5), 0.5**0.5, 0.5**0.5)
SHRINKS = {  # what one output pixel spans in a square image → samples along each axis
    "as it is": ((1, 0, 0, 1), 1),
    "enlarged": ((0.3, 0, 0, 0.3), 1),
    "half": ((2, 0, 0, 2), 2),
    "a little less than half": ((2.009, 0, 0, 2), 2),
    "a little more than half": ((2.02, 0, 0, 2), 3),
    "by 3.3": ((3.3, 0, 0, 3.3), 4),
    "along one axis": ((1, 0, 0, 3), 3),
    "turned": (tuple(2 * t for t in TURN), 2),
    "sheared": ((1, 1.2, 0, 1), 2),
}


def test_antialias_takes_as_many_samples_as_each_map_shrinks(backend):
    """One batch, maps of their own; as each one alone with its number of samples."""
    image = picture(len(SHRINKS), 1, 6, 6).to(backend)
    theta = torch.zeros(len(SHRINKS), 2, 3, dtype=DOUBLE, device=backend)
    for i, ((a, b, c, d), _) in enumerate(SHRINKS.values()):
        theta[i] = torch.tensor([[a, b, 0.03], [c, d, -0.02]])
    given = image.requires_grad_(), theta.requires_grad_()
    output = tri_stn.warp(image, tri_stn.Affine(theta), antialias=True, padding_mode="reflection")
    gradients = torch.autograd.grad(output.square().sum(), given)
    parts = [
        tri_stn.warp(image[i : i + 1], tri_stn.Affine(theta[i : i + 1]), supersample=k, padding_mode="reflection")
        for i, (_, k) in enumerate(SHRINKS.values())
    ]
    expected = torch.cat(parts)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients, torch.autograd.grad(expected.square().sum(), given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_antialias_takes_at_most_sixteen_samples_along_an_axis(backend):
    image = picture(1, 1, 40, 40)
    theta = torch.eye(2, 3, dtype=DOUBLE)[None]
    output = tri_stn.warp(image, tri_stn.Affine(theta), (1, 2), antialias=True)
    torch.testing.assert_close(output, truth(image, theta, (1, 2), 16))


def projective_truth(image, matrix, size, **options):
    """The number of samples of each pixel from differences across it, found apart from the sampler."""
    scale = torch.tensor([n / 2 for n in reversed(image.shape[2:])], dtype=DOUBLE)
    points = fine_points(size, 1, False)
    steps = []
    for axis in range(len(size)):
        half = torch.zeros(len(size), dtype=DOUBLE)
        half[axis] = 1 / size[len(size) - 1 - axis]
        ends = []
        for place in (points - half, points + half):
            rows = torch.cat([place, torch.ones_like(place[..., :1])], -1) @ matrix.detach()[0].mT
            ends.append(rows[..., :-1] / rows[..., -1:] * scale)
        steps.append((ends[1] - ends[0]).norm(dim=-1))
    number = (torch.stack(steps).amax(0) - 0.01).ceil().clamp(1, 16).int()
    assert len(number.unique()) > 2
    return sum(truth(image, matrix, size, int(k), **options) * (number == k) for k in number.unique())


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_antialias_of_a_projective_map_is_each_pixels_own(backend, padding_mode):
    matrix = torch.tensor([[[0.7, 0.05, 0.02], [0.03, 0.7, 0.01], [0.35, 0.3, 0.9]]], dtype=DOUBLE)
    check(
        backend, picture(1, 2, 7, 6), matrix, (4, 5), 0, transform=tri_stn.Projective, padding_mode=padding_mode,
        expected=lambda x, m: projective_truth(x, m, (4, 5), padding_mode=padding_mode),
    )  # fmt: skip


def test_supersampling_of_a_projective_map(backend):
    check(backend, picture(1, 2, 6, 5), matrices(1, 2, last=0.1), (3, 2), 3, transform=tri_stn.Projective)


def test_supersampling_of_a_chain_is_the_average_of_a_finer_output(backend):
    """Without align_corners, the samples are the pixels of an output of twice the size."""
    image, lattice = picture(1, 2, 7, 6).to(backend), (0.3 * picture(1, 5, 4, 2) - 0.1).to(backend)
    given = image.requires_grad_(), lattice.requires_grad_()
    output = tri_stn.warp(image, tri_stn.FreeForm(lattice), (3, 4), supersample=2)
    expected = F.avg_pool2d(tri_stn.warp(image, tri_stn.FreeForm(lattice), (6, 8)), 2)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    g = picture(*output.shape, seed=1).to(backend)
    got, want = torch.autograd.grad(output, given, g), torch.autograd.grad(expected, given, g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
def test_antialias_of_a_chain_as_the_reference(backend, monkeypatch):
    image, lattice = picture(1, 2, 9, 8), 0.8 * picture(1, 4, 4, 2) - 0.4

    def run(device):
        given = image.to(device).requires_grad_(), lattice.to(device).requires_grad_()
        output = tri_stn.warp(given[0], tri_stn.FreeForm(given[1]), (3, 4), antialias=True, padding_mode="border")
        return output.cpu(), *(t.cpu() for t in torch.autograd.grad(output.square().sum(), given))

    actual = run(backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for got, want in zip(actual, run("cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "sampling,mode,padding_mode", covering([("affine", 2), ("affine", 0), ("projective", 0)], MODES, PADDING_MODES)
)
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_gradcheck(backend, sampling, mode, padding_mode):
    """First and second order, reverse and forward mode: against differences in fp64."""
    kind, k = sampling
    theta = matrices(1, 2, scale=1.4, spread=0.1, last=0.1 if kind == "projective" else 0.0)
    inputs = picture(1, 1, 3, 4).requires_grad_(), theta.requires_grad_()
    transform = tri_stn.Projective if kind == "projective" else tri_stn.Affine
    choice = {"antialias": True} if k == 0 else {"supersample": k}

    def sample(image, theta):
        return tri_stn.warp(image, transform(theta), (3, 3), mode=mode, padding_mode=padding_mode, **choice)

    assert gradcheck(sample, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(sample, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("kind,k", [("affine", 2), ("affine", 0), ("projective", 0)])
@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
def test_kernels_change_as_the_reference_does(backend, monkeypatch, kind, k, padding_mode):
    """Each operator along a random direction: what second derivatives and forward mode are made of."""
    image, g = picture(1, 2, 4, 5), picture(1, 2, 2, 3, seed=2)
    theta = matrices(1, 2, scale=0.9, spread=0.1, last=0.1 if kind == "projective" else 0.0).unsqueeze(1)
    changes = picture(*image.shape, seed=3), picture(*theta.shape, seed=4)
    options = kind, "bilinear", padding_mode, False, k

    def run(device):
        x, t, grad_output, dx, dt = (tensor.to(device) for tensor in (image, theta, g, *changes))
        operators = torch.ops.tri_stn
        tensors = x, t, None, None, dx, dt
        return [
            operators.warp_forward(*tensors, (2, 3), "", False, *options)[0],
            *operators.warp_backward(grad_output, *tensors, (4, 5), False, True, True, False, *options)[:2],
        ]

    actual = run(backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for got, want in zip(actual, run("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@pytest.mark.parametrize("transform,last", [(tri_stn.Affine, 0.0), (tri_stn.Projective, 0.1)])
def test_deterministic_sums(backend, monkeypatch, transform, last):
    """In fixed point, the gradients are the same to the precision of the image."""
    image, theta = picture(1, 2, 4, 5).to(backend).requires_grad_(), matrices(1, 2, last=last).to(backend)
    g = picture(1, 2, 2, 3, seed=1).to(backend)

    def gradient():
        output = tri_stn.warp(image, transform(theta), (2, 3), antialias=True, padding_mode="reflection")
        return torch.autograd.grad(output, image, g)[0]

    free = gradient()
    monkeypatch.setattr(tri_stn.ops, "is_deterministic", lambda: True)
    torch.testing.assert_close(gradient(), free, rtol=1e-10, atol=1e-10)


def test_fill_and_mask_are_averaged_too(backend):
    """The mask is the share of all samples, 1 where none of them misses, and a fill takes the rest."""
    image, theta = picture(1, 2, 6, 5).to(backend), matrices(1, 2, scale=2.0, spread=0.0).to(backend)
    fill = torch.tensor([2.0, -1.0], device=backend, dtype=DOUBLE)
    output, mask = tri_stn.warp(image, tri_stn.Affine(theta), (5, 6), supersample=3, fill=fill, return_mask=True)
    ones = tri_stn.warp(torch.ones_like(image), tri_stn.Affine(theta), (5, 6), supersample=3)
    plain = tri_stn.warp(image, tri_stn.Affine(theta), (5, 6), supersample=3)
    torch.testing.assert_close(mask, ones[:, :1])
    torch.testing.assert_close(output, plain + fill[:, None, None] * (1 - mask))
    assert (mask == 1).any() and (mask == 0).any()


def test_shrinking_by_an_integer_is_pillows_box_filter(backend):
    """There the samples lie on the pixels, and their average is the box filter's. Apart from rounding to fp32, so the
    error is small against 255; plain bilinear reads 4 of 36 pixels.
    """
    image = pytest.importorskip("PIL.Image")
    data = pytest.importorskip("skimage.data")
    photo = data.astronaut()[90:150, 180:240].astype(np.float32)  # the eyes have edges enough
    bands = [image.fromarray(np.ascontiguousarray(photo[..., c])) for c in range(3)]
    pillow = np.stack([np.asarray(band.resize((10, 10), image.Resampling.BOX)) for band in bands])
    given = torch.from_numpy(photo).permute(2, 0, 1)[None].contiguous().to(backend)
    errors = []
    for antialias in (True, False):
        theta = torch.eye(2, 3, device=backend)[None]
        output = tri_stn.warp(given, tri_stn.Affine(theta), (10, 10), padding_mode="border", antialias=antialias)
        errors.append(float((output[0].cpu() - torch.from_numpy(pillow)).abs().mean()))
    assert errors[0] < 1e-3 and errors[1] > 5, errors


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_function_transforms(backend):
    image, theta = picture(3, 1, 5, 4), matrices(3, 2)

    def sampled(x, t):
        return tri_stn.warp(x[None], tri_stn.Affine(t[None]), (2, 3), antialias=True)[0]

    expected = tri_stn.warp(image, tri_stn.Affine(theta), (2, 3), antialias=True)
    torch.testing.assert_close(vmap(sampled)(image, theta), expected)
    each = vmap(grad(lambda t, x: sampled(x, t).square().sum()))(theta, image)
    given = theta.requires_grad_()
    (whole,) = torch.autograd.grad(
        tri_stn.warp(image, tri_stn.Affine(given), (2, 3), antialias=True).square().sum(), given
    )
    torch.testing.assert_close(each, whole)
    torch._dynamo.reset()
    compiled = torch.compile(sampled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image[0], theta[0].detach()), expected[0].detach())


@pytest.mark.parametrize(
    "backend,in_dims",
    [("kernels", (0, None, 0)), *[("reference", dims) for dims in ((0, 0, 0), (0, None, None), (None, 0, None))]],
    indirect=["backend"],
)
def test_vmap_of_a_chain(backend, in_dims):
    """With the first derivatives around it; a spline, and a chain of a matrix and a field."""
    theta, image = matrices(3, 2, 2.0).unsqueeze(1), picture(3, 2, 1, 5, 4)
    points, field = 2 * picture(4, 2, seed=1) - 1, 0.2 * picture(3, 1, 2, 3, 2, seed=2)
    moved = points + 0.2 * picture(3, 1, 4, 2, seed=3)
    spline = lambda x, t, _: tri_stn.ThinPlateSpline(points.to(x), t)  # noqa: E731
    chain = lambda x, t, f: tri_stn.Compose(tri_stn.Affine(t), tri_stn.Displacement(f))  # noqa: E731
    for build, maps in ((spline, moved), (chain, theta)):
        given = [
            (t if dim == 0 else t[0]).to(backend).requires_grad_()
            for t, dim in zip((image, maps, field), in_dims, strict=True)
        ]
        one = lambda *tensors: tri_stn.warp(tensors[0], build(*tensors), (2, 3), supersample=2)  # noqa: B023, E731
        each = [[t if dim is None else t[i] for t, dim in zip(given, in_dims, strict=True)] for i in range(3)]
        found = []
        for output in (vmap(one, in_dims)(*given), torch.stack([one(*tensors) for tensors in each])):
            used = given if build is chain else given[:2]
            found.append([output, *torch.autograd.grad(output.square().sum(), used)])
        torch.testing.assert_close(*found)


def test_derivatives_that_a_chain_of_several_samples_lacks_are_refused(backend):
    image = picture(1, 1, 5, 4).to(backend)

    def loss(lattice):
        return tri_stn.warp(image, tri_stn.FreeForm(lattice), (2, 3), antialias=True).sum()

    lattice = torch.zeros(2, 1, 5, 5, 2, dtype=DOUBLE, device=backend)
    for transform in (grad(loss), jacfwd(loss)):
        for call in (transform, vmap(transform)):
            with pytest.raises(NotImplementedError, match="take vmap alone"):
                call(lattice if call is not transform else lattice[0])


@pytest.mark.parametrize(
    "error,message,arguments",
    [
        (ValueError, "Leave one out", {"antialias": True, "supersample": 2}),
        (ValueError, "at least 1", {"supersample": 0}),
        (TypeError, "an integer", {"supersample": 2.0}),
        (TypeError, "an integer", {"supersample": True}),
        (TypeError, "True or False", {"antialias": 1}),
        (ValueError, "2 \\*\\* 24", {"supersample": 2**23}),
    ],
)
def test_bad_choices(error, message, arguments):
    with pytest.raises(error, match=message):
        tri_stn.warp(torch.rand(1, 1, 4, 4), tri_stn.Affine(torch.eye(2, 3)[None]), **arguments)


@pytest.mark.parametrize(
    "transform", [tri_stn.Grid(torch.rand(1, 3, 3, 2)), tri_stn.Displacement(torch.rand(1, 3, 3, 2))]
)
@pytest.mark.parametrize("arguments", [{"antialias": True}, {"supersample": 2}])
def test_a_dense_map_has_one_place_per_pixel(transform, arguments):
    with pytest.raises(ValueError, match="Give a parametric transform"):
        tri_stn.warp(torch.rand(1, 1, 4, 4), transform, **arguments)
