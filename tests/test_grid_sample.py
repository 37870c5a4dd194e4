"""grid_sample as people swap it in for torch's: signature, warning, and what it takes beyond torch."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import tri_stn


def test_signature_is_that_of_torch():
    ours, theirs = (inspect.signature(module.grid_sample).parameters for module in (tri_stn, F))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_warns_as_torch_does(backend):
    image, grid = torch.rand(1, 1, 3, 4, device=backend), torch.rand(1, 2, 5, 2, device=backend)
    with pytest.warns(UserWarning, match="align_corners=False since 1.3.0") as ours:
        output = tri_stn.grid_sample(image, grid)
    with pytest.warns(UserWarning) as theirs:
        expected = F.grid_sample(image, grid)
    assert str(ours[0].message) == str(theirs[0].message)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_complex_images(backend, mode):
    image = torch.rand(2, 3, 4, 5, device=backend, dtype=torch.complex64, requires_grad=True)
    grid = (torch.rand(2, 3, 2, 2, device=backend) * 2 - 1).requires_grad_()
    output = tri_stn.grid_sample(image, grid, mode, align_corners=False)
    expected = torch.complex(*(F.grid_sample(x, grid, mode, align_corners=False) for x in (image.real, image.imag)))
    torch.testing.assert_close(output, expected)
    weight = torch.rand_like(output)
    for got, want in zip(
        torch.autograd.grad(output, (image, grid), weight),
        torch.autograd.grad(expected, (image, grid), weight),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_image_keeps_an_fp32_grid(backend, dtype):
    """Rounding the grid to the image's dtype, as torch asks for, would move samples by pixels."""
    width = 600
    image = torch.linspace(-1, 1, width, device=backend).expand(1, 1, 1, width).to(dtype)
    grid = torch.stack([torch.linspace(-0.99, 0.99, width), torch.zeros(width)], -1)[None, None].to(backend)
    output = tri_stn.grid_sample(image, grid, align_corners=True)
    error = (output.flatten() - grid[0, 0, :, 0]).abs().max()
    assert error < torch.finfo(dtype).eps


def test_a_permuted_grid_is_read_in_place(backend):
    """Networks put out (N, 2, H, W); the grid that they permute it to is not contiguous."""
    image = torch.rand(2, 3, 6, 7, device=backend)
    flow = (torch.rand(2, 2, 5, 4, device=backend) * 2 - 1).requires_grad_()
    output = tri_stn.grid_sample(image, flow.permute(0, 2, 3, 1), align_corners=False)
    expected = F.grid_sample(image, flow.permute(0, 2, 3, 1), align_corners=False)
    torch.testing.assert_close(output, expected)
    weight = torch.rand_like(output)
    (got,) = torch.autograd.grad(output, flow, weight)
    (want,) = torch.autograd.grad(expected, flow, weight)
    torch.testing.assert_close(got, want)
    if tri_stn.ops._takes_kernels(flow):
        assert got.is_contiguous(), "the network takes it back as it gave it"


def test_many_channels_have_one_writer_of_the_grids_gradient(backend):
    """More channels than a program usually takes: the sum over all of them must end in one place."""
    image = torch.rand(1, 130, 3, 4, device=backend, dtype=torch.float64)
    grid = (torch.rand(1, 1, 2, 2, device=backend, dtype=torch.float64) * 2 - 1).requires_grad_()
    for needs_image in (False, True):
        image.requires_grad_(needs_image)
        output = tri_stn.grid_sample(image, grid, align_corners=False)
        (got,) = torch.autograd.grad(output.sum(), grid)
        (want,) = torch.autograd.grad(F.grid_sample(image, grid, align_corners=False).sum(), grid)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["grid", "displacement"])
def test_opcheck(backend, kind):
    image, field = torch.rand(2, 1, 3, 4, device=backend), torch.rand(2, 1, 2, 3, 2, device=backend)
    args = (image.requires_grad_(), field.requires_grad_(), None, None, [2, 3], "", kind, "bicubic", "border", False, 1)
    torch.library.opcheck(torch.ops.tri_stn.warp.default, args)
