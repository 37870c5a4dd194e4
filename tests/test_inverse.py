"""Inverses in closed form and by iteration, and the flows of velocity fields."""

import math

import pytest
import torch
import torch.nn.functional as F

import tri_stn

pytestmark = pytest.mark.parametrize("backend", ["reference"], indirect=True)  # pure torch above warp


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def smooth(*size, amplitude=0.15):
    """A field (1, *size, d) of sines, whose Lipschitz constant is below one."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n, dtype=torch.float64) for n in size], indexing="ij")
    waves = [amplitude * torch.sin(math.pi * (a + 0.3 * i)) for i, a in enumerate(axes)]
    inside = math.prod((1 - a**2 for a in axes), start=torch.ones((), dtype=torch.float64))
    return torch.stack(waves, -1)[None] * inside.unsqueeze(-1)


@pytest.mark.parametrize("batch", [(2,), (2, 3)])
@pytest.mark.parametrize(
    "make",
    [
        lambda b: tri_stn.Affine(torch.eye(2, 3) + 0.2 * randn(*b, 2, 3)),
        lambda b: tri_stn.Affine(torch.eye(3, 4) + 0.2 * randn(*b, 3, 4)),
        lambda b: tri_stn.Attention(1 + 0.2 * randn(*b), randn(*b, 2)),
        lambda b: tri_stn.Attention(1 + 0.2 * randn(*b, 3), randn(*b, 3)),
        lambda b: tri_stn.Similarity(1 + 0.2 * randn(*b), randn(*b), randn(*b, 2)),
        lambda b: tri_stn.Projective(torch.eye(3) + 0.1 * randn(*b, 3, 3)),
    ],
)
def test_a_map_and_its_inverse_are_the_identity(backend, make, batch):
    """Joined into one matrix: a multiple of the identity, and a positive one."""
    transform = make(batch)
    assert type(transform.inverse()) is type(transform)
    matrix = tri_stn.Compose(transform, transform.inverse()).parameters
    square = matrix.shape[-1] == matrix.shape[-2]
    matrix = matrix / matrix[..., -1:, -1:] if square else matrix
    torch.testing.assert_close(matrix, torch.eye(*matrix.shape[-2:]).to(matrix).expand_as(matrix))


def test_the_inverse_keeps_points_ahead_of_infinity(backend):
    """Of a homography with a positive divisor in view, the inverse has one there as well."""
    matrix = torch.tensor([[[1.0, 0.1, 0], [0, 1, 0.1], [0.2, 0.1, 2]]])
    for sign, positive in ((1, True), (-1, False)):
        divisor = (tri_stn.Projective(sign * matrix).inverse().matrix @ torch.tensor([0.1, 0.2, 1.0]))[0, -1]
        assert bool(divisor > 0) == positive


def test_inverses_have_gradients(backend):
    theta = (torch.eye(2, 3) + 0.1 * randn(1, 2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tri_stn.Affine(t).inverse().theta, theta)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(33,), (32, 33), (16, 17, 18)])
def test_displacements_are_inverted_by_iteration(backend, size, align_corners):
    """v(p) = -f(p + v(p)) holds, to the error that the Lipschitz constant allows after so many rounds."""
    forward = tri_stn.Displacement(smooth(*size))
    inverse = forward.inverse(40, align_corners=align_corners)
    image = forward.field.movedim(-1, 1)
    read = tri_stn.warp(image, inverse, padding_mode="border", align_corners=align_corners).movedim(1, -1)
    torch.testing.assert_close(read, -inverse.field, rtol=0, atol=1e-9)  # 0.15 pi ** 40 is far below


def test_an_inverse_in_16_bits_is_rounded_once(backend):
    field = smooth(9, 8).to(torch.bfloat16)
    wide = tri_stn.Displacement(field.float()).inverse().field
    torch.testing.assert_close(tri_stn.Displacement(field).inverse().field, wide.to(torch.bfloat16), rtol=0, atol=0)


def squared_in_torch(field, steps, align_corners):
    """Scaling and squaring, with grids."""
    dims = field.shape[-1]
    identity = F.affine_grid(
        torch.eye(dims, dims + 1, dtype=field.dtype)[None], [1, 1, *field.shape[1:-1]], align_corners=align_corners
    )
    moved = field / 2**steps
    for _ in range(steps):
        options = {"padding_mode": "border", "align_corners": align_corners}
        moved = moved + F.grid_sample(moved.movedim(-1, 1), identity + moved, **options).movedim(1, -1)
    return moved


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(9, 8), (5, 6, 7)])
def test_velocities_are_scaled_and_squared(backend, size, align_corners):
    field = 0.5 * randn(1, *size, len(size))
    flow = tri_stn.Velocity(field.float(), steps=5, align_corners=align_corners)
    truth = squared_in_torch(field, 5, align_corners)
    torch.testing.assert_close(flow.parameters.double(), truth, rtol=0, atol=1e-5)
    image = torch.rand(1, 2, *size)
    warped = tri_stn.warp(image, tri_stn.Displacement(flow.parameters), align_corners=align_corners)
    torch.testing.assert_close(tri_stn.warp(image, flow, align_corners=align_corners), warped)
    with pytest.raises(ValueError, match="was made for align_corners"):
        tri_stn.warp(image, flow, align_corners=not align_corners)


def test_a_linear_velocity_flows_by_the_matrix_exponential(backend):
    """dx/dt = A x: where no border is felt, exp(A). The error of the first step falls with 2 ** steps."""
    matrix = torch.tensor([[-0.4, 0.3], [-0.3, -0.2]], dtype=torch.float64)
    axes = torch.linspace(-1, 1, 21, dtype=torch.float64)
    y, x = torch.meshgrid(axes, axes, indexing="ij")
    points = torch.stack([x, y], -1)
    flow = tri_stn.Velocity((points @ matrix.T)[None], steps=14, align_corners=True)
    expected = points @ torch.linalg.matrix_exp(matrix).T - points
    torch.testing.assert_close(flow.parameters[0, 5:-5, 5:-5], expected[5:-5, 5:-5], rtol=0, atol=1e-4)


def test_the_backward_flow_undoes_the_forward_one(backend):
    flow = tri_stn.Velocity(smooth(48, 48), align_corners=True)
    there = flow.parameters
    back = tri_stn.warp(
        flow.inverse().parameters.movedim(-1, 1), tri_stn.Displacement(there), padding_mode="border", align_corners=True
    )
    assert (there + back.movedim(1, -1)).abs().max() < 0.05 * there.abs().max()


def test_gradients_of_a_velocity(backend):
    field, image = (0.3 * randn(1, 3, 4, 2)).requires_grad_(), randn(1, 1, 3, 4).requires_grad_()

    def run(image, field):
        return tri_stn.warp(image, tri_stn.Velocity(field, steps=3), padding_mode="border")

    assert torch.autograd.gradcheck(run, (image, field), check_forward_ad=True)


def test_autograd_keeps_fields_and_no_grids(backend):
    """One field for each step; F.grid_sample keeps field and grid."""
    saved = set()
    field = (0.1 * randn(1, 16, 16, 2)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.untyped_storage()._cdata) or t, lambda t: t):
        total = tri_stn.Velocity(field, steps=6).parameters.sum()
    assert len(saved) == 6
    total.backward()


@pytest.mark.parametrize(
    "call,error,says",
    [
        (lambda: tri_stn.Velocity(torch.rand(1, 3, 3, 2), steps=-1), ValueError, "steps must not be negative; got -1"),
        (lambda: tri_stn.Velocity(torch.rand(1, 3, 3, 2), unit="voxel"), ValueError, "got 'voxel'"),
        (lambda: tri_stn.FreeForm(torch.rand(1, 4, 4, 2)).inverse(), NotImplementedError, "FreeForm has no inverse"),
    ],
)
def test_what_does_not_fit(backend, call, error, says):
    with pytest.raises(error, match=says):
        call()
