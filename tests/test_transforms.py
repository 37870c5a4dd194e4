"""Transforms against the grid that plain torch builds for them in fp64."""

import math

import pytest
import torch
from test_warp import MODES, PADDING_MODES, check
from user_maps import RadialDistortion

import tri_stn
from tri_stn.testing import Case


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_projective_maps_match_torch(backend, mode, padding_mode, align_corners):
    case = Case(kind="projective", mode=mode, padding_mode=padding_mode, align_corners=align_corners, maps=2)
    check(case.with_(size=(5, 4), input_size=(4, 6)), backend)


def test_projective_maps_of_volumes(backend):
    check(Case(kind="projective", size=(2, 3, 4), input_size=(3, 4, 2), arrangement="channels_last"), backend)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_infinity_and_what_lies_behind_it(backend, padding_mode):
    """The divisor is x: the left half of the output is behind infinity and the middle column at it."""
    image = torch.rand(1, 1, 3, 5, device=backend, requires_grad=True)
    matrix = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [1, 0, 0]]], device=backend, requires_grad=True)
    output = tri_stn.warp(image, tri_stn.Projective(matrix), padding_mode=padding_mode)
    gradients = torch.autograd.grad(output[..., :3].sum(), (image, matrix), retain_graph=True)
    assert output.isfinite().all() and (gradients[1] == 0).all()
    if padding_mode == "zeros":
        assert (output[..., :3] == 0).all() and (gradients[0] == 0).all()
    assert (torch.autograd.grad(output[..., 3:].sum(), matrix)[0] != 0).any()


def test_a_projective_matrix_of_an_affine_map_is_that_map(backend):
    """Whatever positive number it is multiplied by."""
    image, theta, _ = Case().tensors(backend)
    matrix = torch.cat([theta, torch.tensor([[[0.0, 0.0, 1.0]]], device=backend)], 1)
    expected = tri_stn.warp(image, tri_stn.Affine(theta))
    torch.testing.assert_close(tri_stn.warp(image, tri_stn.Projective(3 * matrix)), expected)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_displacements_in_pixels_match_torch(backend, mode, padding_mode, align_corners):
    case = Case(kind="pixel_displacement", mode=mode, padding_mode=padding_mode, align_corners=align_corners)
    check(case.with_(size=(5, 4), input_size=(4, 6)), backend)


@pytest.mark.parametrize("size,input_size", [((7,), (5,)), ((2, 3, 4), (3, 4, 2))])
def test_displacements_in_pixels_in_other_dimensions(backend, size, input_size):
    check(Case(kind="pixel_displacement", size=size, input_size=input_size), backend)


def test_a_displacement_of_one_pixel_moves_by_one_pixel(backend):
    image = torch.rand(1, 2, 4, 5, device=backend)
    field = torch.tensor([1.0, 0.0], device=backend).expand(1, 4, 5, 2)
    for align_corners in (False, True):
        output = tri_stn.warp(image, tri_stn.Displacement(field, unit="pixel"), align_corners=align_corners)
        torch.testing.assert_close(output[..., :-1], image[..., 1:])


def windows(scale, translation):
    if scale.dim() < translation.dim():
        scale = scale.unsqueeze(-1).expand_as(translation)
    return torch.cat([torch.diag_embed(scale), translation.unsqueeze(-1)], -1)


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("per_axis", [False, True])
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_attention_is_a_window(backend, batch, dims, per_axis):
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(*batch, *(dims,) * per_axis, generator=generator)
    translation = torch.rand(*batch, dims, generator=generator) - 0.5
    image = torch.rand(batch[0], 2, *(4, 5, 3)[:dims], generator=generator)
    output = tri_stn.warp(image, tri_stn.Attention(scale, translation))
    expected = tri_stn.warp(image, tri_stn.Affine(windows(scale, translation)))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_similarity_turns_clockwise(backend):
    """A quarter turn of the map: the output's right edge, x = 1, looks at the input's bottom, y = 1."""
    image = torch.rand(1, 1, 4, 4)
    quarter = tri_stn.Similarity(torch.ones(1), torch.tensor([math.pi / 2]), torch.zeros(1, 2))
    torch.testing.assert_close(tri_stn.warp(image, quarter), image.rot90(1, (2, 3)))
    turned = tri_stn.Similarity(torch.tensor([0.5]), torch.tensor([0.3]), torch.tensor([[0.1, -0.2]]))
    c, s = 0.5 * math.cos(0.3), 0.5 * math.sin(0.3)
    theta = torch.tensor([[[c, -s, 0.1], [s, c, -0.2]]])
    torch.testing.assert_close(turned.parameters, theta)


