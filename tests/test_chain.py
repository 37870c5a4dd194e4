"""Parametric maps and chains of them: against grids built in fp64 by other means, and all their derivatives."""

import copy
import io
import os
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from scipy.interpolate import BSpline, RBFInterpolator
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from user_maps import (
    LogPolar,
    RadialDistortion,
    barrel,
    barrel_in_torch,
    barrel_vjp,
    radial,
    radial_in_torch,
    radial_vjp,
)

import tri_stn
from tri_stn import ops
from tri_stn.testing import assert_accurate

TARGETS = torch.tensor([[-0.9, -0.8], [0.8, -0.9], [0.9, 0.7], [-0.7, 0.9], [0.1, 0.0], [-0.3, 0.4]])
CORNERS = torch.tensor([[-1.1, -1], [1, -1.2], [1.1, 0.6], [-1, 1], [0.1, 0.2]])
TRIANGLES = torch.tensor([[0, 1, 4], [1, 2, 4], [3, 2, 4], [3, 0, 4]])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Each map: its parameters, for a batch; from those, the transform; and in numpy, where points (P, d) go.
def spline_basis(count, u):
    """All cubic B-splines of the lattice at u, (P, count): scipy's, on the same knots."""
    h = 2 / (count - 3)
    knots = -1 + h * (np.arange(count + 4) - 3)
    return np.stack(
        [BSpline(knots, np.eye(count)[i], 3, extrapolate=False)(u.clip(-1, 1 - 1e-12)) for i in range(count)], 1
    )


def free_form_2d(p, lattice):
    return p + np.einsum("pi,pj,ijd->pd", spline_basis(5, p[:, 1]), spline_basis(6, p[:, 0]), lattice)


def free_form_3d(p, lattice):
    basis = [spline_basis(n, p[:, a]) for a, n in ((2, 4), (1, 5), (0, 4))]
    return p + np.einsum("pi,pj,pk,ijkd->pd", *basis, lattice)


def thin_plate(p, source):
    return RBFInterpolator(TARGETS.double().numpy(), source, kernel="thin_plate_spline", degree=1)(p)


def triangles(p, source):
    result = np.full(p.shape, 1e5)
    for corners in reversed(TRIANGLES.tolist()):
        columns = np.concatenate([CORNERS[corners].double().numpy().T, np.ones((1, 3))])
        shares = np.linalg.solve(columns, np.concatenate([p.T, np.ones((1, len(p)))]))
        inside = (shares >= -1e-6).all(0)
        result[inside] = (shares.T @ source[corners])[inside]
    return result


def rotation_and_shift(p, theta):
    return p @ theta[:, :-1].T + theta[:, -1]


def chained(p, theta, lattice, source):
    return thin_plate(free_form_2d(rotation_and_shift(p, theta), lattice).clip(-3, 3), source)


def lens(p, k1, k2):
    square = (p**2).sum(1, keepdims=True)
    return p * (1 + k1 * square + k2 * square**2)


def log_polar(p, centre, radius, rate):
    r = radius * np.exp((p[:, 1] - 1) * rate)
    return centre + np.stack([r * np.cos(np.pi * p[:, 0]), r * np.sin(np.pi * p[:, 0])], 1)


def near_identity(batch):
    return torch.eye(2, 3) + 0.1 * randn(*batch, 2, 3)


