"""Smoothness of known fields, and local correlation against windows written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from tri_stn.nn import BendingEnergy, GradientLoss, LocalNCCLoss, bending_energy, gradient_loss, local_ncc

DOUBLE = torch.float64
SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}
DIMS = pytest.mark.parametrize("dims", SIZES)


def places(size, spacing):
    axes = [torch.arange(n, dtype=DOUBLE) * h for n, h in zip(size, spacing, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def random(*shape, seed=5, dtype=DOUBLE):
    print(f"seed {seed}")
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


@DIMS
def test_polynomials_have_the_value_of_their_formula(dims):
    """Slopes of linear fields and second derivatives of quadratic ones, with another spacing along each axis."""
    spacing = (0.5, 2.0, 1.25)[:dims]
    v = places(SIZES[dims], spacing)
    slopes = random(dims, dims) - 0.5
    linear = (v @ slopes.mT).movedim(-1, 0)[None] + 3
    expected = {"l2": slopes.square().mean(0).sum() / dims, "l1": slopes.abs().mean(0).sum() / dims}
    for penalty, value in expected.items():
        torch.testing.assert_close(gradient_loss(linear, penalty, spacing), value)
    hessians = random(dims, dims, dims, seed=6) - 0.5
    hessians = hessians + hessians.mT
    quadratic = torch.einsum("...a,kab,...b->k...", v, hessians / 2, v)[None] + linear
    value = bending_energy(quadratic, spacing)
    torch.testing.assert_close(value, hessians.square().sum((1, 2)).mean())
    assert bending_energy(linear, spacing) < 1e-20 < value


def test_sees_what_alternates_from_voxel_to_voxel():
    """A chessboard, whose central differences are all zero."""
    board = (-1.0) ** torch.arange(6)
    board = (board[:, None] * board)[None, None]
    assert gradient_loss(board) == 4
    assert bending_energy(board) == 16 + 16 + 2 * 16


@DIMS
def test_smoothness_gradients(dims):
    field = random(2, dims, *SIZES[dims]).requires_grad_()
    assert gradcheck(lambda u: (gradient_loss(u), gradient_loss(u, "l1"), bending_energy(u)), field)
    assert gradgradcheck(lambda u: (gradient_loss(u), bending_energy(u)), field, fast_mode=True)


def test_short_axes_add_nothing():
    field = torch.rand(1, 2, 1, 2).requires_grad_()
    torch.testing.assert_close(gradient_loss(field), field.diff(dim=3).square().mean() / 2)
    assert bending_energy(field) == 0
    bending_energy(field[..., :1]).backward()
    assert (field.grad == 0).all()


def naive_ncc(input, target, window, eps):
    """Every window cut out by itself, its voxels outside left out."""
    size, windows = input.shape[2:], (window,) * (input.dim() - 2)
    total, count = 0, 0
    for n, c in itertools.product(*map(range, input.shape[:2])):
        i, j = input[n, c], target[n, c]
        floors = [eps * x.var(unbiased=False) for x in (i, j)]
        for place in itertools.product(*map(range, size)):
            box = tuple(slice(max(p - w // 2, 0), p + w // 2 + 1) for p, w in zip(place, windows, strict=True))
            a, b = i[box] - i[box].mean(), j[box] - j[box].mean()
            total = total + (a * b).mean() ** 2 / ((a**2).mean() + floors[0]) / ((b**2).mean() + floors[1])
            count += 1
    return total / count


@pytest.mark.parametrize("dims,window,eps", [(1, 5, 1e-4), (2, 3, 1e-4), (2, 9, 1e-2), (3, 3, 1e-3)])
def test_correlation_matches_windows_cut_out(dims, window, eps):
    """Values and both gradients, in fp64."""
    shape = (2, 2, *SIZES[dims]) if dims < 3 else (1, 1, 4, 3, 5)
    pair = [random(*shape, seed=s).requires_grad_() for s in (1, 2)]
    ours, truth = local_ncc(*pair, window, eps), naive_ncc(*pair, window, eps)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=0)
    for g, t in zip(torch.autograd.grad(ours, pair), torch.autograd.grad(truth, pair), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-8, atol=1e-12)


@DIMS
def test_correlation_gradients(dims):
    """Of both images, of either alone, and second derivatives; windows that differ by axis."""
    size, windows = {1: ((7,), 3), 2: ((4, 5), (3, 5)), 3: ((3, 4, 2), (1, 3, 5))}[dims]
    pair = [random(1, 2, *size, seed=s).requires_grad_() for s in (1, 2)]
    run = lambda i, j: local_ncc(i, j, windows, 0.05)  # noqa: E731
    assert gradcheck(run, pair, fast_mode=dims > 1)
    assert gradcheck(lambda j: run(pair[0].detach(), j), pair[1:], fast_mode=dims > 1)
    assert gradgradcheck(run, pair, fast_mode=True)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 2)])
def test_torch_func_takes_the_correlation(in_dims):
    """A vmap against a loop: values, and the gradient taken inside and outside."""
    pair = [random(2, 1, 4, 5, seed=s) for s in (1, 2)]
    mapped = [x if d is None else torch.stack([x, x.flip(0)], d) for x, d in zip(pair, in_dims, strict=True)]
    loss = lambda i, j: local_ncc(i, j, 3, 0.05)  # noqa: E731

    def loop(function, *tensors):
        each = ([x if d is None else x.select(d, k) for x, d in zip(tensors, in_dims, strict=True)] for k in (0, 1))
        return [function(*one) for one in each]

    torch.testing.assert_close(vmap(loss, in_dims)(*mapped), torch.stack(loop(loss, *mapped)))
    both = grad(loss, (0, 1))
    for actual, expected in zip(vmap(both, in_dims)(*mapped), zip(*loop(both, *mapped), strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))
    outside = grad(lambda i, j: vmap(loss, in_dims)(i, j).square().sum(), (0, 1))(*mapped)
    torch.testing.assert_close(outside, grad(lambda i, j: sum(v**2 for v in loop(loss, i, j)), (0, 1))(*mapped))


def test_forward_mode_of_the_correlation():
    """Along a direction, and both orders of nesting, with windows that differ by axis."""
    pair = [random(1, 2, 3, 4, seed=s) for s in (1, 2)]
    along = tuple(random(1, 2, 3, 4, seed=s) for s in (3, 4))
    loss = lambda i, j: local_ncc(i, j, (3, 5), 0.05)  # noqa: E731
    grads = grad(loss, (0, 1))(*pair)
    torch.testing.assert_close(
        jvp(loss, tuple(pair), along)[1], sum((g * v).sum() for g, v in zip(grads, along, strict=True))
    )
    second = jacrev(jacrev(loss))(*pair)
    for hessian in (jacfwd(jacrev(loss)), jacrev(jacfwd(loss)), jacfwd(jacfwd(loss))):
        torch.testing.assert_close(hessian(*pair), second)


def test_correlation_is_voxelmorphs_inside():
    """Where a window lies inside, its five sums give the same without eps; 1e-10 for the rounding of sums."""
    i, j = (random(1, 1, 9, 8, seed=s) for s in (1, 2))
    ones = torch.ones(1, 1, 9, 7, dtype=DOUBLE)
    sums = [F.conv2d(x, ones)[0, 0, 0, 0] for x in (i, j, i * i, j * j, i * j)]
    cross, n = sums[4] - sums[0] * sums[1] / 63, 63
    theirs = cross**2 / ((sums[2] - sums[0] ** 2 / n) * (sums[3] - sums[1] ** 2 / n))
    inner = naive_ncc(i[..., :7], j[..., :7], 17, 0.0)  # one window, at every place the whole image
    torch.testing.assert_close(inner, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(local_ncc(i[..., :7], j[..., :7], 17, 1e-14), theirs, rtol=1e-10, atol=0)


@pytest.mark.parametrize("level", [0.0, 1.0, 1000.0])
def test_flat_regions_are_stable_in_fp32(level):
    """Half of the volumes is flat at a level far from zero: value and gradient are fp64's, and finite."""
    i, j = (random(1, 1, 8, 16, 8, seed=s) for s in (1, 2))
    i, j = (torch.cat([x[:, :, :, :8], torch.zeros_like(x[:, :, :, 8:])], 3) + level for x in (i, i + 0.3 * j))
    results = []
    for dtype in (DOUBLE, torch.float32):
        pair = [x.float().to(dtype).requires_grad_() for x in (i, j)]  # the same numbers, so fp32's at first
        value = local_ncc(*pair, 5)
        results.append((value, *torch.autograd.grad(value, pair)))
    (truth, *grads), (value, *grads32) = results
    # Near 1000, fp32 has steps of 6e-5 beside a deviation of 0.3: 2e-4. Otherwise what sums of squares lose.
    tolerance = 1e-5 if level < 1000 else 1e-3
    torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=0)
    for g32, g in zip(grads32, grads, strict=True):
        assert (g32 - g).abs().max() <= 10 * tolerance * g.abs().max()


