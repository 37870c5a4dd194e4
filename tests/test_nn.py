"""The modules: they start at the identity, learn, and fit into what people wrap modules in."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tri_stn
import tri_stn.nn as stn

SIZE = (6, 7)


def a_basis() -> Tensor:
    y, x = torch.meshgrid(*[(torch.arange(n) * 2 + 1) / n - 1 for n in SIZE], indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * y, x * x])


MAPS = {
    **{name: build for name, build in stn.maps.NAMED.items() if name != "attention"},
    "attention": lambda: stn.AttentionMap(per_axis=True),
    "basis": lambda: stn.LinearBasisMap(a_basis()),
    "learned basis": lambda: stn.LinearBasisMap(a_basis(), learnable=True),
    "points": lambda: stn.ThinPlateSplineMap(torch.rand(5, 2)),
    "regularized": lambda: stn.ThinPlateSplineMap((3, 3), regularization=0.1),
}


@pytest.fixture(autouse=True)
def on_the_cpu_path(monkeypatch):
    """Modules are torch around `warp`, whose kernels have tests of their own."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.manual_seed(0)


def transformer(transform: str | stn.ParametricMap = "affine", channels: int = 2, **options) -> stn.SpatialTransformer:
    count = options.get("parallel") or 1
    count *= (stn.maps.NAMED[transform]() if isinstance(transform, str) else transform).count
    localisation = stn.FullyConnected(channels * SIZE[0] * SIZE[1], count, hidden=(8,))
    return stn.SpatialTransformer(localisation, transform, **options)


def moved(module: stn.SpatialTransformer, amount: float = 0.05) -> stn.SpatialTransformer:
    """The same after some learning, as far as the localisation's last layer can tell."""
    last = module.localisation[-1]
    with torch.no_grad():
        last.bias.uniform_(-amount, amount)
        last.weight.uniform_(-amount, amount)
    return module


@pytest.mark.parametrize("name", MAPS)
def test_every_map_starts_at_the_identity_and_learns(name):
    module = transformer(MAPS[name]())
    images = torch.rand(3, 2, *SIZE)
    torch.testing.assert_close(module(images), images, atol=1e-5, rtol=0)  # coordinates are fp32
    (module(images) * torch.rand(3, 2, *SIZE)).sum().backward()
    for parameter in [module.localisation[-1].weight, *module.map.parameters()]:
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", MAPS)
def test_the_map_is_built_from_its_numbers(name):
    """Against the transform class, by hand."""
    module = moved(transformer(MAPS[name]()))
    images = torch.rand(3, 2, *SIZE)
    found = module.map.identity + module.localisation(images)
    lattice = [found.unflatten(1, (5, 5, 2))] if name == "free_form" else []
    points = found.unflatten(1, (-1, 2))
    corner = torch.cat([found, torch.ones(3, 1)], 1).view(3, 3, 3) if name == "projective" else None
    map = module.map
    expected = {
        "affine": lambda: tri_stn.Affine(found.view(3, 2, 3)),
        "attention": lambda: tri_stn.Attention(found[:, :2], found[:, 2:]),
        "similarity": lambda: tri_stn.Similarity(found[:, 0].exp(), found[:, 1], found[:, 2:]),
        "projective": lambda: tri_stn.Projective(corner),
        "free_form": lambda: tri_stn.FreeForm(*lattice),
        "piecewise_affine": lambda: tri_stn.PiecewiseAffine(map.target_points, map.triangles, points),
        "basis": lambda: tri_stn.LinearBasis(found.view(3, 2, -1), a_basis()),
        "learned basis": lambda: tri_stn.LinearBasis(found.view(3, 2, -1), a_basis()),
    }.get(name, lambda: tri_stn.ThinPlateSpline(map.target_points, points, map.regularization))()
    output = module(images)
    assert (output - images).abs().max() > 1e-3
    torch.testing.assert_close(output, tri_stn.warp(images, expected))


