"""PyTorch's own samples for its grid samplers (OpInfo), run on `tri_stn.grid_sample` and compared with torch.

On the CPU path all samples run but those of the largest volumes (two sizes of five in fp64, three in
other dtypes), which take minutes on a busy machine. Through the kernels, whose interpreter takes a
good part of a second for each, a part of the smaller samples runs in fp64: every kind of sample
(dimension, mode, padding, align_corners). Dtypes other than fp64 are compared with torch in fp64 on
the same numbers: torch's own 16-bit results on the CPU are no truth.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from test_warp import compare
from torch import Tensor

import tri_stn
from tri_stn.testing import Case

pytest.importorskip("expecttest", reason="torch's own test code imports it")
from torch.testing._internal.common_methods_invocations import op_db

OPS = {op.name: op for op in op_db if op.name in ("nn.functional.grid_sample", "grid_sampler_2d", "grid_sampler_3d")}
MODES = ("bilinear", "nearest", "bicubic")  # as ATen numbers them
PADDING_MODES = ("zeros", "border", "reflection")
FEW, MANY, MOST = 400, 10_000, 30_000
"""Numbers in the output of one image: what the interpreter gets through, other dtypes, and fp64 on the CPU path."""


def samples(name: str, device: str, dtype: torch.dtype, most: int) -> Iterator[tuple[Tensor, Tensor, dict]]:
    """Input, grid and options of each sample with at most so many numbers; a part of it if few."""
    torch.manual_seed(0)
    every, taken = set(), set()
    for sample in OPS[name].sample_inputs(device, dtype, requires_grad=True):
        input, (grid, *numbers), options = sample.input, sample.args, sample.kwargs
        if numbers:
            mode, padding_mode, align_corners = numbers
            options = {"mode": MODES[mode], "padding_mode": PADDING_MODES[padding_mode], "align_corners": align_corners}
        kind = input.dim(), *options.values()
        every.add(kind)
        if input.shape[1] * grid[0, ..., 0].numel() <= most:
            taken.add(kind)
            print(name, dtype, tuple(input.shape), tuple(grid.shape), options)  # shown if it fails
            yield (input[:1, :2], grid[:1, :4], options) if most == FEW else (input, grid, options)
    assert taken == every and taken


def numbers_like(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(tensor.shape, generator=generator) * 2 - 1).to(tensor)


def second_order(grid_sample, input, grid, options):
    """What a second backward pass gives the input, the grid and the gradient of the output."""
    output = grid_sample(input, grid, **options)
    grad = numbers_like(output, seed=1).requires_grad_()
    gradients = torch.autograd.grad(output, (input, grid), grad, create_graph=True)
    weights = [numbers_like(gradient, seed) for seed, gradient in enumerate(gradients, 2)]
    return torch.autograd.grad(gradients, (input, grid, grad), weights, materialize_grads=True)


def is_interpreted(device: str) -> bool:
    return device == "cpu" and tri_stn.ops._backend(torch.empty(0)) is not tri_stn.reference


def leave_out_twins(name: str, device: str) -> None:
    """In the interpreter: the first operator's samples are of 30 kinds, and the others' kinds are among them."""
    if name != "nn.functional.grid_sample" and is_interpreted(device):
        pytest.skip("nn.functional.grid_sample has a sample of every kind")


@pytest.fixture
def not_deterministic(poisoned_memory):
    """Torch's deterministic scatter on the CPU would take minutes for the largest samples."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_are_torchs(backend, name, not_deterministic):
    leave_out_twins(name, backend)
    for input, grid, options in samples(name, backend, torch.float64, FEW if is_interpreted(backend) else MOST):
        output = tri_stn.grid_sample(input, grid, **options)
        expected = F.grid_sample(input, grid, **options)
        torch.testing.assert_close(output, expected)
        grad = numbers_like(output, seed=1)
        for got, want in zip(
            torch.autograd.grad(output, (input, grid), grad),
            torch.autograd.grad(expected, (input, grid), grad),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPS)
def test_other_dtypes_are_as_exact_as_they_can_be(backend, name, dtype, not_deterministic):
    for input, grid, options in samples(name, backend, dtype, MANY):
        case = Case(kind="grid", input_size=input.shape[2:], size=grid.shape[1:-1], dtype=dtype, **options)
        compare(case, input, grid, numbers_like(input.new_empty(*input.shape[:2], *case.size), seed=1))


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_torchs(backend, name):
    leave_out_twins(name, backend)
    for input, grid, options in samples(name, backend, torch.float64, FEW):
        ours, theirs = (second_order(f, input, grid, options) for f in (tri_stn.grid_sample, F.grid_sample))
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_the_slopes_of_the_first(backend, name):
    """Against finite differences in one random direction, for a corner of each sample."""
    for input, grid, options in samples(name, backend, torch.float64, FEW):
        corner = input[:, :2], grid[:, :2, :2]
        assert torch.autograd.gradgradcheck(
            lambda *inputs, options=options: tri_stn.grid_sample(*inputs, **options), corner, fast_mode=True
        )
