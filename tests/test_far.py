"""Tensors that reach beyond 2**31 elements: the same pixels, far apart in a sparse file that costs nothing."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from tri_stn.kernels import launch

import tri_stn
from tri_stn import kernels

FAR = 2**31 + 8
"""Elements between neighbours: one more than 32-bit offsets can take."""


@pytest.fixture
def far_apart(tmp_path):
    """A function that lays a small fp16 tensor out with neighbours along one dimension FAR elements apart."""
    numbers = itertools.count()

    def lay_out(tensor: Tensor, along: int) -> Tensor:
        # An offset that wraps around lands 2 ** 31 before the first element: on zeros, not outside the file.
        before, reach = 2**31, (tensor.shape[along] - 1) * FAR + tensor.numel()
        path = tmp_path / str(next(numbers))
        with path.open("wb") as file:
            file.truncate(2 * (before + reach))  # its pages come into being when they are written
        memory = torch.from_file(str(path), shared=True, size=before + reach, dtype=torch.float16)
        strides = list(tensor.stride())
        strides[along] = FAR
        view = memory.as_strided(tensor.shape, strides, before)
        view.copy_(tensor)
        blocks = path.stat().st_blocks * 512
        assert blocks < 2**22, f"the file system gave a sparse file {blocks} bytes"
        return view

    return lay_out


def results(input: Tensor, transform: type, parameters: Tensor, grad: Tensor) -> list[Tensor]:
    input, parameters = input.detach().requires_grad_(), parameters.detach().requires_grad_()
    output = tri_stn.warp(input, transform(parameters), grad.shape[2:], padding_mode="border")
    return [output, *torch.autograd.grad(output, (input, parameters), grad)]


@pytest.mark.parametrize("transform", [tri_stn.Affine, tri_stn.Grid], ids=lambda t: t.__name__)
@pytest.mark.parametrize("along", [0, 1, 2, 3], ids=["images", "channels", "rows", "columns"])
def test_elements_beyond_2_to_the_31(backend, far_apart, along, transform):
    """Image, output's gradient and, if it is one number per pixel, the map: the same results as close together."""
    if backend == "cuda":
        pytest.skip("a file cannot stand in for a GPU's memory")
    torch.manual_seed(0)
    image, grad = torch.rand(2, 2, 3, 2).half(), torch.rand(2, 2, 2, 3).half()
    dense = transform is tri_stn.Grid
    parameters = (torch.rand(2, 2, 3, 2) * 2 - 1 if dense else torch.eye(2, 3) * torch.rand(2, 2, 3)).half()
    tensors = [image, parameters, grad]
    expected = results(image.to(backend), transform, parameters.to(backend), grad.to(backend))
    far = [far_apart(t, along) if dense or t is not parameters else t for t in tensors]
    actual = results(far[0], transform, *far[1:])
    assert max(t.untyped_storage().nbytes() for t in actual) < 1000  # nothing that is allocated is far apart
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
def test_partial_sums_beyond_2_to_the_31(backend, monkeypatch, tmp_path):
    """Of the matrix' gradient: those of the walk's third tile, or of the third map, lie where 32 bits do not reach."""
    if backend == "cuda":
        pytest.skip("a file cannot stand in for a GPU's memory")
    step, empty, contiguous, far = 2**30, torch.Tensor.new_empty, launch.contiguous, []

    def layout(shape, dtype):
        """Partial sums: three slots of one map, or three maps, 2**30 elements apart."""
        if tuple(shape)[3:] != (2, 3):
            return contiguous(shape, dtype)
        return launch.Layout(shape, (9, step, 10, 3, 1) if shape[1] == 3 else (9, 10, step, 3, 1), dtype)

    def spread(tensor, shape, **options):
        if not isinstance(shape, Sequence) or tuple(shape)[3:] != (2, 3):
            return empty(tensor, shape, **options)
        reach = 2**31 + 2 * step + 100
        path = tmp_path / str(len(far))
        with path.open("wb") as file:
            file.truncate(4 * (2**31 + reach))  # an offset that wraps around lands within
        memory = torch.from_file(str(path), shared=True, size=2**31 + reach)
        far.append(memory.as_strided(shape, layout(shape, None).strides, 2**31))
        return far[-1]

    torch.manual_seed(0)
    for maps, size in ((1, (20, 16)), (3, (4, 4))):
        image, theta = torch.rand(1, 1, *size), (torch.eye(2, 3) + torch.rand(1, maps, 2, 3) / 9).requires_grad_()
        results = []
        for functions in ((empty, contiguous), (spread, layout)):
            monkeypatch.setattr(torch.Tensor, "new_empty", functions[0])
            monkeypatch.setattr(launch, "contiguous", functions[1])
            launch.forget()
            output = tri_stn.warp(image.clone().requires_grad_(), tri_stn.Affine(theta))
            results += torch.autograd.grad(output.square().sum(), theta)
        monkeypatch.setattr(torch.Tensor, "new_empty", empty)
        torch.testing.assert_close(*results)
    assert [tuple(t.shape) for t in far] == [(1, 1, 3, 2, 3), (1, 3, 1, 2, 3)]


def spread_out(path, tensor, strides):
    """A copy of a tensor whose elements lie so far apart; offsets that wrap around lie within its memory as well."""
    reach = 2**31 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + 1
    with path.open("wb") as file:
        file.truncate(tensor.itemsize * reach)
    memory = torch.from_file(str(path), shared=True, size=reach, dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, strides, 2**31).copy_(tensor)


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
def test_maps_and_columns_that_32_bits_do_not_reach_though_each_stride_is_short(backend, tmp_path):
    """The third of three fields, read by the gather; the fifth column of an output's gradient, read by the walk."""
    if backend == "cuda":
        pytest.skip("a file cannot stand in for a GPU's memory")
    torch.manual_seed(0)
    options = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False}
    image, grid = torch.rand(1, 1, 4, 4).half(), torch.rand(1, 3, 4, 4, 2).half()
    far_grid = spread_out(tmp_path / "grid", grid, (0, 2**30 + 64, 8, 2, 1))
    outputs = [torch.empty(3, 1, 4, 4, dtype=torch.float16) for _ in range(2)]
    for output, parameters in zip(outputs, (grid, far_grid), strict=True):
        kernels.gather(output, image, parameters, kind="grid", **options)
    torch.testing.assert_close(*outputs, rtol=0, atol=0)

    grad, theta = torch.rand(1, 1, 4, 6).half(), torch.eye(2, 3).view(1, 1, 2, 3)
    far_grad = spread_out(tmp_path / "grad", grad, (0, 0, 1, 2**29))
    gradients = [torch.empty(1, 1, 4, 1, dtype=torch.float16) for _ in range(2)]
    for grad_input, grad_output in zip(gradients, (grad, far_grad), strict=True):
        kernels.adjoint(grad_input, None, None, grad_output, None, theta, kind="affine", **options)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
