"""The rows and columns that a walk visits hold every output pixel that touches its input pixel, and no others."""

import math

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from tri_stn.kernels import transforms
from tri_stn.kernels.coordinates import centred
from tri_stn.kernels.interpolation import touches

import tri_stn
from tri_stn.testing import Case, assert_accurate, warp_truth

INPUT_SIZE, SIZE = (7, 9), (8, 10)  # y before x


@triton.jit
def bounds_kernel(
    out_ptr, most_ptr, matrix_ptr, q_ptr, input_size, output_size, RADIUS: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """out (4 + 2 * ROWS, LANES): first and last row, first and last column of all, then of each row of the output."""
    lane = tl.arange(0, LANES)
    coefficients = ()
    for i in tl.static_range(6):
        coefficients = coefficients + (tl.load(matrix_ptr + i),)
    q = (tl.load(q_ptr + lane), tl.load(q_ptr + LANES + lane))
    lands, bounds, most_columns, upright = transforms.affine_bounds(coefficients, input_size, output_size, RADIUS)
    tl.store(most_ptr, most_columns)
    tl.store(most_ptr + 1, lands.to(tl.int32))
    tl.store(most_ptr + 2, upright.to(tl.int32))
    first, last = transforms.affine_box(bounds, q, output_size)
    for axis in tl.static_range(2):
        tl.store(out_ptr + (2 - 2 * axis) * LANES + lane, first[axis])
        tl.store(out_ptr + (3 - 2 * axis) * LANES + lane, last[axis])
    for row in range(ROWS):
        u = centred((lane * 0 + row,), output_size[1:], tl.float32)
        first_column, last_column = transforms.affine_columns(bounds, coefficients, u, q, output_size)
        tl.store(out_ptr + (4 + 2 * row) * LANES + lane, first_column)
        tl.store(out_ptr + (5 + 2 * row) * LANES + lane, last_column)


def turned(degrees, scale=1.0, shift=(0.0, 0.0)):
    c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return [[c, -s, shift[0]], [s, c, shift[1]]]


MAPS = {
    "identity": turned(0),
    "half a pixel": turned(0, shift=(0.5, 0.5)),
    "a little": turned(0.3, 1.02, (0.4, -1.6)),
    "turned by 30": turned(30),
    "turned by 45": turned(45, math.sqrt(2)),
    "turned by 90": turned(90),
    "upside down": turned(180, shift=(1.0, 0.0)),
    "flipped": [[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
    "shrunk": turned(0, 2.0),
    "magnified": turned(0, 0.5),
    "magnified much": turned(10, 0.05),
    "sheared": [[1.0, 0.9, 0.2], [0.0, 1.0, 0.1]],
    "anisotropic": [[0.1, 0.0, 0.3], [0.0, 3.0, -0.2]],
    "far away": turned(20, shift=(100.0, 0.0)),
    "nearly flat": [[1.0, 1.0, 0.0], [1.0, 1.0 + 1e-6, 0.0]],
    "flat": [[1.0, 0.7, 0.05], [0.0, 0.0, 0.3]],
    "a point": [[0.0, 0.0, 0.4], [0.0, 0.0, -0.6]],
    "not finite": [[math.inf, 0.0, 0.0], [0.0, 1.0, 0.0]],
    "not a number": [[1.0, 0.0, 0.0], [0.0, 1.0, math.nan]],
}


def bounds(matrix, radius):
    """First and last row and column of each input pixel's box, (4, pixels), first and last column of each row,
    (rows, pixels), and (the most columns, whether the map lands, whether it is upright).
    """
    y, x = torch.meshgrid(*(torch.arange(float(n)) for n in INPUT_SIZE), indexing="ij")
    q = torch.zeros(2, 64)
    q[:, : x.numel()] = torch.stack([x.flatten(), y.flatten()])
    out = torch.empty(4 + 2 * SIZE[0], 64, dtype=torch.int32, device=DEVICE)
    most = torch.empty(3, dtype=torch.int32, device=DEVICE)
    bounds_kernel[(1,)](
        out, most, matrix.to(DEVICE), q.to(DEVICE), INPUT_SIZE[::-1], SIZE[::-1], radius, SIZE[0], LANES=64
    )
    pixels = out[:, : x.numel()].cpu()
    return q[:, : x.numel()], pixels[:4], pixels[4::2], pixels[5::2], most.tolist()


@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("name", MAPS)
def test_bounds(name, radius):
    """Places in fp64 that are nearer than the radius lie within the bounds, and others do not, but for a rounding."""
    matrix = torch.tensor(MAPS[name])
    q, box, first, last, (most_columns, lands, upright) = bounds(matrix, radius)
    first_row, last_row, first_column, last_column = box
    columns = (last - first + 1).clamp(min=0)
    assert first.min() >= 0 and last.max() < SIZE[1] and first_row.min() >= 0 and last_row.max() < SIZE[0]
    assert lands == matrix.isfinite().all()
    if not lands:
        return
    assert most_columns == 0 or most_columns >= columns.max()
    if upright:
        assert most_columns == 0 or most_columns >= (last_column - first_column).max() + 1

    v, u = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in SIZE), indexing="ij")
    middle = torch.tensor([[(n - 1) / 2] for n in INPUT_SIZE[::-1]], dtype=torch.float64)
    x = matrix.double() @ torch.stack([u.flatten(), v.flatten(), torch.ones(u.numel(), dtype=torch.float64)]) + middle
    away = (x[:, None] - q.double()[:, :, None]).abs().amax(0).view(-1, *SIZE)  # (pixels of the input, *of the output)
    row = torch.arange(SIZE[0])
    in_rows = (row >= first_row[:, None]) & (row <= last_row[:, None])
    column = torch.arange(SIZE[1])
    in_columns = (column >= first.T[..., None]) & (column <= last.T[..., None])
    visited = in_rows[..., None] & in_columns
    in_box = (column >= first_column[:, None]) & (column <= last_column[:, None])
    assert bool((in_rows[..., None] & in_box[:, None])[away < radius - 1e-5].all()), "a box lacks a pixel that touches"
    assert bool(visited[away < radius - 1e-5].all()), "a pixel that touches would not be visited"
    assert not visited[away > radius + 1e-3].any(), "nor is one that cannot touch"


@pytest.mark.parametrize(
    "name,most",
    [("turned by 30", 3), ("a little", 2), ("identity", 0), ("flat", 0)],
)
def test_columns_of_ordinary_maps_are_known_beforehand(name, most):
    """Walks ask their pixels, which takes a barrier for each row, only where an interval is about as long as columns
    lie apart, or where there are many.
    """
    *_, (columns, _lands, _upright) = bounds(torch.tensor(MAPS[name]), 1)
    assert columns == most


@pytest.mark.parametrize(
    "name,expected",
    [("identity", 1), ("a little", 1), ("upside down", 1), ("turned by 30", 1), ("sheared", 0), ("flat", 0)],
)
def test_upright_maps_need_no_columns_for_each_row(name, expected):
    *_, (_columns, _lands, upright) = bounds(torch.tensor(MAPS[name]), 1)
    assert upright == expected


@triton.jit
def missed_kernel(
    out_ptr, matrix_ptr, q_ptr, near_ptr, input_size, output_size, TAPS: tl.constexpr, SPAN: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """out (2, LANES): how many of SPAN × SPAN output pixels from `near` on touch each pixel q, as the forward rounds,
    and how many of these a walk would not visit.
    """
    lane = tl.arange(0, LANES)
    coefficients = ()
    for i in tl.static_range(6):
        coefficients = coefficients + (tl.load(matrix_ptr + i),)
    q = (tl.load(q_ptr + lane), tl.load(q_ptr + LANES + lane))
    near = (tl.load(near_ptr + lane), tl.load(near_ptr + LANES + lane))
    _lands, bounds, most, upright = transforms.affine_bounds(coefficients, input_size, output_size, TAPS // 2)
    box_first, box_last = transforms.affine_box(bounds, q, output_size)
    touching = lane * 0
    missed = lane * 0
    for i in range(SPAN):
        row = near[1] + i
        u_row = centred((row,), output_size[1:], tl.float32)
        first, last = transforms.affine_columns(bounds, coefficients, u_row, q, output_size)
        first, last = tl.where(upright, box_first[0], first), tl.where(upright, box_last[0], last)
        last = tl.where(most > 0, tl.minimum(last, first + most - 1), last)
        for j in range(SPAN):
            column = near[0] + j
            x = transforms.affine(coefficients, centred((column, row), output_size, tl.float32), input_size)
            hit = touches(x[0], q[0], TAPS) & touches(x[1], q[1], TAPS)
            visited = (row >= box_first[1]) & (row <= box_last[1]) & (column >= first) & (column <= last)
            touching += hit.to(tl.int32)
            missed += (hit & ~visited).to(tl.int32)
    tl.store(out_ptr + lane, touching)
    tl.store(out_ptr + LANES + lane, missed)


@pytest.mark.parametrize("size", [(4097, 16384), (16384, 4097)])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("name", ["identity", "a little", "turned by 30", "turned by 45", "upside down", "sheared"])
def test_bounds_of_large_images_hold_all_that_the_forward_read(name, taps, size):
    """To the bit: coordinates of thousands round by more than a thousandth of a pixel."""
    matrix, lanes, span = torch.tensor(MAPS[name]), 4096, 4 + 2 * taps
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(size[::-1]).view(2, 1)  # x first, of the input and the output
    u = (torch.rand(2, lanes, generator=generator) * 1.1 - 0.55) * (sizes - 1)
    u[:, :8] = u[:, :8].sign() * (sizes - 1) / 2  # corners
    q = (matrix[:, :2].double() @ u.double() + matrix[:, 2:] + (sizes - 1) / 2).round()
    near = (u.round() + (sizes - 1) / 2 - span // 2).clamp(min=0).minimum(sizes - span).int()
    out = torch.empty(2, lanes, dtype=torch.int32, device=DEVICE)
    arguments = [t.to(DEVICE) for t in (matrix, q.float(), near)]
    missed_kernel[(1,)](out, *arguments, size[::-1], size[::-1], taps, span, LANES=lanes)
    touching, missed = out.cpu()
    assert touching.count_nonzero() > lanes // 4
    assert not missed.any()


@pytest.mark.parametrize("channels", [2, 9])
def test_many_maps_of_one_image(channels):
    """More than a program has lanes, of which few reach a tile, some none at all, and one is not a number."""
    case = Case(maps=36, channels=channels, input_size=(4, 8), size=(2, 3))
    image, theta, grad = case.tensors()
    theta = theta * 0.2
    theta[:, :, 0, 2] = torch.linspace(-3, 3, 36)
    reference = torch.autograd.grad(
        warp_truth(case, image.requires_grad_(), theta.requires_grad_()), (image, theta), grad
    )
    theta = torch.cat([theta.detach(), theta.detach()[:, :1] * torch.nan], 1).to(DEVICE).requires_grad_()
    image = image.detach().to(DEVICE).requires_grad_()
    grad = torch.cat([grad, grad[:, :1]], 1).to(DEVICE)
    grad_image, grad_theta = torch.autograd.grad(
        tri_stn.warp(image, tri_stn.Affine(theta), case.size), (image, theta), grad
    )
    assert_accurate(grad_image.cpu(), reference[0].double(), image_dtype=torch.float32, magnitude=20)
    assert_accurate(grad_theta[:, :36].cpu(), reference[1].double(), image_dtype=torch.float32, magnitude=100)
    assert not grad_theta[:, 36].any()  # a NaN would be one
