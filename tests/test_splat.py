"""splat: the exact adjoint of warp, with every transform and option."""

import os

import pytest
import torch
from test_warp import OPTIONS

import tri_stn
from tri_stn.testing import Case

SIZES = {1: ((7,), (5,)), 2: ((5, 4), (4, 6)), 3: ((3, 4, 2), (2, 3, 4))}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dims", SIZES)
@pytest.mark.parametrize("kind", ["affine", "projective", "grid", "displacement"])
def test_is_the_adjoint_of_warp(backend, kind, dims, options):
    """⟨warp(x), y⟩ = ⟨x, splat(y)⟩, to rounding in fp64."""
    if "TRITON_INTERPRET" in os.environ and (dims != 2 or kind == "displacement" or options["align_corners"]):
        pytest.skip("the interpreted kernels are the ones of warp's backward, tested there")
    if (kind, dims) == ("projective", 1):
        pytest.skip("a projective map takes 2-D and 3-D images")
    input_size, size = SIZES[dims]
    case = Case(kind=kind, maps=2, input_size=input_size, size=size, dtype=torch.float64, **options)
    image, parameters, other = case.tensors(backend)
    transform = case.transform(parameters)
    one = (tri_stn.warp(image, transform, size, **options) * other).sum()
    two = (image * tri_stn.splat(other, transform, input_size, **options)).sum()
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_dtypes(backend, dtype):
    image = torch.rand(1, 2, 3, 4, device=backend).to(dtype)
    transform = tri_stn.Affine(torch.tensor([[[0.5, 0.1, 0.0], [0.0, 0.6, 0.1]]], device=backend))
    output = tri_stn.splat(image, transform, (4, 5))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = tri_stn.splat(image.to(wide), transform, (4, 5))
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype))


def test_normalize_averages_overlaps_and_keeps_holes(backend):
    """Four pixels: two land on pixel 0, one halfway between 1 and 2, one outside; nothing on 3."""
    image = torch.tensor([[[1.0, 3.0, 5.0, 7.0]]], device=backend)
    x = torch.tensor([0.0, 0.0, 1.5, 9.0], device=backend)
    grid = tri_stn.Grid((2 * x / 3 - 1)[None, :, None])
    total = tri_stn.splat(image, grid, (4,), align_corners=True)
    torch.testing.assert_close(total.flatten(), torch.tensor([4.0, 2.5, 2.5, 0.0], device=backend))
    average = tri_stn.splat(image, grid, (4,), align_corners=True, normalize=True)
    torch.testing.assert_close(average.flatten(), torch.tensor([2.0, 5.0, 5.0, 0.0], device=backend))


def test_normalize_counts_beyond_16_bits(backend):
    """257 pixels on one: a count that bf16 cannot hold. Ones average to one."""
    image = torch.ones(1, 1, 257, device=backend, dtype=torch.bfloat16)
    grid = tri_stn.Grid(torch.zeros(1, 257, 1, device=backend))
    output = tri_stn.splat(image, grid, (1,), normalize=True)
    torch.testing.assert_close(output.flatten().float(), torch.ones(1, device=backend), rtol=2**-8, atol=0)


@pytest.mark.parametrize("inputs,maps", [((3,), (3,)), ((3,), (1,)), ((1,), (3,)), ((2, 3), (2, 3)), ((2, 3), (1, 3))])
def test_batches(backend, inputs, maps):
    """N inputs through N maps, or either of them one; K inputs of an image are added up."""
    image, theta = torch.rand(*inputs, 2, 3, 4, device=backend), torch.eye(2, 3, device=backend) * 0.7
    theta = theta + 0.2 * torch.rand(*maps, 2, 3, device=backend)
    output = tri_stn.splat(image, tri_stn.Affine(theta), (5, 6))
    batch = torch.broadcast_shapes(inputs, maps)
    images, thetas = image.expand(*batch, 2, 3, 4).flatten(0, -4), theta.expand(*batch, 2, 3).flatten(0, -3)
    one_by_one = [tri_stn.splat(i[None], tri_stn.Affine(t[None]), (5, 6)) for i, t in zip(images, thetas, strict=True)]
    expected = torch.cat(one_by_one).unflatten(0, batch)
    torch.testing.assert_close(output, expected.sum(1) if len(batch) == 2 else expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_gradients(backend, normalize):
    case = Case(input_size=(5, 4), size=(3, 4), dtype=torch.float64, theta_dtype=torch.float64)
    _, theta, image = case.tensors(backend)

    def run(image, theta):
        return tri_stn.splat(image, tri_stn.Affine(theta), case.input_size, normalize=normalize)

    inputs = image.requires_grad_(), theta.requires_grad_()
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_empty(backend):
    transform = tri_stn.Affine(torch.rand(2, 2, 3, device=backend))
    assert (tri_stn.splat(torch.rand(2, 3, 0, 4, device=backend), transform, (2, 2)) == 0).all()
