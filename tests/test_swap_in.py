"""What code written for `F.grid_sample` relies on: ties, coordinates that are nowhere, memory orders, errors.

Random tests keep away from ties; here samples lie exactly on pixels, half pixels, borders and
corners. The sizes are such that those places are exact in floating point, in torch and here, so that
the convention alone decides.
"""

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from test_warp import MODES, OPTIONS, PADDING_MODES
from torch import Tensor

import tri_stn

GRID_SAMPLES = (tri_stn.grid_sample, F.grid_sample)


def pixels_to_grid(x: Tensor, size: int, align_corners: bool) -> Tensor:
    """Pixel coordinates → normalised ones; exact for halves of pixels if size, or size - 1, is a power of two."""
    return 2 * x / (size - 1) - 1 if align_corners else (2 * x + 1) / size - 1


def random(*shape: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 2 - 1).to(device, dtype)


def assert_same_as_torch(input: Tensor, grid: Tensor, grad: Tensor | None = None, **options: object) -> None:
    """Output and both gradients; a gradient of the output that is given keeps its strides."""
    input, grid = input.detach().requires_grad_(), grid.detach().requires_grad_()
    results = []
    for grid_sample in GRID_SAMPLES:
        output = grid_sample(input, grid, **options)
        if grad is None:
            grad = random(*output.shape, device=output.device, seed=9, dtype=output.dtype)
        results.append((output, *torch.autograd.grad(output, (input, grid), grad)))
    for what, got, want in zip(("output", "grad_input", "grad_grid"), *results, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, what=what: f"{what}: {text}")


# --- ties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_ties_on_pixels_borders_and_corners(backend, options):
    """Every half pixel from far left of the image to far right, in rows inside, on and beyond its edges."""
    height, width = (5, 9) if options["align_corners"] else (4, 8)
    x = torch.arange(-2.5 * 2, (width + 2) * 2) / 2
    y = torch.tensor([-1, -0.5, 0, 0.5, 2, height - 1, height - 0.5, height])
    columns = pixels_to_grid(x, width, options["align_corners"])
    rows = pixels_to_grid(y, height, options["align_corners"])
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None].to(backend)
    assert {-1.0, 1.0} <= set(columns.tolist()) and {-1.0, 1.0} <= set(rows.tolist())
    assert_same_as_torch(random(1, 2, height, width, device=backend), grid, **options)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "bicubic" not in o.id])
def test_ties_in_volumes(backend, options):
    size = (3, 5, 9) if options["align_corners"] else (2, 4, 8)
    generator = torch.Generator().manual_seed(1)
    axes = [
        pixels_to_grid(torch.randint(-4, 2 * n + 4, (60,), generator=generator) / 2, n, options["align_corners"])
        for n in reversed(size)
    ]
    grid = torch.stack(axes, -1).view(1, 3, 4, 5, 3).to(backend)
    assert_same_as_torch(random(1, 1, *size, device=backend), grid, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [o for o in OPTIONS if "nearest" not in o.id])
def test_edges_of_five_pixels(backend, options, dtype):
    """±0.8 is a pixel's centre on paper; how (x + 1) * 5 - 1 rounds decides which neighbour it has."""
    edges = torch.tensor([-1, -0.8, 0.8, 1], dtype=dtype, device=backend)
    grid = torch.stack(torch.meshgrid(edges, edges, indexing="xy"), -1)[None]
    assert_same_as_torch(random(1, 1, 5, 5, device=backend, dtype=dtype), grid, **options)


@pytest.mark.parametrize("align_corners", [False, True])
def test_identity_grids_have_torchs_slopes(backend, align_corners):
    """From F.affine_grid: every sample is on a pixel, or a rounding beside it, and torch's rounding picks the slope."""
    for pixels in (3, 7, 10, 11):
        theta = torch.eye(2, 3, device=backend)[None]
        grid = F.affine_grid(theta, [1, 1, 3, pixels], align_corners=align_corners)
        assert_same_as_torch(random(1, 1, 3, pixels, device=backend), grid, align_corners=align_corners)