@pytest.mark.parametrize("shape", [(0, 2, 4, 5), (2, 0, 4, 5)])
def test_no_images_have_no_correlation_and_an_empty_gradient(shape):
    """NaN, as the means of torch's own losses."""
    empty = torch.zeros(shape, requires_grad=True)
    value = local_ncc(empty, torch.zeros(shape))
    value.backward()
    assert value.isnan() and empty.grad.shape == shape


def test_images_that_are_flat_everywhere():
    flat, image = torch.full((1, 1, 6, 6), 0.1).requires_grad_(), torch.rand(1, 1, 6, 6).requires_grad_()
    for pair in ((flat, image), (image, flat), (flat, flat)):
        value = local_ncc(*pair, 3)
        assert value == 0 or value.abs() < 1e-6
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, pair[:1]))


def test_is_blind_to_brightness_and_contrast():
    """1e-4 for fp32's digits beside the brightness that was added."""
    i, j = (random(1, 2, 12, 12, seed=s, dtype=torch.float32) for s in (1, 2))
    value = local_ncc(i, j, 5)
    torch.testing.assert_close(local_ncc(255 * i, 7 - 0.01 * j, 5), value, rtol=1e-4, atol=0)
    perfect = local_ncc(i, i, 5)
    assert 0.99 < perfect <= 1 and value < 0.3
    torch.testing.assert_close(LocalNCCLoss(5)(i, j), 1 - value)