@pytest.mark.parametrize(
    "make,shapes",
    [(tri_stn.Attention, [(1, 2), (1, 2)]), (tri_stn.Similarity, [(1,), (1,), (1, 2)])],
    ids=["Attention", "Similarity"],
)
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_gradients_of_all_parameters(backend, make, shapes):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 1, 4, 5, generator=generator, dtype=torch.float64)
    parameters = [0.3 + torch.rand(s, generator=generator, dtype=torch.float64) for s in shapes]
    inputs = [t.requires_grad_() for t in (image, *parameters)]

    def run(image, *parameters):
        return tri_stn.warp(image, make(*parameters), (3, 4), padding_mode="border")

    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


POINTS = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])
TRIANGLES = torch.tensor([[0, 1, 2], [1, 2, 3]])
NUMBERS = {  # of one map each, near the identity, and what takes them
    "affine": (lambda: [torch.eye(2, 3)], tri_stn.Affine),
    "attention": (lambda: [torch.ones(()), torch.zeros(2)], tri_stn.Attention),
    "similarity": (lambda: [torch.ones(()), torch.zeros(()), torch.zeros(2)], tri_stn.Similarity),
    "thin_plate": (lambda: [POINTS], lambda s: tri_stn.ThinPlateSpline(POINTS, s)),
    "piecewise_affine": (lambda: [0.9 * POINTS], lambda s: tri_stn.PiecewiseAffine(POINTS, TRIANGLES, s)),
    "velocity": (lambda: [torch.zeros(4, 4, 2)], lambda field: tri_stn.Velocity(field, 2)),
    "registered": (lambda: [torch.zeros(()), torch.zeros(())], RadialDistortion),
}
CHAINS = {
    **{name: [name] for name in NUMBERS},
    "matrices": ["affine", "attention", "similarity"],
    "matrices among others": ["affine", "attention", "thin_plate"],
    "a field": ["affine", "velocity"],
}


def test_what_is_shown_are_shapes():
    fields = tri_stn.Velocity(torch.rand(1, 3, 4, 2)), RadialDistortion(torch.rand(2), torch.rand(2))
    shown = repr(tri_stn.Compose(*fields))
    assert shown == (
        "Compose(Velocity(field=<(1, 3, 4, 2)>, steps=7, unit='normalized', align_corners=False), "
        "RadialDistortion(k1=<(2,)>, k2=<(2,)>))"
    )


@pytest.mark.parametrize("first_used", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_tensors_are_read_at_each_use(backend, name, first_used):
    """As by a loop that makes a transform once, while an optimiser moves its tensors."""
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(1, 1, 4, 4, generator=generator)
    links = [[t + 0.1 * torch.randn(1, *t.shape, generator=generator) for t in NUMBERS[n][0]()] for n in CHAINS[name]]
    leaves = [t.requires_grad_() for link in links for t in link]

    def make():
        chain = [NUMBERS[n][1](*link) for n, link in zip(CHAINS[name], links, strict=True)]
        return chain[0] if len(chain) == 1 else tri_stn.Compose(*chain)

    with first_used():
        transform = make()
        tri_stn.warp(image, transform)
    optimiser, seen = torch.optim.SGD(leaves, 0.1), []
    for _ in range(2):
        for _ in range(2):  # gradients of two images, added up
            seen.append(tri_stn.warp(image, transform, padding_mode="border"))
            seen[-1].square().sum().backward()
        assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves)
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            seen.append(tri_stn.warp(image, transform, padding_mode="border"))
            assert torch.equal(seen[-1], tri_stn.warp(image, make(), padding_mode="border"))
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[2], seen[-1])


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: tri_stn.Attention(torch.rand(2, 3), torch.rand(2, 2)), r"shape \(2,\) or \(2, 2\).*got \(2, 3\)"),
        (lambda: tri_stn.Attention(torch.rand(2), torch.rand(2)), r"\(N, d\) or \(N, K, d\).*got \(2,\)"),
        (lambda: tri_stn.Similarity(torch.rand(2), torch.rand(3), torch.rand(2, 2)), r"angle.*got \(2, 2\) and \(3,\)"),
        (lambda: tri_stn.Similarity(torch.rand(2), torch.rand(2), torch.rand(2, 3)), r"got \(2, 3\)"),
        (lambda: tri_stn.Projective(torch.rand(2, 2, 3)), r"\(N, 3, 3\) or \(N, K, 3, 3\).*got \(2, 2, 3\)"),
        (lambda: tri_stn.Displacement(torch.rand(1, 2, 3, 2), unit="voxel"), "'normalized' or 'pixel'; got 'voxel'"),
    ],
)
def test_what_does_not_fit(call, says):
    with pytest.raises(ValueError, match=says):
        call()
