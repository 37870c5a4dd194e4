"""What a map of a few numbers takes beside the tensors that anyone must hold: not more for a larger output."""

import math

import pytest
import torch
from conftest import DEVICE
from test_chain import MAPS
from test_operators import Allocations, silence
from tri_stn.kernels import tiling

import tri_stn
from tri_stn.testing import Case

MATRICES = {
    "affine": (lambda _: [torch.eye(2, 3)[None]], tri_stn.Affine),
    "affine_3d": (lambda _: [torch.eye(3, 4)[None]], tri_stn.Affine),
    "attention": (lambda _: [torch.ones(1), torch.zeros(1, 2)], tri_stn.Attention),
    "attention_3d": (lambda _: [torch.ones(1, 3), torch.zeros(1, 3)], tri_stn.Attention),
    "similarity": (lambda _: [torch.ones(1), torch.zeros(1), torch.zeros(1, 2)], tri_stn.Similarity),
    "projective": (lambda _: [torch.eye(3)[None]], tri_stn.Projective),
    "projective_3d": (lambda _: [torch.eye(4)[None]], tri_stn.Projective),
}
SIZES = {2: ((128, 128), (4096, 4096)), 3: ((16, 16, 16), (256, 256, 256))}
MEBIBYTE = 2**20


def extra(allocated, *held):
    """Bytes beyond those that anyone must hold."""
    total = sum(t.numel() * t.element_size() for t in allocated)
    return total - sum(t.numel() * t.element_size() for t in held)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that would have run. Nothing does, and no memory is touched: outputs may be large."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return silence(monkeypatch)


def image_of(name, **options):
    return torch.empty(1, 1, *(8,) * (3 if name.endswith("3d") else 2), device=DEVICE, **options)


@pytest.mark.parametrize("options", [{}, {"padding_mode": "border"}, {"antialias": True}], ids=str)
@pytest.mark.parametrize("image_too", [True, False], ids=["both", "map_alone"])
@pytest.mark.parametrize("name", [*MATRICES, *MAPS])
def test_does_not_grow_with_the_output(launches, name, image_too, options):
    """Beyond the output, the image's gradient and the map's numbers: partial sums, a mebibyte at most."""
    make, transform = (MATRICES | MAPS)[name][:2]
    found = []
    for size in SIZES[3 if name.endswith("3d") else 2]:
        image, parameters = image_of(name), [p.to(DEVICE).requires_grad_() for p in make((1,))]
        with Allocations() as log:
            output = tri_stn.warp(image.requires_grad_(image_too), transform(*parameters), size, **options)
            torch.autograd.grad(output, [image] * image_too + parameters, output.detach())
        found.append(extra(log.tensors, output))
    assert launches.count("gather_kernel") == 2 and set(launches) > {"gather_kernel"}
    assert found[1] <= found[0] + MEBIBYTE  # a grid alone would be 128 MiB and more


@pytest.mark.parametrize("name", MATRICES)
def test_nor_does_that_of_splat_with_its_input(launches, name):
    """Beyond the two gradients; its input is what a warp's output is."""
    make, transform = MATRICES[name]
    found = []
    for size in SIZES[3 if name.endswith("3d") else 2]:
        image, parameters = image_of(name), [p.to(DEVICE).requires_grad_() for p in make((1,))]
        given = torch.empty(1, 1, *size, device=DEVICE, requires_grad=True)
        with Allocations() as log:
            output = tri_stn.splat(given, transform(*parameters), image.shape[2:], padding_mode="border")
            torch.autograd.grad(output, [given, *parameters], image)
        found.append(extra(log.tensors, given))
    assert found[1] <= found[0] + MEBIBYTE


@pytest.mark.parametrize("project", ["sum", "mean"])
def test_nor_that_of_a_projection_with_its_depth(launches, project):
    theta, image = torch.eye(3, 4, device=DEVICE)[None].requires_grad_(), image_of("3d").requires_grad_()
    found = []
    for size in SIZES[3]:
        with Allocations() as log:
            output = tri_stn.warp(image, tri_stn.Affine(theta), size, padding_mode="border", project=project)
            torch.autograd.grad(output, [image, theta], output.detach())
        found.append(extra(log.tensors, output, output))  # the mean's gradient is divided by the depth
    assert found[1] <= found[0] + MEBIBYTE


# --- the same numbers, where a program takes several tiles --------------------------------------------