def test_16_bits_and_autocast_are_computed_in_fp32():
    i, j = (random(1, 1, 12, 12, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    field = random(1, 2, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        values = local_ncc(i, j, 5), gradient_loss(field), bending_energy(field)
    wide = local_ncc(i.double(), j.double(), 5), gradient_loss(field.double()), bending_energy(field.double())
    for value, truth in zip(values, wide, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)


def saved_bytes(run):
    """What autograd keeps for the backward pass, each piece of memory once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_autograd_keeps_the_images_alone():
    pair = [torch.rand(1, 1, 10, 11, 12, requires_grad=True) for _ in range(2)]
    assert saved_bytes(lambda: local_ncc(*pair, 5)) == 2 * pair[0].nbytes
    field = torch.rand(1, 3, 10, 11, 12, requires_grad=True)
    assert saved_bytes(lambda: gradient_loss(field)) == field.nbytes
    assert saved_bytes(lambda: bending_energy(field)) < 3 * field.nbytes


def test_compiles_to_one_graph():
    def run(i, j, u):
        return LocalNCCLoss(3)(i, j) + GradientLoss("l1")(u) + BendingEnergy()(u)

    tensors = [random(1, c, 6, 5, seed=c, dtype=torch.float32).requires_grad_() for c in (1, 1, 2)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*tensors), tensors[::2]) for f in (compiled, run)]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)
    mapped = vmap(grad(lambda i, j: local_ncc(i, j, 3), (0, 1)))
    pairs = [random(2, 1, 1, 4, 5, seed=s) for s in (1, 2)]
    torch.testing.assert_close(torch.compile(mapped, fullgraph=True, backend="aot_eager")(*pairs), mapped(*pairs))


IMAGE = torch.zeros(1, 1, 4, 4)


@pytest.mark.parametrize(
    "call,error,says",
    [
        (lambda: gradient_loss(IMAGE, "l3"), ValueError, "penalty must be one of 'l1', 'l2'; got 'l3'"),
        (lambda: gradient_loss(IMAGE[0, 0]), ValueError, r"takes a displacement of shape .*got \(4, 4\)"),
        (lambda: bending_energy(IMAGE, (1, 1, 1)), ValueError, "spacing must be positive: one number, or 2"),
        (lambda: bending_energy(IMAGE, 0), ValueError, "spacing must be positive"),
        (lambda: bending_energy(IMAGE.long()), TypeError, "floating-point dtype"),
        (lambda: local_ncc(IMAGE, IMAGE[..., :3]), ValueError, "two images of the same shape"),
        (lambda: local_ncc(IMAGE, IMAGE, 4), ValueError, "window must be an odd number of voxels"),
        (lambda: local_ncc(IMAGE, IMAGE, (3, 3, 3)), ValueError, "or 2 of them"),
        (lambda: local_ncc(IMAGE, IMAGE, 3.0), ValueError, "one per axis; got 3.0"),
        (lambda: local_ncc(IMAGE, IMAGE, eps=0), ValueError, "eps must be positive"),
    ],
)
def test_what_does_not_fit(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_says_its_settings():
    assert repr(LocalNCCLoss()) == "LocalNCCLoss(window=9, eps=0.0001)"
    assert repr(GradientLoss("l1")) == "GradientLoss(penalty='l1', spacing=1.0)"