def test_nearest_rounds_half_to_even(backend):
    """As torch since 1.3 on every device: 0.5 reads pixel 0, 1.5 and 2.5 read pixel 2; 3.5 lies outside of 0 … 3."""
    image = torch.arange(1.0, 5.0, device=backend).expand(1, 1, 1, 4)
    x = pixels_to_grid(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5], device=backend), 4, align_corners=False)
    grid = torch.stack([x, torch.zeros_like(x)], -1)[None, None]
    for padding_mode, expected in (("zeros", [0, 1, 1, 3, 3, 0, 0]), ("border", [1, 1, 1, 3, 3, 4, 4])):
        output = tri_stn.grid_sample(image, grid, "nearest", padding_mode, align_corners=False)
        assert output.flatten().tolist() == expected


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_corners_of_the_grid_are_the_corners_of_the_image(backend, align_corners):
    """(-1, -1) … (1, 1): centres of the corner pixels, or their outer corners, where a quarter is left."""
    image = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]]], device=backend)
    grid = torch.tensor([[[[-1.0, -1.0], [1.0, -1.0]], [[-1.0, 1.0], [1.0, 1.0]]]], device=backend)
    corners = torch.tensor([[[[1.0, 4.0], [8.0, 32.0]]]], device=backend)
    output = tri_stn.grid_sample(image, grid, align_corners=align_corners)
    assert torch.equal(output, corners if align_corners else corners / 4)


# --- coordinates that are nowhere --------------------------------------------------------------------

NOWHERE = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**62, -(2.0**62)]


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("mode", MODES)
def test_coordinates_that_are_nowhere(backend, mode, padding_mode, axes):
    """As torch's CUDA kernels: out of bounds, so 0 under zeros; else a pixel of the image. All around it is NaN."""
    surrounded = torch.full((1, 1, 9, 10), float("nan"), device=backend)
    surrounded[..., 2:-2, 2:-2] = random(1, 1, 5, 6, device=backend) + 2
    image = surrounded[..., 2:-2, 2:-2].requires_grad_()
    grid = torch.zeros(1, 1, len(NOWHERE), 2, device=backend)
    grid[..., axes] = torch.tensor(NOWHERE, device=backend)[:, None]
    grid.requires_grad_()
    output = tri_stn.grid_sample(image, grid, mode, padding_mode, align_corners=False)
    grad_image, grad_grid = torch.autograd.grad(output.sum(), (image, grid))
    if padding_mode == "zeros":
        assert (output == 0).all() and (grad_image == 0).all() and (grad_grid == 0).all()
        return
    assert output.isfinite().all() and grad_image.isfinite().all() and grad_grid.isfinite().all()
    torch.testing.assert_close(grad_image.sum(), torch.tensor(float(len(NOWHERE)), device=backend))
    if mode != "bicubic":
        assert output.min() >= image.min() and output.max() <= image.max()
    if padding_mode == "border":  # NaN reads pixel 0
        assert grad_grid[..., axes].abs().max() <= (1e-6 if mode == "bicubic" else 0)  # there, slopes that cancel
        clamped = grid.detach().nan_to_num(nan=-2.0).clamp(-2, 2)
        torch.testing.assert_close(output, F.grid_sample(image, clamped, mode, padding_mode, False))


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_coordinates_that_are_nowhere_in_volumes(backend, mode, padding_mode):
    volume = (random(1, 1, 2, 3, 4, device=backend) + 2).requires_grad_()
    grid = torch.zeros(1, 1, 1, len(NOWHERE), 3, device=backend)
    grid[..., 2] = torch.tensor(NOWHERE, device=backend)
    grid.requires_grad_()
    output = tri_stn.grid_sample(volume, grid, mode, padding_mode, align_corners=True)
    results = output, *torch.autograd.grad(output.sum(), (volume, grid))
    assert all((r == 0).all() if padding_mode == "zeros" else r.isfinite().all() for r in results)