MAPS = {
    "thin_plate": (
        lambda b: [TARGETS + 0.15 * randn(*b, 6, 2)],
        lambda s: tri_stn.ThinPlateSpline(TARGETS.to(s.device), s),
        thin_plate,
    ),
    "free_form": (lambda b: [0.2 * randn(*b, 5, 6, 2)], tri_stn.FreeForm, free_form_2d),
    "free_form_3d": (lambda b: [0.2 * randn(*b, 4, 5, 4, 3)], tri_stn.FreeForm, free_form_3d),
    "triangles": (
        lambda b: [CORNERS + 0.15 * randn(*b, 5, 2)],
        lambda s: tri_stn.PiecewiseAffine(CORNERS.to(s.device), TRIANGLES.to(s.device), s),
        triangles,
    ),
    "chain": (
        lambda b: [near_identity(b), 0.1 * randn(*b, 5, 6, 2), TARGETS + 0.1 * randn(*b, 6, 2)],
        lambda theta, lattice, s: tri_stn.Compose(
            tri_stn.Affine(theta), tri_stn.FreeForm(lattice), tri_stn.ThinPlateSpline(TARGETS.to(s.device), s)
        ),
        chained,
    ),
    "radial": (lambda b: [0.1 * randn(*b), 0.05 * randn(*b, seed=1)], RadialDistortion, lens),
    "log_polar": (
        lambda b: [0.1 * randn(*b, 2), 0.8 + 0.1 * randn(*b, 1), 1.5 + 0.1 * randn(*b, 1)],
        LogPolar,
        log_polar,
    ),
}
SIZES = {2: ((5, 6), (7, 6)), 3: ((3, 4, 3), (3, 4, 5))}
OPTIONS = [("bilinear", "zeros", False), ("bilinear", "border", True), ("bicubic", "reflection", False)]


def sizes(name):
    return SIZES[3 if name.endswith("3d") else 2]


def points(size, align_corners):
    """The output's pixels in normalised coordinates, (P, d), x first."""
    axes = [(np.arange(n) - (n - 1) / 2) / ((n - 1) / 2 if align_corners else n / 2) for n in size]
    return np.stack([a.ravel() for a in reversed(np.meshgrid(*axes, indexing="ij"))], 1)


def exact_grid(name, parameters, align_corners):
    """(maps, *size, d), by the numpy twin."""
    size, _ = sizes(name)
    places, formula = points(size, align_corners), MAPS[name][2]
    maps = [formula(places, *(q.double().numpy() for q in one)) for one in zip(*parameters, strict=True)]
    return torch.from_numpy(np.stack(maps)).unflatten(1, size)


