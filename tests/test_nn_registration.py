"""Flows in voxels: VoxelMorph's two layers, written out in plain torch in fp64, are the truth."""

import pytest
import torch
import torch.nn.functional as F

import tri_stn
from tri_stn.nn import DisplacementWarp, ScalingAndSquaring

SIZES = {2: (5, 4), 3: (3, 4, 5)}
DIMS = pytest.mark.parametrize("dims", SIZES)
REFERENCE = pytest.mark.parametrize("backend", ["reference"], indirect=True)


def voxelmorph(src, flow, mode="bilinear", padding_mode="zeros"):
    """VoxelMorph's SpatialTransformer: a grid of indices plus the flow, over size - 1, turned round to x first."""
    size = flow.shape[2:]
    places = torch.stack(torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij")) + flow
    scaled = torch.stack([2 * places[:, i] / (n - 1) - 1 for i, n in enumerate(size)][::-1], -1)
    return F.grid_sample(src, scaled, mode, padding_mode, align_corners=True)


def random_pair(size, dtype=torch.float64, seed=3, reach=2.0):
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    src = torch.rand(2, 2, *size, generator=generator, dtype=dtype)
    return src, reach * (2 * torch.rand(2, len(size), *size, generator=generator, dtype=dtype) - 1)


@DIMS
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@REFERENCE
def test_matches_voxelmorphs_formula(backend, dims, mode, padding_mode):
    """Values and both gradients; 1e-12 is fp64's rounding of coordinates and sums."""
    tensors = [t.requires_grad_() for t in random_pair(SIZES[dims])]
    actual = DisplacementWarp(mode, padding_mode)(*tensors)
    truth = voxelmorph(*tensors, mode, padding_mode)
    torch.testing.assert_close(actual, truth, rtol=0, atol=1e-12)
    weight = torch.rand_like(truth)
    grads = [torch.autograd.grad(output, tensors, weight) for output in (actual, truth)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@DIMS
def test_kernels_match_voxelmorphs_formula(backend, dims):
    """1e-5 of order-one values, as everywhere in fp32."""
    src, flow = random_pair(SIZES[dims], torch.float32)
    actual = DisplacementWarp()(src.to(backend), flow.to(backend)).cpu()
    torch.testing.assert_close(actual.double(), voxelmorph(src.double(), flow.double()), rtol=0, atol=1e-5)


@REFERENCE
def test_a_line_and_an_axis_of_one_voxel(backend):
    """Where the usual formula lacks the dimension, or divides by zero."""
    line = torch.arange(6.0)[None, None]
    moved = DisplacementWarp()(line, torch.full((1, 1, 6), 1.5))
    torch.testing.assert_close(moved[0, 0], torch.tensor([1.5, 2.5, 3.5, 4.5, 2.5, 0]))
    plane = line[:, :, None]
    flow = torch.stack([torch.zeros(1, 1, 6), torch.full((1, 1, 6), 1.5)], 1)
    torch.testing.assert_close(DisplacementWarp()(plane, flow)[:, :, 0], moved)


@DIMS
@REFERENCE
def test_x_first_is_the_other_order_and_takes_no_copy(backend, dims):
    src, flow = random_pair(SIZES[dims])
    seen = []

    def sampler(input, transform, **options):
        seen.append(transform.field.untyped_storage().data_ptr())
        return tri_stn.warp(input, transform, **options)

    turned = flow.flip(1)
    moved = DisplacementWarp(x_first=True, sampler=sampler)(src, turned)
    assert torch.equal(moved, DisplacementWarp()(src, flow))
    assert seen == [turned.untyped_storage().data_ptr()]
    velocity = 0.3 * flow
    ours = ScalingAndSquaring(3, x_first=True)(velocity.flip(1)).flip(1)
    assert torch.equal(ours, ScalingAndSquaring(3)(velocity))


def vec_int(velocity, steps, padding_mode):
    """VoxelMorph's VecInt, with its zeros or another padding."""
    moved = velocity / 2**steps
    for _ in range(steps):
        moved = moved + voxelmorph(moved, moved, padding_mode=padding_mode)
    return moved


@DIMS
@REFERENCE
def test_integrates_as_vec_int_does(backend, dims):
    """With border padding everywhere; with VecInt's own zeros where trajectories stay inside."""
    size = (9, 8, 7)[:dims]
    velocity = random_pair(size, reach=3.0)[1]
    torch.testing.assert_close(ScalingAndSquaring(4)(velocity), vec_int(velocity, 4, "border"), rtol=0, atol=1e-12)
    assert (vec_int(velocity, 4, "zeros") - vec_int(velocity, 4, "border")).abs().max() > 0.1  # the test can tell
    axes = [1 - torch.linspace(-1, 1, n, dtype=torch.float64).square() for n in size]
    velocity = velocity * (0.4 * torch.stack(torch.meshgrid(*axes, indexing="ij")).prod(0))  # stops at the borders
    torch.testing.assert_close(ScalingAndSquaring(7)(velocity), vec_int(velocity, 7, "zeros"), rtol=0, atol=1e-12)


@REFERENCE
def test_gradients_reach_the_velocity(backend):
    src, velocity = random_pair((4, 5), reach=1.0)
    velocity.requires_grad_()
    run = lambda v: DisplacementWarp()(src, ScalingAndSquaring(2)(v))  # noqa: E731
    assert torch.autograd.gradcheck(run, velocity)
    truth = voxelmorph(src, vec_int(velocity, 2, "border"))
    weight = torch.rand_like(truth)
    ours, theirs = (torch.autograd.grad(o, velocity, weight)[0] for o in (run(velocity), truth))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@REFERENCE
def test_compiles_to_one_graph(backend):
    src, flow = random_pair((4, 5), torch.float32)
    module = torch.nn.Sequential()
    module.integrate, module.read = ScalingAndSquaring(2), DisplacementWarp()
    compiled = torch.compile(lambda s, v: module.read(s, module.integrate(v)), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(src, flow), module.read(src, module.integrate(flow)))
    assert not module.state_dict()


SRC = torch.zeros(1, 1, 4, 5)


@pytest.mark.parametrize(
    "call,error,says",
    [
        (lambda: DisplacementWarp()(SRC, torch.zeros(1, 4, 5, 2)), ValueError, r"flow of shape \(N, d, \*size\)"),
        (lambda: DisplacementWarp()(SRC, torch.zeros(1, 2, 5, 4)), ValueError, "of the same size; got src .*Resize"),
        (lambda: DisplacementWarp()(SRC, torch.zeros(1, 2, 4, 5).long()), TypeError, "floating-point dtype"),
        (lambda: DisplacementWarp("trilinear")(SRC, torch.zeros(1, 2, 4, 5)), ValueError, "mode must be one of"),
        (lambda: ScalingAndSquaring()(torch.zeros(1, 3, 4, 5)), ValueError, "ScalingAndSquaring takes a flow"),
        (lambda: ScalingAndSquaring(-1)(torch.zeros(1, 2, 4, 5)), ValueError, "steps must not be negative"),
    ],
)
def test_what_does_not_fit(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_says_its_settings():
    assert repr(DisplacementWarp("nearest", x_first=True)) == (
        "DisplacementWarp(mode='nearest', padding_mode='zeros', align_corners=True, x_first=True)"
    )
    assert repr(ScalingAndSquaring()) == "ScalingAndSquaring(steps=7)"