# --- memory orders -----------------------------------------------------------------------------------


def reordered(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers with other strides: as if it had been made with its dimensions in this order."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=lambda o: "".join(map(str, o)))
def test_any_order_of_dimensions_in_memory(backend, order):
    """Input, grid and the gradient of the output, each in an order of its own."""
    input, grid = random(2, 2, 4, 3, device=backend), random(2, 2, 5, 2, device=backend, seed=1)
    grad = random(2, 2, 2, 5, device=backend, seed=2)
    input, grid, grad = reordered(input, order), reordered(grid, order[::-1]), reordered(grad, order[1:] + order[:1])
    assert_same_as_torch(input, grid, grad, align_corners=False)


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (1, 0, 4, 2, 3), (0, 2, 3, 4, 1)], ids=str)
def test_any_order_of_a_volumes_dimensions_in_memory(backend, order):
    input, grid = random(2, 2, 3, 4, 3, device=backend), random(2, 1, 2, 3, 3, device=backend, seed=1)
    grad = random(2, 2, 1, 2, 3, device=backend, seed=2)
    input, grid, grad = (reordered(t, order) for t in (input, grid, grad))
    assert_same_as_torch(input, grid, grad, align_corners=False)


@pytest.mark.parametrize("along", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("which", ["input", "grid", "grad_output"])
def test_expanded_tensors(backend, which, along):
    """Strides of zero: as many reads of one number. The gradients are those of tensors with numbers of their own."""
    tensors = {
        "input": random(2, 2, 4, 3, device=backend),
        "grid": random(2, 2, 5, 2, device=backend, seed=1),
        "grad_output": random(2, 2, 2, 5, device=backend, seed=2),
    }
    shape = tensors[which].shape
    one = tuple(slice(0, 1) if d in along else slice(None) for d in range(4))
    tensors[which] = tensors[which][one].expand(shape)
    assert_same_as_torch(*tensors.values(), align_corners=False)


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", ["input", "grid"])
def test_one_gradient_alone(backend, mode, wanted):
    """The same as with both; the other tensor gets none."""
    tensors = {"input": random(1, 2, 4, 3, device=backend), "grid": random(1, 2, 5, 2, device=backend, seed=1)}
    tensors[wanted].requires_grad_()
    grads = []
    for grid_sample in GRID_SAMPLES:
        output = grid_sample(**tensors, mode=mode, align_corners=False)
        output.backward(random(*output.shape, device=backend, seed=2))
        grads.append(tensors[wanted].grad)
        tensors[wanted].grad = None
    torch.testing.assert_close(*grads)
    assert [name for name, tensor in tensors.items() if tensor.requires_grad] == [wanted]
    assert all(tensor.grad is None for tensor in tensors.values())


@pytest.mark.parametrize("wanted", [("grid",), ("input", "grid")], ids="+".join)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_nearest_has_a_grid_gradient_of_zeros(backend, padding_mode, wanted):
    tensors = {"input": random(1, 2, 4, 3, device=backend), "grid": random(1, 2, 5, 2, device=backend, seed=1)}
    for name in wanted:
        tensors[name].requires_grad_()
    tri_stn.grid_sample(**tensors, mode="nearest", padding_mode=padding_mode, align_corners=False).sum().backward()
    assert torch.equal(tensors["grid"].grad, torch.zeros_like(tensors["grid"]))


@pytest.mark.parametrize(
    "input_shape,grid_shape",
    [
        ((0, 2, 4, 3), (0, 2, 5, 2)),
        ((2, 0, 4, 3), (2, 2, 5, 2)),
        ((2, 2, 4, 3), (2, 0, 5, 2)),
        ((2, 2, 4, 3), (2, 2, 0, 2)),
        ((2, 0, 3, 4, 3), (2, 1, 2, 5, 3)),
        ((2, 2, 3, 4, 3), (2, 1, 0, 5, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_nothing_to_do(backend, mode, input_shape, grid_shape):
    """No image, no channel or no output pixel: an empty output, and gradients of zeros."""
    input, grid = random(*input_shape, device=backend), random(*grid_shape, device=backend)
    assert_same_as_torch(input, grid, mode=mode, align_corners=False)


# --- errors ------------------------------------------------------------------------------------------

IMAGE, GRID = torch.rand(2, 1, 3, 4), torch.rand(2, 5, 6, 2)


@pytest.mark.parametrize(
    "input,grid,says",
    [
        (IMAGE, GRID[:1].repeat(3, 1, 1, 1), "expected grid and input to have same batch size"),
        (IMAGE, torch.rand(2, 5, 6, 3), "expected grid to have size 2 in last dimension"),
        (IMAGE, torch.rand(2, 4, 5, 6, 3), "expected grid to have size 2 in last dimension"),
        (torch.rand(2, 1, 3, 4, 5), GRID, "expected grid to have size 3 in last dimension"),
        (IMAGE.squeeze(1), GRID, "expected grid to have size 1 in last dimension"),
        (IMAGE, torch.tensor(1.0), "expected grid to have size 2 in last dimension"),
        (torch.rand(1, 1, 2, 2, 2, 2), torch.rand(1, 1, 1, 1, 1, 4), "input and grid with same number of dimensions"),
        (IMAGE[:, :, :0], GRID, "expected input to have non-empty spatial dimensions"),
        (IMAGE, GRID.to("meta"), None),
    ],
)
def test_what_does_not_fit_is_torchs_error_and_ours(input, grid, says):
    """A RuntimeError in torch, a ValueError in this package: one that is both, with torch's phrase in it."""
    if says is not None and grid.dim():
        with pytest.raises(RuntimeError, match=says):
            F.grid_sample(input, grid, align_corners=False)
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match=says or "Expected all tensors to be on the same device; got .* cpu .* meta"):
            tri_stn.grid_sample(input, grid, align_corners=False)


def test_checks_do_not_pin_sizes_under_compile():
    """One graph for all sizes: a message made before it is needed would make each of them a constant."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(tri_stn.grid_sample, fullgraph=True, dynamic=True, backend=counter)
    for n, height, width in ((5, 7, 8), (6, 5, 9), (9, 8, 7)):  # unlike each other: equal sizes share a symbol
        input, grid = random(n, 3, height, width, device="cpu"), random(n, width + 4, height + 4, 2, device="cpu")
        expected = F.grid_sample(input, grid, align_corners=False)
        torch.testing.assert_close(compiled(input, grid, align_corners=False), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("argument", ["mode", "padding_mode"])
@pytest.mark.parametrize("grid_sample", GRID_SAMPLES, ids=["tri_stn", "torch"])
def test_unknown_options(grid_sample, argument):
    with pytest.raises(ValueError, match="but got: 'garbage'"):
        grid_sample(IMAGE, GRID, align_corners=False, **{argument: "garbage"})


@pytest.mark.parametrize("align_corners", [1, "yes"])
@pytest.mark.parametrize("grid_sample", GRID_SAMPLES, ids=["tri_stn", "torch"])
def test_align_corners_is_a_bool(grid_sample, align_corners):
    with pytest.raises(TypeError, match="align_corners"):
        grid_sample(IMAGE, GRID, align_corners=align_corners)


@pytest.mark.parametrize("grid_sample", GRID_SAMPLES, ids=["tri_stn", "torch"])
def test_things_that_are_no_tensors(grid_sample):
    for arguments in ((IMAGE.tolist(), GRID), (IMAGE, GRID.tolist())):
        with pytest.raises(TypeError, match="Tensor"):
            grid_sample(*arguments, align_corners=False)