def both(monkeypatch, function):
    """A function's tensors through the kernels, and through the reference."""
    kernels = function(DEVICE)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return kernels, function("cpu")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_looks_where_the_formula_says(backend, name, align_corners):
    """fp32, against F.grid_sample in fp64 on a grid from scipy or numpy."""
    make, transform, _ = MAPS[name]
    size, input_size = sizes(name)
    parameters, image = make((2,)), torch.rand(2, 3, *input_size, generator=torch.Generator().manual_seed(2))
    output = tri_stn.warp(
        image.to(backend), transform(*(p.to(backend) for p in parameters)), size,
        padding_mode="border", align_corners=align_corners,
    ).cpu()  # fmt: skip
    grid = exact_grid(name, parameters, align_corners)
    truth = F.grid_sample(image.double(), grid, padding_mode="border", align_corners=align_corners)
    assert_accurate(output, truth, image_dtype=torch.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_kernels_and_reference_agree(monkeypatch, name, options):
    """In fp64: values and all gradients, two maps for each of two images (of one volume); the same pixels are read."""
    if name.endswith("3d") and options[0] == "bicubic":
        pytest.skip("64 corners by 64 control points take minutes in the interpreter, and meet no other line")
    make, transform, _ = MAPS[name]
    size, input_size = sizes(name)
    mode, padding_mode, align_corners = options

    images = 1 if name.endswith("3d") else 2

    def run(device):
        generator = torch.Generator().manual_seed(3)
        image = torch.rand(images, 2, *input_size, generator=generator, dtype=torch.float64)
        leaves = [t.to(device).double().requires_grad_() for t in (image, *make((images, 2)))]
        output = tri_stn.warp(
            leaves[0], transform(*leaves[1:]), size, mode=mode, padding_mode=padding_mode, align_corners=align_corners
        )
        grad = torch.rand(output.shape, generator=generator, dtype=torch.float64).to(device)
        return [output, *torch.autograd.grad(output, leaves, grad)]

    for got, want in zip(*both(monkeypatch, run), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("name", MAPS)
def test_derivatives(backend, name):
    """First and second, backward and forward, in all parameters."""
    make, transform, _ = MAPS[name]
    size, input_size = sizes(name)
    size, input_size = tuple(min(n, 3) for n in size), tuple(min(n, 4) for n in input_size)
    image = torch.rand(1, 1, *input_size, generator=torch.Generator().manual_seed(4))
    leaves = [t.double().requires_grad_() for t in (image, *make((1,)))]

    def run(image, *parameters):
        return tri_stn.warp(image, transform(*parameters), size, padding_mode="border")

    assert gradcheck(run, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["thin_plate", "triangles"])
def test_changes_along_a_direction(monkeypatch, name):
    """The kernels have the second derivatives of a map that is linear in its numbers."""
    make, transform, _ = MAPS[name]

    def run(device):
        image = torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(5))
        leaves = [t.to(device).double().requires_grad_() for t in (image, *make((1,)))]
        output = tri_stn.warp(leaves[0], transform(*leaves[1:]), (4, 3), padding_mode="border")
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for got, want in zip(*both(monkeypatch, run), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MAPS)
def test_splat_is_the_adjoint(backend, name):
    make, transform, _ = MAPS[name]
    size, input_size = sizes(name)
    generator = torch.Generator().manual_seed(6)
    image, other = (
        torch.rand(2, 1, *s, generator=generator, dtype=torch.float64).to(backend) for s in (input_size, size)
    )
    maps = transform(*(p.to(backend).double() for p in make((2,))))
    one = (tri_stn.warp(image, maps, size) * other).sum()
    two = (image * tri_stn.splat(other, maps, input_size)).sum()
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


# --- chains with a field, and a basis ----------------------------------------------------------------


def field_chain(theta, field, unit="normalized"):
    return tri_stn.Compose(tri_stn.Affine(theta), tri_stn.Displacement(field, unit=unit))


def in_torch(theta, field, size, input_size, unit, align_corners):
    """b(a(p)) by F.affine_grid and F.grid_sample."""
    grid = F.affine_grid(theta, [len(theta), 1, *size], align_corners=align_corners)
    moved = F.grid_sample(field.movedim(-1, 1), grid, padding_mode="border", align_corners=align_corners).movedim(1, -1)
    if unit == "pixel":
        moved = moved / torch.tensor([(n - align_corners) / 2 for n in reversed(input_size)], dtype=moved.dtype)
    return grid + moved


@pytest.mark.parametrize("unit", ["normalized", "pixel"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_affine_then_displacement(backend, unit, align_corners):
    """In one kernel, with gradients to all three; the field may have a size of its own."""
    theta, field = near_identity((2,)).double(), 0.2 * randn(2, 4, 3, 2).double()
    image = torch.rand(2, 2, 5, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    options = {"padding_mode": "border", "align_corners": align_corners}
    leaves = [t.to(backend).requires_grad_() for t in (image, theta, field)]
    output = tri_stn.warp(leaves[0], field_chain(*leaves[1:], unit), (4, 5), **options)
    exact = [t.requires_grad_() for t in (image, theta, field)]
    truth = F.grid_sample(exact[0], in_torch(*exact[1:], (4, 5), (5, 6), unit, align_corners), **options)
    grad = torch.rand(output.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    got = [output, *torch.autograd.grad(output, leaves, grad.to(backend))]
    for actual, expected in zip(got, [truth, *torch.autograd.grad(truth, exact, grad)], strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_field_in_a_chain(backend, dtype):
    """Its gradient is summed in fp32 and rounded once; coordinates are fp32."""
    theta, field = near_identity((1,)), (0.2 * randn(1, 4, 3, 2)).to(dtype)
    image = torch.rand(1, 2, 5, 6, generator=torch.Generator().manual_seed(9))

    def run(image, theta, field, device):
        leaf = field.to(device).requires_grad_()
        output = tri_stn.warp(image.to(device), field_chain(theta.to(device), leaf), (4, 5), padding_mode="border")
        return output.cpu(), torch.autograd.grad(output.sum(), leaf)[0].cpu()

    got, want = run(image, theta, field, backend), run(image.double(), theta.double(), field.double(), backend)
    assert_accurate(got[0], want[0], image_dtype=torch.float32)
    assert got[1].dtype == dtype
    assert_accurate(got[1], want[1], image_dtype=torch.float32)


@pytest.mark.parametrize("maps", [(2,), (2, 3)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_linear_basis(backend, dims, maps):
    """x(p) = Σ_b coefficients · basis(p), gradients to both; one basis for all maps."""
    size, input_size = (3, 4, 2)[:dims], (4, 3, 3)[:dims]
    coefficients, basis = 0.4 * randn(*maps, dims, 3).double(), randn(3, *size, seed=1).double()
    image = torch.rand(2, 2, *input_size, generator=torch.Generator().manual_seed(10), dtype=torch.float64)

    def run(make):
        leaves = [t.to(backend).requires_grad_() for t in (image, coefficients, basis)]
        output = tri_stn.warp(leaves[0], make(*leaves[1:]), padding_mode="border")
        grad = torch.linspace(0, 1, output.numel(), dtype=output.dtype).view(output.shape)
        return [output, *torch.autograd.grad(output, leaves, grad.to(backend))]

    def grid(coefficients, basis):
        places = torch.einsum("nkb,bp->npk", coefficients.flatten(0, -3), basis.flatten(1))
        return tri_stn.Grid(places.view(*maps, *size, dims))

    grids = run(grid)
    for got, want in zip(run(tri_stn.LinearBasis), grids, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_derivatives_of_chains_with_fields(backend):
    image = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(11)).double().requires_grad_()
    for make, parameters in (
        (field_chain, [near_identity((1,)), 0.2 * randn(1, 3, 3, 2)]),
        (tri_stn.LinearBasis, [0.4 * randn(1, 2, 3), randn(3, 3, 2, seed=1)]),
    ):
        leaves = [image, *(p.double().requires_grad_() for p in parameters)]

        def run(image, *parameters, make=make):
            return tri_stn.warp(image, make(*parameters), (3, 2), padding_mode="border")

        assert gradcheck(run, leaves, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(run, leaves, fast_mode=True)


# --- what chains do beside --------------------------------------------------------------------------


def test_neighbouring_matrices_become_one(backend):
    a, b = near_identity((2,)).to(backend), near_identity((1,)).to(backend)
    chain = tri_stn.Compose(tri_stn.Affine(a), tri_stn.Affine(b))
    assert chain.kind == "affine" and chain.parameters.shape == (2, 2, 3)
    image = torch.rand(2, 1, 5, 5, device=backend)
    joined = tri_stn.Affine(tri_stn.compose(a, b))
    torch.testing.assert_close(tri_stn.warp(image, chain), tri_stn.warp(image, joined))


@pytest.mark.parametrize("images,maps", [(2, (1,)), (1, (3,)), (1, (3, 2)), (2, (1, 2))])
def test_batches(backend, images, maps):
    """One image for many chains, one chain for many images, K of them, and a link that serves all."""
    theta, source = near_identity(maps).to(backend), (TARGETS + 0.1 * randn(1, 6, 2)).to(backend)
    field = (0.1 * randn(*maps, 4, 4, 2)).to(backend)
    image = torch.rand(images, 2, 5, 4, device=backend)
    plate = tri_stn.ThinPlateSpline(TARGETS.to(backend), source)
    output = tri_stn.warp(image, tri_stn.Compose(tri_stn.Affine(theta), plate, tri_stn.Displacement(field)), (3, 4))
    batch = torch.broadcast_shapes((images,) if len(maps) == 1 else (images, 1), maps)
    assert output.shape == (*batch, 2, 3, 4)
    for index in np.ndindex(*batch):
        at = tuple(i if n > 1 else 0 for i, n in zip(index, maps, strict=True))
        one = tri_stn.Compose(tri_stn.Affine(theta[at][None]), plate, tri_stn.Displacement(field[at][None]))
        expected = tri_stn.warp(image[index[0] if images > 1 else 0][None], one, (3, 4))
        torch.testing.assert_close(output[index], expected[0])


def affine_and_field(numbers, field):
    return tri_stn.Compose(tri_stn.Affine(numbers), tri_stn.Displacement(field.movedim(0, -1)[None]))


@pytest.mark.parametrize("build", [tri_stn.LinearBasis, affine_and_field])
@pytest.mark.parametrize("maps", [0, 1])
def test_no_images(backend, maps, build):
    """One field that serves them all makes no image of them."""
    given = (
        torch.rand(0, 3, 5, 4),
        torch.rand(maps, 2, 3),
        torch.rand(*(3, 4, 3) if build is tri_stn.LinearBasis else (2, 4, 3)),
    )
    given = [t.to(backend).requires_grad_() for t in given]
    output, mask = tri_stn.warp(given[0], build(*given[1:]), (4, 3), return_mask=True)
    assert output.shape == (0, 3, 4, 3) and mask.shape == (0, 1, 4, 3)
    for gradient in torch.autograd.grad(output.sum(), given):
        assert (gradient == 0).all()
    assert tri_stn.splat(output.detach(), build(*given[1:]), (5, 4)).shape == (0, 3, 5, 4)


@pytest.mark.parametrize("fields", [1, 2])
def test_many_gradients_of_a_field(backend, fields):
    """Of the output, by torch.func.vmap, and each with a field's gradient of its own."""
    image, theta, field = (
        t.double().to(backend) for t in (randn(2, 3, 5, 4), randn(2, 2, 3, seed=1), randn(fields, 4, 3, 2))
    )
    given = [t.requires_grad_() for t in (image, theta, field)]
    output = tri_stn.warp(given[0], tri_stn.Compose(tri_stn.Affine(given[1]), tri_stn.Displacement(given[2])))
    along = randn(2, *output.shape).to(output)

    def gradients(g):
        return torch.autograd.grad(output, given, g, retain_graph=True)

    for found, *expected in zip(torch.vmap(gradients)(along), *map(gradients, along), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("name", ["thin_plate", "chain"])
def test_func_transforms_and_compile(backend, name):
    make, transform, _ = MAPS[name]
    image, parameters = torch.rand(1, 4, 5, device=backend), [p[0].to(backend) for p in make((1,))]

    def loss(image, *parameters):
        return tri_stn.warp(image[None], transform(*(p[None] for p in parameters)), (3, 3)).square().sum()

    inputs = [t.clone().requires_grad_() for t in (image, *parameters)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.func.grad(loss, tuple(range(len(inputs))))(image, *parameters)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b, c in zip(got, torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)  # fp32, summed in another order
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["free_form", "triangles", "field", "radial"])
def test_the_default_device_decides_nothing(backend, name):
    """Where a chain becomes a stored grid, either."""
    fields = lambda b: [near_identity(b), 0.1 * randn(*b, 3, 4, 2)], field_chain, None
    make, transform, _ = fields if name == "field" else MAPS[name]
    image, parameters = torch.rand(1, 1, 4, 5, device=backend), [p.to(backend) for p in make((1,))]

    def loss(*parameters):
        return tri_stn.warp(image, transform(*parameters), (3, 3)).square().sum()

    differentiate = torch.func.grad(loss, tuple(range(len(parameters))))
    expected = differentiate(*parameters)
    with torch.device("meta"):
        got = differentiate(*parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # fp32, on a GPU summed in any order


def test_maps_are_registered_whatever_the_default_device():
    with torch.device("meta"):
        tri_stn.register_transform("anywhere", radial, radial_vjp, radial_in_torch, ("k1", "k2"))


def test_deterministic_sums(backend, monkeypatch):
    """Then a chain goes through a stored grid: the same numbers."""
    make, transform, _ = MAPS["chain"]
    inputs = [t.to(backend).requires_grad_() for t in (torch.rand(1, 1, 4, 5), *make((1,)))]

    def run():
        output = tri_stn.warp(inputs[0], transform(*inputs[1:]), (3, 3), padding_mode="border")
        return torch.autograd.grad(output.sum(), inputs)

    expected = run()
    monkeypatch.setattr(ops, "is_deterministic", lambda: True)
    for got, want in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # fp32, summed in another order


def test_thin_plates_pass_through_their_points_and_are_solved_once(monkeypatch):
    targets, source = TARGETS.clone(), TARGETS + 0.1 * randn(1, 6, 2)
    calls = []
    solve = torch.linalg.inv_ex
    monkeypatch.setattr(torch.linalg, "inv_ex", lambda *a: calls.append(1) or solve(*a))
    for _ in range(3):
        tri_stn.ThinPlateSpline(targets, source).parameters  # noqa: B018  the property computes
    assert len(calls) == 1
    targets += 0.1
    tri_stn.ThinPlateSpline(targets, source).parameters  # noqa: B018
    assert len(calls) == 2, "changed in place, so solved again"


@pytest.mark.parametrize("solved_in", [torch.inference_mode, lambda: FakeTensorMode(allow_non_fake_inputs=True)])
def test_what_a_mode_solved_serves_nobody_else(solved_in):
    targets, source = TARGETS.clone(), (TARGETS + 0.1 * randn(1, 6, 2)).requires_grad_()
    image = torch.rand(1, 1, 4, 4)
    with solved_in():
        tri_stn.warp(image, tri_stn.ThinPlateSpline(targets, source))
    output = tri_stn.warp(image, tri_stn.ThinPlateSpline(targets, source))
    assert type(output) is torch.Tensor and torch.autograd.grad(output.sum(), source)[0].any()


def test_thin_plates_of_inference_tensors():
    """Which count no versions."""
    image = torch.rand(1, 1, 4, 4)
    with torch.inference_mode():
        targets, source = TARGETS.clone(), TARGETS + 0.1 * randn(1, 6, 2)
        inside = [tri_stn.warp(image, tri_stn.ThinPlateSpline(targets, source)) for _ in range(2)]
        targets += 0.1
        moved = tri_stn.warp(image, tri_stn.ThinPlateSpline(targets, source))
    outside = source.clone().requires_grad_()
    output = tri_stn.warp(image, tri_stn.ThinPlateSpline(targets, outside))
    assert torch.equal(*inside) and not torch.equal(inside[0], moved) and torch.equal(moved, output)
    assert torch.autograd.grad(output.sum(), outside)[0].any()


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
def test_a_name_registered_again_has_the_new_functions(backend):
    """Also where a launch of the old ones is remembered."""
    image, k = torch.rand(1, 1, 4, 4, device=backend), [torch.full((1,), 0.3, device=backend)] * 2
    outputs = []
    for functions in ((radial, radial_vjp, radial_in_torch), (barrel, barrel_vjp, barrel_in_torch)):
        outputs.append(tri_stn.warp(image, tri_stn.register_transform("again", *functions, ("k1", "k2"))(*k)))
    theta, place = [float(one) for one in k], torch.linspace(-0.75, 0.75, 4, device=backend)
    grid = torch.stack(barrel_in_torch(theta, (place[None, :].expand(4, 4), place[:, None].expand(4, 4))), -1)
    torch.testing.assert_close(outputs[1], tri_stn.grid_sample(image, grid[None], align_corners=False))
    assert not outputs[0].allclose(outputs[1])


@pytest.mark.parametrize("name", ["batch", "size", "parameters", "inverse", "_lengths", "k 1", 1])
def test_a_parameter_has_a_name_of_its_own(name):
    with pytest.raises(ValueError, match=f"names that transforms do not use themselves.*{name!r}"):
        tri_stn.register_transform("lens", radial, radial_vjp, radial_in_torch, (name, "k2"))


@pytest.mark.parametrize("which", ["map", "map_vjp", "reference"])
def test_what_is_registered_are_functions(which):
    functions = {"map": radial, "map_vjp": radial_vjp, "reference": radial_in_torch, which: None}
    with pytest.raises(TypeError, match=f"takes {which} as a function; got NoneType"):
        tri_stn.register_transform("lens", **functions, parameters=("k1", "k2"))


def test_registered_maps_are_pickled_by_the_name_of_their_class():
    lens = RadialDistortion(torch.rand(2), torch.rand(2))
    kind, other = pickle.loads(pickle.dumps((RadialDistortion, lens)))
    assert kind is RadialDistortion is type(other)
    assert torch.equal(other.parameters, lens.parameters) and other.batch == lens.batch


def test_transforms_of_a_registered_map_are_copied_and_pickled_wherever_their_class_is(monkeypatch, tmp_path):
    def copies(transform):
        file = io.BytesIO()
        torch.save(transform, file)
        file.seek(0)
        return copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), torch.load(file, weights_only=False)

    hidden = tri_stn.register_transform("hidden", radial, radial_vjp, radial_in_torch, {"k": 2})
    image, lens = torch.rand(2, 1, 4, 5), hidden(torch.rand(2, 2))
    for other in copies(tri_stn.Compose(lens, tri_stn.Affine(torch.rand(2, 2, 3)))):
        assert type(other.transforms[0]) is hidden and other.transforms[0].k is not lens.k
        assert torch.equal(other.transforms[0].k, lens.k)
    written = pickle.dumps(lens), pickle.dumps(RadialDistortion(torch.rand(2), torch.rand(2)))
    monkeypatch.setattr(tri_stn.extend, "_CLASSES", {})  # as in a new process
    monkeypatch.delitem(sys.modules, "user_maps")
    with pytest.raises(pickle.UnpicklingError, match=r"'hidden', which test_chain registered.*Call tri_stn.register_t"):
        pickle.loads(written[0])
    assert tri_stn.warp(image, pickle.loads(written[1])).shape == image.shape  # by importing user_maps


def test_registering_names_what_is_wrong():
    def wrong_reference(theta, point):
        x, y = radial_in_torch(theta, point)
        return x + 0 * theta[1], y + 0.1 * theta[1]

    if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
        pytest.skip("nowhere to run the functions")
    with pytest.raises(ValueError, match=r"register_transform\('lens'\).*map gives .* for y where the reference"):
        tri_stn.register_transform("lens", radial, radial_vjp, wrong_reference, ("k1", "k2"))

    def wrong_derivative(theta, point):
        return radial_in_torch((theta[0], theta[1].detach()), point)

    with pytest.raises(ValueError, match=r"map_vjp gives .* for the gradient of the parameter 'k2'"):
        tri_stn.register_transform("lens", radial, radial_vjp, wrong_derivative, ("k1", "k2"))
    with pytest.raises(ValueError, match="no built-in transform has; got 'affine'"):
        tri_stn.register_transform("affine", radial, radial_vjp, radial_in_torch, ("k1", "k2"))


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: tri_stn.ThinPlateSpline(TARGETS, torch.rand(1, 5, 2)), r"source_points \(N, 6, 2\).*got \(1, 5, 2\)"),
        (lambda: tri_stn.ThinPlateSpline(torch.rand(2, 2), torch.rand(1, 2, 2)), r"K >= 3; got \(2, 2\)"),
        (
            lambda: tri_stn.ThinPlateSpline(TARGETS.clone().requires_grad_(), torch.rand(1, 6, 2)),
            "no gradient for target",
        ),
        (
            lambda: tri_stn.Compose(tri_stn.Affine(torch.rand(2, 2, 3)), tri_stn.Displacement(torch.rand(2, 0, 9, 2))),
            r"at least one pixel; got a Displacement of size \(0, 9\)",
        ),
        (lambda: tri_stn.FreeForm(torch.rand(1, 3, 5, 2)), r"at least 4 control points.*got \(1, 3, 5, 2\)"),
        (lambda: tri_stn.PiecewiseAffine(CORNERS, TRIANGLES[:, :2], CORNERS[None]), r"triangles \(T, 3\).*\(4, 2\)"),
        (lambda: tri_stn.LinearBasis(torch.rand(1, 2, 3), torch.rand(4, 5, 5)), r"\(1, 2, 3\) and \(4, 5, 5\)"),
        (lambda: tri_stn.Compose(), "got none"),
        (lambda: tri_stn.Compose(tri_stn.Affine(torch.rand(2, 2, 3)), tri_stn.Affine(torch.rand(3, 2, 3))), "batch"),
        (lambda: tri_stn.Compose(*[tri_stn.Displacement(torch.rand(1, 3, 3, 2))] * 2), "Join them first"),
        (
            lambda: tri_stn.Compose(
                tri_stn.FreeForm(torch.rand(1, 4, 4, 2)), tri_stn.LinearBasis(torch.rand(1, 2, 3), torch.rand(3, 5, 5))
            ),
            "has to be the first",
        ),
        (lambda: RadialDistortion(torch.rand(2), torch.rand(3)), "one batch"),
    ],
)
def test_what_does_not_fit(call, says):
    with pytest.raises(ValueError, match=says):
        call()