def test_volumes_and_lines():
    for dims, size in ((1, (9,)), (3, (4, 5, 6))):
        for build in (stn.AffineMap, stn.AttentionMap) + ((stn.ProjectiveMap,) if dims == 3 else ()):
            map = build(dims=dims)
            localisation = stn.Convolutional(1, map.count, channels=(3,), kernel_size=3, pool=2, hidden=4, dims=dims)
            images = torch.rand(2, 1, *size)
            torch.testing.assert_close(stn.SpatialTransformer(localisation, map)(images), images, atol=1e-5, rtol=0)


def test_parallel_maps_are_separate_transformers_on_one_input():
    module = moved(transformer("affine", size=(4, 3), parallel=3, align_corners=True), 0.3)
    images = torch.rand(2, 2, *SIZE)
    output, parameters = module(images, return_parameters=True)
    assert output.shape == (2, 3, 2, 4, 3) and parameters.shape == (2, 3, 6)
    for k in range(3):
        one = tri_stn.warp(images, tri_stn.Affine(parameters[:, k].view(2, 2, 3)), (4, 3), align_corners=True)
        torch.testing.assert_close(output[:, k], one)


def test_what_is_read_may_be_another_image_than_what_is_looked_at():
    module = moved(transformer("affine", size=5), 0.3)
    small, large = torch.rand(2, 2, *SIZE), torch.rand(2, 3, 30, 40)
    theta = module.localise(small).view(2, 2, 3)
    torch.testing.assert_close(module(small, large), tri_stn.warp(large, tri_stn.Affine(theta), (5, 5)))


def test_bounds_hold_and_start_with_slope_one():
    limits = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.3])
    module = transformer("affine", bounds=limits)
    images = torch.rand(4, 2, *SIZE)
    with torch.no_grad():
        module.localisation[-1].bias.fill_(1e-3)
        near = module.localise(images) - module.map.identity
        module.localisation[-1].bias.fill_(100.0)
        far = module.localise(images) - module.map.identity
    torch.testing.assert_close(near, torch.full_like(near, 1e-3), atol=1e-6, rtol=0)
    torch.testing.assert_close(far, limits.expand_as(far))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_windows_stay_inside_whatever_localisation_says(dims):
    map = stn.AttentionMap(dims, inside=True, smallest=0.2, start=0.6, per_axis=dims == 3)
    start = map(map.identity[None])
    torch.testing.assert_close(start.scale, torch.full_like(start.scale, 0.6))
    window = map(torch.randn(100, map.count) * 10)
    scale = window.scale if dims == 3 else window.scale[:, None]
    assert scale.min() >= 0.2 and ((window.translation.abs() + scale) <= 1 + 1e-6).all()


def test_penalty_is_zero_at_the_identity_and_pulls_towards_it():
    module = moved(transformer("affine"), 0.3)
    parameters = module.localise(torch.rand(3, 2, *SIZE))
    torch.testing.assert_close(module.penalty(parameters), ((parameters - module.map.identity) ** 2).mean())
    module.penalty(parameters).backward()
    assert module.localisation[-1].bias.grad.abs().max() > 0
    assert module.penalty(module.map.identity.expand(3, -1)) == 0


def test_a_network_with_the_identity_in_its_bias_needs_no_residual():
    """The usual tutorial's localisation network."""
    localisation = nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 7, 6))
    nn.init.zeros_(localisation[-1].weight)
    localisation[-1].bias.data.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))
    images = torch.rand(2, 2, *SIZE)
    for bounds in (None, 0.5):
        module = stn.SpatialTransformer(localisation, residual=False, bounds=bounds)
        torch.testing.assert_close(module(images), images, atol=1e-5, rtol=0)


def test_options_reach_the_sampler():
    options = {"mode": "bicubic", "padding_mode": "border", "align_corners": True}
    module = moved(transformer("affine", **options), 0.5)
    images = torch.rand(2, 2, *SIZE)
    theta = module.localise(images).view(2, 2, 3)
    grid = F.affine_grid(theta, [2, 2, *SIZE], align_corners=True)
    torch.testing.assert_close(module(images), F.grid_sample(images, grid, "bicubic", "border", True))
    for fill in (0.5, [0.25, 0.5]):
        filled = moved(transformer("affine", fill=fill, size=5, antialias=True), 0.5)
        theta = filled.localise(images).view(2, 2, 3)
        expected = tri_stn.warp(images, tri_stn.Affine(theta), (5, 5), fill=fill, antialias=True)
        torch.testing.assert_close(filled(images), expected)