LARGE = Case(size=(40, 9), input_size=(5, 4), dtype=torch.float64, theta_dtype=torch.float64)
"""Five tiles, so that two programs take three and two."""
LESS = LARGE.with_(size=(24, 9), channels=1)
"""Three tiles, for what takes the interpreter longer."""
WIDE = Case(size=(9, 8), input_size=(5, 4), channels=66, arrangement="channels_last")
"""Three tiles, each once for 64 channels and once for two."""
LARGE_CASES = {
    "affine border": (LARGE.with_(padding_mode="border"), {}),
    "affine reflection bicubic": (LESS.with_(padding_mode="reflection", mode="bicubic", channels=2), {}),
    "affine fp32": (LARGE.with_(padding_mode="border", dtype=torch.float32, theta_dtype=torch.float32), {}),
    "affine 3-D": (LARGE.with_(size=(17, 4, 9), input_size=(3, 4, 3), padding_mode="border"), {}),
    "affine 1-D": (LARGE.with_(size=(600,), input_size=(7,), padding_mode="reflection"), {}),
    "projective": (LARGE.with_(kind="projective"), {}),
    "projective reflection": (LARGE.with_(kind="projective", padding_mode="reflection"), {}),
    "several maps": (LESS.with_(images=2, maps=2, padding_mode="border"), {}),
    "channels shared out": (WIDE.with_(padding_mode="border"), {}),
    "fill": (LARGE.with_(kind="projective"), {"fill": 0.5}),
    "affine antialias": (LESS.with_(padding_mode="border", input_size=(54, 20)), {"antialias": True}),
    "projective antialias": (LESS.with_(kind="projective", input_size=(20, 5)), {"antialias": True}),
    "affine supersample": (LESS.with_(padding_mode="reflection"), {"supersample": 2}),
}


def few_programs(monkeypatch, case):
    """Two programs for all tiles of a map; a list of (tiles, programs) of each launch."""
    dims, seen, programs = len(case.size), [], tiling.programs

    def watched(tiles, numbers):
        seen.append((tiles, programs(tiles, numbers)))
        return seen[-1][1]

    rows = dims + (case.kind == "projective")
    numbers = case.images * (case.maps or 1) * math.ceil(case.channels / 64) * rows * (dims + 1)
    monkeypatch.setattr(tiling, "_MOST_PARTIALS", 2 * numbers)
    monkeypatch.setattr(tiling, "programs", watched)
    return seen


def gradients(case, options, device, image_too=True, second=False):
    image, parameters, grad = case.tensors(device)
    inputs = [image.requires_grad_()] * image_too + [parameters.requires_grad_()]
    output = tri_stn.warp(image, case.transform(parameters), case.size, **case.options, **options)
    first = torch.autograd.grad(output, inputs, grad, create_graph=second)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs) if second else first


def agree(monkeypatch, case, options, **wanted):
    print(case, options)
    seen = few_programs(monkeypatch, case)
    got = gradients(case, options, DEVICE, **wanted)
    assert seen and all(programs == 2 < tiles for tiles, programs in seen)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    exact = case.with_(dtype=torch.float64, theta_dtype=torch.float64)
    tolerance = 1e-9 if case.dtype == torch.float64 else 1e-4  # sums of hundreds of fp32 numbers
    for actual, expected in zip(got, gradients(exact, options, "cpu", **wanted), strict=True):
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LARGE_CASES)
def test_programs_that_take_several_tiles_lose_none(monkeypatch, name):
    agree(monkeypatch, *LARGE_CASES[name])


@pytest.mark.parametrize("name", ["affine border", "affine 3-D", "projective"])
def test_nor_do_those_of_a_map_alone(monkeypatch, name):
    agree(monkeypatch, *LARGE_CASES[name], image_too=False)


@pytest.mark.parametrize("name", ["affine border", "projective", "projective reflection", "several maps"])
def test_nor_do_those_of_second_derivatives(monkeypatch, name):
    agree(monkeypatch, *LARGE_CASES[name], second=True)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("name", ["affine border", "projective"])
def test_nor_do_those_of_deterministic_sums(monkeypatch, name, second):
    monkeypatch.setattr(tri_stn.ops, "is_deterministic", lambda: True)
    agree(monkeypatch, *LARGE_CASES[name], second=second)


@pytest.mark.parametrize("most", [1, 7, 43690])
@pytest.mark.parametrize("tiles", [1, 6, 7, 8, 43691, 10**6])
def test_programs_share_the_tiles_alike(monkeypatch, tiles, most):
    monkeypatch.setattr(tiling, "_MOST_PARTIALS", 6 * most)
    programs = tiling.programs(tiles, 6)
    assert programs <= min(tiles, most)
    assert (-(-tiles // programs)) == -(-tiles // most), "as few rounds as the budget allows"
