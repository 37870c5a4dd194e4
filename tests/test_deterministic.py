"""torch.use_deterministic_algorithms(True): the same bits whatever the order of the programs."""

import pytest
import torch
from conftest import DEVICE, interpreted
from tri_stn.kernels import tiling

import tri_stn
from tri_stn.testing import Case, assert_accurate, warp_truth

SCATTERED = [
    Case(kind="grid", size=(40, 9), input_size=(3, 2)),
    Case(kind="displacement", size=(40, 9), input_size=(3, 2), mode="bicubic", dtype=torch.bfloat16),
    Case(theta=((3.0, 0.1, 0.2), (0.3, 4.0, 0.1)), size=(40, 9), input_size=(3, 2), padding_mode="border"),
    Case(theta=((3.0, 0.1, 0.2), (0.3, 4.0, 0.1)), size=(40, 9), input_size=(3, 2), padding_mode="reflection",
         mode="bicubic", dtype=torch.float64),
    Case(kind="projective", size=(40, 9), input_size=(3, 2)),
    Case(kind="grid", maps=2, size=(20, 9), input_size=(3, 2), mode="nearest", dtype=torch.float16),
]  # fmt: skip


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(tri_stn.ops, "is_deterministic", lambda: True)


@pytest.fixture
def turn_around(monkeypatch):
    """A function that makes the interpreter run its programs from the last to the first."""
    from triton.runtime.interpreter import InterpreterBuilder

    forwards = InterpreterBuilder.set_grid_idx

    def backwards(self, x, y, z):
        forwards(self, self.grid_dim[0] - 1 - x, y, z)

    return lambda: monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)


def grad_input(case, device):
    image, parameters, grad = case.tensors(device)
    output = tri_stn.warp(image.requires_grad_(), case.transform(parameters), case.size, **case.options)
    return torch.autograd.grad(
        output, image, grad * torch.rand(grad.shape, generator=torch.Generator().manual_seed(1))
    )[0]


@interpreted
@pytest.mark.parametrize("case", SCATTERED, ids=str)
def test_order_of_programs_does_not_matter(deterministic, turn_around, case):
    first = grad_input(case, DEVICE)
    turn_around()
    assert torch.equal(first, grad_input(case, DEVICE))


@interpreted
@pytest.mark.parametrize("most", [2**18, 20])
@pytest.mark.parametrize("kind", ["affine", "projective"])
def test_nor_to_the_gradient_of_a_matrix(turn_around, monkeypatch, kind, most):
    """Without the mode: every program has a slot of its own, also where it takes several tiles."""
    monkeypatch.setattr(tiling, "_MOST_PARTIALS", most)
    case = Case(kind=kind, size=(40, 9), input_size=(3, 2), padding_mode="border")

    def grad_matrix():
        image, parameters, grad = case.tensors(DEVICE)
        output = tri_stn.warp(image, case.transform(parameters.requires_grad_()), case.size, **case.options)
        return torch.autograd.grad(output, parameters, grad)[0]

    first = grad_matrix()
    turn_around()
    assert torch.equal(first, grad_matrix())


@interpreted
def test_order_matters_to_the_fast_path(turn_around):
    """Without the mode, sums are rounded in the order in which they come: what the tests above would see."""
    first = grad_input(SCATTERED[0], DEVICE)
    turn_around()
    assert not torch.equal(first, grad_input(SCATTERED[0], DEVICE))


@pytest.mark.parametrize("case", SCATTERED, ids=str)
def test_fixed_point_loses_nothing(deterministic, case):
    image, parameters, grad = case.tensors(DEVICE)
    grad = grad * 10 ** torch.linspace(-6, 3, grad.shape[-1], device=DEVICE).to(grad.dtype)
    output = tri_stn.warp(image.requires_grad_(), case.transform(parameters), case.size, **case.options)
    (actual,) = torch.autograd.grad(output, image, grad)
    exact = image.detach().double().requires_grad_()
    truth = warp_truth(case, exact, parameters)
    (expected,) = torch.autograd.grad(truth, exact, grad.double(), retain_graph=True)
    (magnitude,) = torch.autograd.grad(truth, exact, grad.double().abs())
    assert_accurate(actual, expected, image_dtype=case.dtype, magnitude=magnitude.abs() + grad.double().abs().amax())


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_fixed_point_at_any_magnitude(deterministic, scale):
    case = SCATTERED[0]
    image, parameters, grad = case.tensors(DEVICE)
    output = tri_stn.warp(image.requires_grad_(), case.transform(parameters), case.size)
    (actual,) = torch.autograd.grad(output, image, grad * scale, retain_graph=True)
    (expected,) = torch.autograd.grad(output, image, grad)
    torch.testing.assert_close(actual, expected * scale, rtol=1e-5, atol=1e-6 * scale)


def test_a_gradient_that_is_not_finite_shows(deterministic):
    """A loss scaler looks for it. It spoils its own image, no other."""
    case = SCATTERED[0].with_(images=2)
    image, parameters, grad = case.tensors(DEVICE)
    grad[0, 0, 0, 0] = float("inf")
    output = tri_stn.warp(image.requires_grad_(), case.transform(parameters), case.size)
    (actual,) = torch.autograd.grad(output, image, grad)
    assert actual[0].isnan().all() and actual[1].isfinite().all()


@pytest.mark.parametrize(
    "case",
    [
        Case(kind="grid", size=(6, 5), input_size=(3, 2)),
        Case(kind="projective", size=(6, 5), input_size=(3, 2)),
        Case(padding_mode="border", size=(6, 5)),
    ],
    ids=str,
)
def test_second_derivatives_too(deterministic, monkeypatch, case):
    """The slopes' sums are bounded by another scale: it holds, and gives the fast path's numbers."""
    image, parameters, grad = case.tensors(DEVICE)
    inputs = image.requires_grad_(), parameters.requires_grad_()

    def second():
        output = tri_stn.warp(inputs[0], case.transform(inputs[1]), case.size, **case.options)
        (first,) = torch.autograd.grad(output, inputs[1], grad, create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs)

    fixed = second()
    monkeypatch.setattr(tri_stn.ops, "is_deterministic", lambda: False)
    for actual, expected in zip(fixed, second(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_never_raises():
    torch.use_deterministic_algorithms(True)  # without warn_only, which the other tests have on
    for case in SCATTERED[:3]:
        grad_input(case, DEVICE)


def test_several_samples_through_a_lattice(deterministic):
    """Only the lattice's own gradient is a sum whose order would matter."""
    image = torch.rand(2, 3, 5, 6, device=DEVICE, requires_grad=True)
    lattice = torch.rand(2, 4, 4, 2, device=DEVICE) / 9

    def call(lattice):
        return tri_stn.warp(image, tri_stn.FreeForm(lattice), antialias=True)

    (gradient,) = torch.autograd.grad(call(lattice).square().sum(), image)
    assert gradient.isfinite().all()
    lattice.requires_grad_()
    with torch.no_grad():
        assert torch.equal(call(lattice), call(lattice.detach()))
    with pytest.raises(NotImplementedError, match="none of them by deterministic algorithms"):
        call(lattice)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SCATTERED, ids=str)
def test_the_same_bits_run_after_run(deterministic, case):
    case = case.with_(size=(300, 200))
    assert len({grad_input(case, "cuda").double().sum().item() for _ in range(5)}) == 1
