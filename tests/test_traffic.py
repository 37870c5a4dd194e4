"""The counts of `python -m bench traffic`, where they can be made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench import traffic
from bench.__main__ import main
from bench.maps import Maps, Points
from bench.workloads import Workload

# One channel: every number below is of one plane. All tiles are counted, so that means are exact.
PLAIN = Workload("plain", 1, 1, (64, 64), (64, 64), Maps((1, 1)), gradients=("input", "theta"))


def _rows(workload, block):
    return {(row.kernel, row.tensor): row for row in traffic.count(workload, block, programs=10**6)}


def test_the_identity_by_hand():
    rows = _rows(PLAIN, (16, 8))
    gather = rows["gather", "input"]
    # Four warps of 16 x 2 pixels, one request for each corner; 64 bytes a row are 2 sectors. The right corners lie one
    # number further, in 3 sectors a row; not in the last of 4 tiles along x, whose right column has no neighbour.
    # The lower corners have a row less in the lowest warp of the lowest of 8 tiles along y, of 32 in all.
    rows_read = 2 * 32 + (2 * 32 - 1)  # by the upper and the lower corners, in a column of warps
    sectors = rows_read * (4 * 2 + 3 * 3 + 2)
    assert gather.requests == 4 * 4
    assert gather.sectors_per_request * gather.requests * 32 == pytest.approx(sectors)
    # Distinct: 9 rows of 17 numbers, 68 bytes: 3 sectors, and in lines 1 or, from the line's middle, 2; without
    # the neighbours at the right and lower edges.
    tall = 7 * 9 + 8
    assert gather.sectors * 32 == pytest.approx(tall * (3 * 3 + 2))
    assert gather.lines * 32 == pytest.approx(tall * (1 + 2 + 1 + 1))
    output = rows["gather", "output"]
    assert (output.requests, output.sectors_per_request, output.sectors, output.lines) == (4, 4, 16, 8)
    assert output.by_program == output.by_request == output.floor == 64 * 64 * 4 / 2**20


def test_a_quarter_turn_by_hand():
    """A warp 16 wide and 2 high reads a patch 2 wide and 16 high; a line of 32 reads 32 rows."""
    turned = replace(PLAIN, transform=Maps((1, 1), angle=(90, 90)))
    for block, rows_per_warp in (((16, 8), 16), ((32, 4), 32), ((8, 16), 8)):
        found = _rows(turned, block)["gather", "input"].sectors_per_request
        # A patch 32 / rows wide starts at any of the 8 numbers of a sector for the right corners: sometimes two.
        assert rows_per_warp * 0.95 < found < rows_per_warp * 1.3, block


def test_half_the_size_by_hand():
    """Each output pixel lies between four input pixels: a warp's 16 x 2 read 32 numbers from each of 2 rows."""
    shrunk = replace(PLAIN, input_size=(128, 128))
    gather = _rows(shrunk, (16, 8))["gather", "input"]
    assert (gather.sectors_per_request, gather.sectors, gather.lines) == (2 * 4, 16 * 4, 16)
    assert gather.by_program == gather.floor == 128 * 128 * 4 / 2**20
    assert gather.by_request == 2 * gather.floor  # left and right corners lie in the same sectors
    half = _rows(replace(shrunk, dtype="bfloat16"), (16, 8))["gather", "input"]
    assert (half.sectors_per_request, half.sectors, half.lines) == (2 * 2, 16 * 2, 16)


def test_the_walk_visits_three_by_three_candidates_of_the_identity():
    """Each pixel's samples lie within one of it: 3 x 3, of which 2 x 2 have it as a tap."""
    walk = _rows(PLAIN, (16, 8))["walk", "grad_output"]
    gather = _rows(PLAIN, (16, 8))["gather", "input"]
    assert walk.sectors == pytest.approx(gather.sectors)  # the neighbours to the left and above, instead
    shifted = replace(PLAIN, transform=Maps((1, 1), shift=(0.3 / 32, 0.3 / 32)))
    theta = shifted.transform.draw(1, shifted.size, 0).double().numpy()
    tile = traffic._sample(traffic._shaped(_tile(), (16, 8)), (64, 64), 1, 10**6, 0)
    _, (x, y), mask = tile
    for workload, candidates in ((PLAIN, 9), (shifted, 4)):
        numbers = workload.transform.draw(1, workload.size, 0).double().numpy() if workload is PLAIN else theta
        steps = traffic._candidates(workload, numbers, x, y, mask)
        assert len(steps) == candidates
        assert sum(hit.sum() for _, hit in steps) == (64 * 2 - 1) ** 2  # every sample's taps inside the image