def test_state_dict_holds_what_is_learned_under_names_that_stay():
    """A state dict that was saved by an earlier version has these names."""
    names = {"localisation.1.weight", "localisation.1.bias", "localisation.3.weight", "localisation.3.bias"}
    for transform in ("affine", "thin_plate_spline", "piecewise_affine"):
        assert set(transformer(transform, bounds=0.5, fill=[0.0, 1.0]).state_dict()) == names
    assert set(transformer(stn.LinearBasisMap(a_basis(), learnable=True)).state_dict()) == names | {"map.basis"}
    convolutional = stn.Convolutional(2, 6)
    assert set(convolutional.state_dict()) == {f"{i}.{n}" for i in (0, 3, 8, 10) for n in ("weight", "bias")}


@pytest.mark.parametrize("name", MAPS)
def test_state_dicts_round_trip(name):
    module, images = moved(transformer(MAPS[name]())), torch.rand(2, 2, *SIZE)
    other = transformer(MAPS[name]())
    if name == "points":  # control points are a setting, not learned
        other.map = copy.deepcopy(module.map)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(images), module(images))
    assert torch.equal(pickle.loads(pickle.dumps(module))(images), module(images))


@pytest.mark.parametrize("way", ["to_empty", "assign", "reset"])
@pytest.mark.parametrize("name", MAPS)
def test_modules_built_on_the_meta_device_get_their_settings_back(name, way):
    """They are in no state dict. Such a module tells shapes before it has numbers."""
    basis, points = a_basis(), torch.rand(5, 2)
    build = {
        "basis": lambda: stn.LinearBasisMap(basis),
        "learned basis": lambda: stn.LinearBasisMap(basis, learnable=True),
        "points": lambda: stn.ThinPlateSplineMap(points),
    }.get(name, MAPS[name])
    make = lambda: transformer(build(), bounds=0.3, fill=[0.1, 0.2])  # noqa: E731
    expected, images = moved(make()), torch.rand(2, 2, *SIZE)
    with torch.device("meta"):
        module = make()
        assert module(torch.rand(2, 2, *SIZE)).shape == images.shape
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    if way == "reset":  # a module that never was there; also what is learned is as it was
        module = make().to_empty(device="cpu")
        for part in module.modules():
            getattr(part, "reset_parameters", lambda: None)()
        assert name != "learned basis" or torch.equal(module.map.basis, basis)
    elif way == "to_empty":
        module.to_empty(device="cpu")
    module.load_state_dict(expected.state_dict(), assign=way == "assign")
    assert torch.equal(module(images), expected(images))


def test_a_constant_without_numbers_is_refused_when_they_are_needed():
    with torch.device("meta"):
        module = stn.ParametricMap(torch.zeros(3))
        with pytest.raises(ValueError, match="basis of LinearBasisMap is on the meta device"):
            stn.LinearBasisMap(torch.zeros(3, *SIZE))
    with pytest.raises(ValueError, match="identity of this ParametricMap was given on the meta device"):
        module.to_empty(device="cpu")


@pytest.mark.parametrize(
    "given,message",
    [
        ({"transform": "afine"}, "one of affine"),
        ({"parallel": 0}, "at least 1"),
        ({"bounds": -1.0}, "positive"),
        ({"bounds": torch.ones(5)}, r"\(6,\)"),
        ({"localisation": nn.Flatten()}, r"must give \(N, 6\).*AffineMap.*got \(3, 84\) for 3 images"),
        ({"localisation": nn.Identity()}, r"must give \(N, 6\).*got \(3, 2, 6, 7\)"),
        ({"localisation": nn.Flatten(), "parallel": 2}, r"\(N, 12\).*each of 2 maps"),
    ],
)
def test_what_does_not_fit_is_a_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        stn.SpatialTransformer(**{"localisation": nn.Flatten(), **given})(torch.rand(3, 2, *SIZE))


LINE = nn.Flatten()


