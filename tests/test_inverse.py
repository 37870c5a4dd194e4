"""Inverses of transforms: what goes there and back again stays where it was."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import tri_stn
from tri_stn.testing import Case, warp_truth

DOUBLE = torch.float64
MAPS = {
    "affine_1d": (tri_stn.Affine, [(2, 1, 2)]),
    "affine": (tri_stn.Affine, [(2, 2, 3)]),
    "affine_3d": (tri_stn.Affine, [(2, 3, 3, 4)]),
    "attention": (tri_stn.Attention, [(2,), (2, 3)]),
    "attention_axes": (tri_stn.Attention, [(2, 3, 2), (2, 3, 2)]),
    "similarity": (tri_stn.Similarity, [(2, 3), (2, 3), (2, 3, 2)]),
    "projective": (tri_stn.Projective, [(2, 3, 3)]),
    "projective_3d": (tri_stn.Projective, [(2, 3, 4, 4)]),
}
"""Each closed form, and the shapes of its arguments."""
EACH = pytest.mark.parametrize("name", MAPS)
REFERENCE = pytest.mark.parametrize("backend", ["reference"], indirect=True)


def make(name, dtype=DOUBLE):
    """The class, and arguments away from what is singular: near the identity, or between 0.4 and 1."""
    transform, shapes = MAPS[name]
    generator = torch.Generator().manual_seed(5)
    values = [torch.rand(shape, generator=generator, dtype=DOUBLE) for shape in shapes]
    if name.startswith(("affine", "projective")):
        values = [torch.eye(*value.shape[-2:], dtype=DOUBLE) + 0.5 * (value - 0.5) for value in values]
    else:
        values = [0.4 + 0.6 * value for value in values]
    return transform, [value.to(dtype) for value in values]


def arguments(transform):
    return [getattr(transform, name) for name in transform.__dataclass_fields__]


@EACH
def test_there_and_back_is_the_identity(name):
    transform, values = make(name)
    there = transform(*values)
    back = there.inverse()
    assert type(back) is transform
    assert [(t.shape, t.dtype) for t in arguments(back)] == [(v.shape, v.dtype) for v in values]
    for first, second in ((there, back), (back, there)):
        both = tri_stn.compose(first.parameters, second.parameters)
        identity = torch.eye(*both.shape[-2:], dtype=DOUBLE).expand_as(both)
        torch.testing.assert_close(both, identity, rtol=0, atol=1e-13)  # fp64, condition numbers below 10


def test_what_is_in_view_comes_back_into_view():
    """Of a projective map with half of the plane behind infinity, each pixel's origin by its inverse.

    Both signs of the matrix, as these are different maps: one has in view what the other has not.
    """
    ramp = (torch.arange(40, dtype=DOUBLE) + 0.5) / 20 - 1
    places = torch.stack([ramp.expand(40, 40), ramp[:, None].expand(40, 40), torch.ones(40, 40)])
    matrix = torch.tensor([[[0.7, 0.1, 0.1], [-0.2, 0.8, 0.0], [0.9, 0.4, 0.3]]], dtype=DOUBLE)
    seen = []
    for sign in (1, -1):
        origin = tri_stn.warp(places[None], tri_stn.Projective(sign * matrix).inverse())[0]
        inside = origin[2] > 1 - 1e-9  # all four neighbours are places, so that linear reading gives places
        point = torch.einsum("ij,jyx->iyx", sign * matrix[0], origin)
        assert (point[2][inside] > 0).all()
        for axis in (0, 1):
            actual, expected = (point[axis] / point[2])[inside], places[axis][inside]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        seen.append(inside)
    print(f"in view: {seen[0].sum()} pixels, of the other sign {seen[1].sum()}")
    assert seen[0].any() and seen[1].any() and not (seen[0] & seen[1]).any()


@EACH
def test_gradients(name):
    transform, values = make(name)

    def run(*values):
        return tuple(arguments(transform(*values).inverse()))

    values, fast = [value.requires_grad_() for value in values], name.endswith("3d")
    assert gradcheck(run, values, check_forward_ad=True, fast_mode=fast)
    assert torch.autograd.gradgradcheck(run, values, fast_mode=fast)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computed_wide_and_rounded_once(name, dtype):
    transform, values = make(name, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        back = transform(*values).inverse()
    truth = transform(*(value.double() for value in values)).inverse()
    for actual, exact in zip(arguments(back), arguments(truth), strict=True):
        # Half a step of the dtype; and fp32 through condition numbers below 10.
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
        assert ((actual.double() - exact).abs() <= allowed).all()


@EACH
def test_never_looks_at_values(name):
    """A meta tensor has none: a branch on one, or .item(), would raise. And one graph under torch.compile."""
    transform, values = make(name)

    def run(*values):
        return arguments(transform(*values).inverse())

    for on_meta, value in zip(run(*(value.to("meta") for value in values)), values, strict=True):
        assert on_meta.device.type == "meta" and on_meta.shape == value.shape
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*values), run(*values), rtol=1e-12, atol=1e-12)


def test_what_has_no_inverse_says_what_has():
    with pytest.raises(NotImplementedError, match=r"Grid has no inverse\(\).*Affine, .* and Projective have"):
        tri_stn.Grid(torch.rand(1, 3, 4, 2)).inverse()


@REFERENCE
def test_a_chain_is_undone_from_its_end(backend):
    """The inverse of "theta, then f" reads at theta⁻¹(p + v(p)), for f's inverse v."""
    field, image = contraction((7, 6), batch=(1,)), torch.rand(1, 2, 7, 6, dtype=DOUBLE)
    theta = torch.tensor([[[0.8, 0.2, 0.1], [-0.3, 0.9, 0.0]]], dtype=DOUBLE)
    chain = tri_stn.Compose(tri_stn.Affine(theta), tri_stn.Displacement(field, "pixel"))
    identity = torch.eye(2, 3, dtype=DOUBLE)[None]
    places = F.affine_grid(identity, image.shape, align_corners=False)
    places = places + tri_stn.Displacement(field, "pixel").inverse().field / torch.tensor([3.0, 3.5])
    grid = F.pad(places, (0, 1), value=1.0) @ tri_stn.invert(theta)[:, None].mT
    expected = F.grid_sample(image, grid, align_corners=False)
    torch.testing.assert_close(tri_stn.warp(image, chain.inverse()), expected, rtol=0, atol=1e-12)