def test_the_walk_visits_every_tap_that_the_gather_reads():
    """Its bounds, as the kernel's, lose nothing: turned and stretched, as many taps are found from both sides."""
    workload = replace(PLAIN, transform=Maps((0.8, 1.2), angle=(33, 33), shift=(-0.2, 0.2)), input_size=(48, 40))
    theta = workload.transform.draw(1, workload.size, 3).double().numpy()
    _, (x, y), mask = traffic._sample(_tile(), workload.input_size, 1, 10**6, 0)
    hits = sum(hit.sum() for _, hit in traffic._candidates(workload, theta, x, y, mask))
    _, (x, y), mask = traffic._sample(_tile(), workload.size, 1, 10**6, 0)
    at = [a[mask] for a in traffic._look(workload, theta, x, y)]
    taps = 0
    for dx in (0, 1):
        for dy in (0, 1):
            tx, ty = at[0] // 1 + dx, at[1] // 1 + dy
            taps += ((tx >= 0) & (tx < 40) & (ty >= 0) & (ty < 48)).sum()
    assert hits == taps > 0


def test_channels_last_by_hand():
    """32 fp32 channels are a line: 8 threads of 16 bytes each, 4 pixels and 16 sectors in a request."""
    workload = replace(PLAIN, channels=32, layout="channels_last", input_size=(128, 128))
    rows = _rows(workload, (8, 4))
    gather = rows["gather", "input"]
    assert (gather.requests, gather.sectors_per_request) == (4 * 32 // 4, 4 * 4)
    assert (gather.sectors, gather.lines) == (16 * 8 * 4, 16 * 8)
    assert gather.by_program == gather.floor


class Shifted(Points):
    """Explicit points: the pixels themselves, a quarter of a pixel to the right and down."""

    def draw(self, count, size, seed):
        theta = torch.tensor([[1, 0, 0.5 / size[1]], [0, 1, 0.5 / size[0]]])
        return F.affine_grid(theta.expand(count, 2, 3), [count, 1, *size], align_corners=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scatter_adds_where_the_gather_reads_in_fp32(dtype):
    affine = replace(PLAIN, transform=Maps((1, 1), shift=(0.5 / 64, 0.5 / 64)), dtype=dtype)
    gather = _rows(affine, (16, 8))
    dense = _rows(replace(affine, transform=Shifted()), (16, 8))
    for tensor in ("input", "output"):
        assert dense["gather", tensor] == gather["gather", tensor]
    assert replace(dense["scatter", "input"], kernel="gather") == dense["gather", "input"]
    # As in the identity by hand: 2 sectors for the left corners of a warp's row in 4 tiles. Of the right ones, the last
    # lane's is left, the others being the left ones of the next lane; there is none in the last tile.
    added = dense["scatter", "grad_input"]
    rows_added = 2 * 32 + (2 * 32 - 1)
    assert added.sectors_per_request * added.requests * 32 == pytest.approx(rows_added * (4 * 2 + 3))
    assert ("walk", "grad_input") not in dense and ("scatter", "grad_input") not in gather


def test_a_scatter_without_the_inputs_gradient_adds_nothing():
    rows = _rows(replace(PLAIN, gradients=("theta",)), (16, 8))
    assert {tensor for kernel, tensor in rows if kernel == "scatter"} == {"grad_output", "input"}


def test_the_command_prints_what_it_counted_and_refuses_the_rest(capsys):
    assert main(["traffic", "mnist_28-float32", "--programs", "8", "--tile", "16x8", "--tile", "32x4"]) == 0
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert "32x4" in printed
    assert main(["traffic", "volume_flow"]) == 2
    assert "2-D" in capsys.readouterr().err
    assert main(["traffic", "no such workload"]) == 2
    with pytest.raises(SystemExit):
        main(["traffic", "mnist_28", "--tile", "16"])
    magnified = replace(PLAIN, transform=Maps((0.005, 0.005)), size=(400, 400))
    with pytest.raises(ValueError, match="lanes share pixels"):
        _rows(magnified, (16, 8))


def _tile():
    from tri_stn.kernels import tiling

    return tiling.Tile((16, 8), 1, 1, 1, 4, 128)