@pytest.mark.parametrize(
    "make,error,says",
    [
        *[(lambda d=d, m=m: m(dims=d), ValueError, rf"{m.__name__} takes dims .*3; got {d!r}") for m, d in (
            (stn.AffineMap, 0), (stn.AffineMap, 4), (stn.AffineMap, 2.0), (stn.AttentionMap, 4), (stn.ProjectiveMap, 1),
        )],
        (lambda: stn.FreeFormMap((3, 3)), ValueError, "at least 4 control points along each axis"),
        (lambda: stn.FreeFormMap((4,) * 4), ValueError, "d = 1, 2 or 3"),
        (lambda: stn.FreeFormMap(5), TypeError, "integers, one for each axis; got 5"),
        (lambda: stn.ThinPlateSplineMap(torch.rand(4)), ValueError, r"target_points \(K, 2\).*got \(4,\)"),
        (lambda: stn.ThinPlateSplineMap(torch.rand(4, 3)), ValueError, r"target_points \(K, 2\).*got \(4, 3\)"),
        (lambda: stn.ThinPlateSplineMap((2, 2), identity=torch.rand(5, 2)), ValueError, r"\(4, 2\) here; got \(5, 2\)"),
        (lambda: stn.ThinPlateSplineMap(4), ValueError, r"\(rows, columns\), at least 2 each; got 4"),
        (lambda: stn.PiecewiseAffineMap((2.0, 3)), ValueError, r"got \(2.0, 3\)"),
        (lambda: stn.LinearBasisMap(a_basis(), identity=torch.rand(5)), ValueError, r"\(2, 5\) here; got \(5,\)"),
        (lambda: stn.LinearBasisMap(a_basis().long()), TypeError, "basis in a floating-point dtype"),
        (lambda: stn.LinearBasisMap(torch.rand(4)), ValueError, r"a basis \(B, \*size\)"),
        (lambda: stn.SpatialTransformer(None), TypeError, "localisation must be a module.*got NoneType"),
        (lambda: stn.SpatialTransformer(LINE, parallel=True), ValueError, "parallel must be .*got True"),
        (lambda: stn.SpatialTransformer(LINE, mode="x"), ValueError, "mode must be one of"),
        (lambda: stn.SpatialTransformer(LINE, padding_mode="x"), ValueError, "padding_mode must be one of"),
        (lambda: stn.SpatialTransformer(LINE, fill=0.5, padding_mode="border"), ValueError, "fill is for padding_mode"),
        (lambda: stn.SpatialTransformer(LINE, fill=None), TypeError, "fill must be a number.*got None"),
        (lambda: stn.SpatialTransformer(LINE, fill="a"), TypeError, "fill must be a number.*got 'a'"),
        (lambda: stn.SpatialTransformer(LINE, fill=torch.zeros(1, 2)), ValueError, "fill must be one number"),
        (lambda: stn.SpatialTransformer(LINE, bounds="a"), TypeError, "bounds must be a number.*got 'a'"),
        (lambda: stn.SpatialTransformer(LINE, size=4.5), TypeError, "size must be a sequence .*got 4.5"),
        (lambda: stn.SpatialTransformer(LINE, size="ab"), TypeError, "size must be a sequence"),
        (lambda: stn.SpatialTransformer(LINE, size=-1), ValueError, "size must not be negative"),
        (lambda: stn.TPSRectifier(LINE, fill=0.5), ValueError, "fill is for padding_mode"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_sentence_when_it_is_made(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_sampler_of_ones_own_may_have_more_modes():
    stn.SpatialTransformer(LINE, mode="lanczos", padding_mode="wrap", fill=1, sampler=lambda *a, **k: a[0])


def test_other_sentences():
    with pytest.raises(TypeError, match="ParametricMap"):
        stn.SpatialTransformer(nn.Flatten(), tri_stn.Affine)
    with pytest.raises(ValueError, match="identity"):
        stn.LinearBasisMap(torch.rand(3, *SIZE))
    with pytest.raises(ValueError, match="smallest"):
        stn.AttentionMap(inside=True, smallest=0.5, start=0.4)
    with pytest.raises(ValueError, match="at least 2"):
        stn.ThinPlateSplineMap((1, 4))
    with pytest.raises(ValueError, match=r"\(count,\)"):
        stn.ParametricMap(torch.eye(2))
    with pytest.raises(NotImplementedError, match="build"):
        transformer(stn.ParametricMap(torch.zeros(2)))(torch.rand(3, 2, *SIZE))
    with pytest.raises(ValueError, match="dims"):
        stn.Convolutional(1, 6, dims=4)


def test_repr_says_what_it_does():
    shown = repr(transformer("affine", size=(5, 5), parallel=2))
    assert "size=(5, 5), parallel=2, mode=bilinear" in shown and "AffineMap" in shown


# --- what people wrap modules in ---------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["affine", "thin_plate_spline", "free_form"])
@pytest.mark.parametrize("parallel", [None, 2])
def test_compiles_without_a_graph_break(transform, parallel):
    module, images = moved(transformer(transform, size=(4, 5), parallel=parallel)), torch.rand(3, 2, *SIZE)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), module(images))
    expected = torch.autograd.grad(module(images).square().sum(), module.localisation[-1].bias)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(images).square().sum(), module.localisation[-1].bias), expected
    )