# --- displacement fields ---------------------------------------------------------------------------

SIZES = {1: (9,), 2: (7, 6), 3: (4, 5, 3)}


def contraction(size, lipschitz=0.5, batch=(2,), dtype=DOUBLE, seed=2):
    """A random field in pixels, (*batch, *size, d), read bilinearly with this Lipschitz constant (largest norm).

    Between two places, each component changes by at most the sum over axes of the largest step between
    neighbours times the distance along that axis.
    """
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    field = torch.rand(*batch, *size, len(size), generator=generator, dtype=DOUBLE) * 2 - 1
    field = 2 + 4 * field  # and, on average, to one side: over the border
    steps = sum(field.diff(dim=axis).abs().max() for axis in range(len(batch), field.dim() - 1))
    return (lipschitz / steps * field).to(dtype)


def read(field, places, align_corners=False):
    """A field in pixels (N, *size, d) read at places that lie places away, by torch in fp64."""
    size = tuple(field.shape[1:-1])
    case = Case(
        kind="pixel_displacement", input_size=size, size=size, padding_mode="border", align_corners=align_corners
    )
    return warp_truth(case, field.movedim(-1, 1), places).movedim(1, -1)


@pytest.mark.parametrize("iterations", [0, 1, 5, 60])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dims", SIZES)
@REFERENCE
def test_each_iteration_shrinks_the_error_by_the_lipschitz_constant(backend, dims, align_corners, iterations):
    field = contraction(SIZES[dims])
    inverse = tri_stn.Displacement(field, "pixel").inverse(iterations, align_corners)
    assert inverse.unit == "pixel" and inverse.field.shape == field.shape
    residual = (inverse.field + read(field, inverse.field, align_corners)).abs().max()
    bound = 0.5 ** (iterations + 1) * field.abs().max()
    print(f"residual {residual:.2e}, bound {bound:.2e}")
    assert residual <= bound + 1e-14  # fp64
    exact = tri_stn.Displacement(field, "pixel").inverse(80, align_corners).field
    assert (inverse.field - exact).abs().max() <= bound + 1e-14


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dims", SIZES)
@REFERENCE
def test_both_units_have_one_inverse(backend, dims, align_corners):
    field = contraction(SIZES[dims])
    per_unit = torch.tensor([(n - align_corners) / 2 for n in reversed(SIZES[dims])], dtype=DOUBLE)
    pixels = tri_stn.Displacement(field, "pixel").inverse(9, align_corners)
    normalized = tri_stn.Displacement(field / per_unit).inverse(9, align_corners)
    torch.testing.assert_close(normalized.field * per_unit, pixels.field, rtol=1e-12, atol=1e-12)


def test_fields_of_several_maps(backend):
    field = contraction((4, 3), batch=(2, 2), dtype=torch.float32)
    together = tri_stn.Displacement(field, "pixel").inverse(3).field
    for k in range(2):
        alone = tri_stn.Displacement(field[:, k].double(), "pixel").inverse(3).field
        torch.testing.assert_close(together[:, k].double(), alone, rtol=0, atol=1e-5)  # fp32 places, in pixels
    planes = field.movedim(-1, 2).contiguous().movedim(2, -1)  # as a network gives it
    torch.testing.assert_close(tri_stn.Displacement(planes, "pixel").inverse(3).field, together)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@REFERENCE
def test_fields_in_16_bits_are_rounded_once(backend, dtype):
    field = contraction((7, 6), dtype=dtype)
    actual = tri_stn.Displacement(field, "pixel").inverse().field
    truth = tri_stn.Displacement(field.double(), "pixel").inverse().field
    assert actual.dtype == dtype
    # Half a step of the dtype; and fp32 places of pixels.
    assert ((actual.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5).all()


@pytest.mark.parametrize("dims", SIZES)
@REFERENCE
def test_the_inverse_is_differentiable(backend, dims):
    field = contraction(SIZES[dims], batch=(1,)).requires_grad_()

    def run(field):
        return tri_stn.Displacement(field, "pixel").inverse(3).field

    assert gradcheck(run, field, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize(
    "arguments,error,says",
    [
        ((-1,), ValueError, "iterations must not be negative; got -1"),
        ((2.0,), TypeError, r"iterations must be an integer; got 2\.0"),
        ((2, None), TypeError, "align_corners must be True or False; got None"),
    ],
)
def test_what_does_not_fit(arguments, error, says):
    with pytest.raises(error, match=says):
        tri_stn.Displacement(torch.zeros(1, 3, 4, 2)).inverse(*arguments)