@pytest.mark.parametrize("transform", ["affine", "projective", "thin_plate_spline"])
def test_exports_for_any_batch(transform):
    module = moved(transformer(transform, size=(4, 5)))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (torch.rand(3, 2, *SIZE),), dynamic_shapes={"input": {0: batch}})
    images = torch.rand(5, 2, *SIZE)
    torch.testing.assert_close(program.module()(images), module(images))


def test_autocast_keeps_the_identity_whole():
    """In bf16, a number near 1 has steps of 1/128: a quarter of a pixel at this width."""
    localisation = stn.FullyConnected(2 * 4 * 64, 6, hidden=(8,))
    module = stn.SpatialTransformer(localisation)
    with torch.no_grad():
        localisation[-1].bias[2] = 1e-3
    images = torch.rand(2, 2, 4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, parameters = module(images, return_parameters=True)
    assert parameters.dtype == torch.float32 and output.dtype == torch.float32
    torch.testing.assert_close(parameters[:, 2], torch.full((2,), 1e-3), rtol=2**-8, atol=0)
    assert not torch.equal(output, images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_whole_modules_in_other_dtypes(dtype):
    module = transformer("affine").to(dtype)
    images = torch.rand(2, 2, *SIZE).to(dtype)
    assert torch.equal(module(images), images) or dtype == torch.float64
    assert module(images).dtype == dtype
    module(images).sum().backward()
    assert module.localisation[-1].bias.grad.dtype == dtype


def test_activation_checkpoints_change_nothing():
    from torch.utils.checkpoint import checkpoint

    module, images = moved(transformer("affine")), torch.rand(2, 2, *SIZE, requires_grad=True)
    wanted = [images, *module.localisation.parameters()]
    expected = torch.autograd.grad(module(images).square().sum(), wanted)
    output = checkpoint(module, images, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(output.square().sum(), wanted), expected, strict=True):
        assert torch.equal(one, other)


def test_channels_last_is_kept():
    module = moved(transformer("affine", channels=4))
    images = torch.rand(2, 4, *SIZE)
    output = module(images.to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, module(images))


def test_data_parallel_and_copies():
    module, images = moved(transformer("thin_plate_spline")), torch.rand(4, 2, *SIZE)
    torch.testing.assert_close(nn.DataParallel(module)(images), module(images))
    torch.testing.assert_close(copy.deepcopy(module)(images), module(images))


@pytest.mark.gpu
def test_runs_under_autocast_on_a_device_and_never_waits():
    module = moved(transformer("affine", parallel=2, fill=[0.0, 1.0], bounds=0.5)).cuda()
    images = torch.rand(4, 2, *SIZE, device="cuda")
    module(images)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.float16):
            module(images).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_between_layers_the_whole_network_learns():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), transformer("affine", size=(4, 4)), nn.Flatten(), nn.Linear(32, 3)
    )
    network(torch.rand(2, 1, *SIZE)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


MODULES = [name for _, name, _ in pkgutil.iter_modules(stn.__path__, "tri_stn.nn.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_every_module_has_an_example():
    for name in stn.__all__:
        assert ">>> " in getattr(stn, name).__doc__, name
