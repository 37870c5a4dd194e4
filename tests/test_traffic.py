"""The counts of `python -m bench traffic`, where they can be made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import compiled

from bench import traffic
from bench.__main__ import main
from bench.maps import Fields, Maps, Points
from bench.workloads import Workload

pytestmark = compiled
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


def _memory(row):
    """What a row says of memory, whatever kernel it is of."""
    return replace(row, kernel="", instructions=0)


def _threads(row):
    """How many read or wrote anything, of one that asked for it."""
    return row.threads_in_use * row.requests * 32


def test_the_walk_reads_a_sample_for_each_tap_inside_the_image():
    """Of the identity each pixel's samples lie within one of it: 3 x 3 candidates, of which 2 x 2 have it as a tap."""
    shifted = replace(PLAIN, transform=Maps((1, 1), shift=(0.3 / 32, 0.3 / 32)))
    found = [_rows(workload, (16, 8)) for workload in (PLAIN, shifted)]
    for rows in found:
        walk, gather = rows["walk", "grad_output"], rows["gather", "input"]
        assert _threads(walk) * 32 == pytest.approx((64 * 2 - 1) ** 2)
        assert walk.sectors == pytest.approx(gather.sectors)  # the neighbours to the left and above, instead
        assert rows["walk", "grad_input"].by_program == rows["walk", "grad_input"].floor
    plain, moved = (rows["walk", "input"].instructions for rows in found)
    assert plain > 1.3 * moved, "9 candidates for 4"


@pytest.mark.parametrize("size", [(48, 40), (6, 7, 20)])
def test_the_walk_visits_every_tap_that_the_gather_reads(size):
    """Its bounds lose nothing: turned and stretched, as many taps are found from both sides."""
    turned = replace(PLAIN, transform=Maps((0.8, 1.2), angle=(33, 33), shift=(-0.2, 0.2)), batch=2, seed=3)
    rows = _rows(replace(turned, size=size, input_size=size[:-1] + (33,)), None)
    walk, gather = rows["walk", "grad_output"], rows["gather", "input"]
    tiles = [math.prod(-(-n // b) for n, b in zip(s, (4, 4, 8) if len(size) == 3 else (8, 16), strict=True))
             for s in (size[:-1] + (33,), size)]  # fmt: skip
    assert _threads(walk) * tiles[0] == pytest.approx(_threads(gather) * tiles[1]) and _threads(walk) > 0


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
        assert _memory(dense["gather", tensor]) == _memory(gather["gather", tensor])
    assert _memory(dense["scatter", "input"]) == _memory(dense["gather", "input"])
    # As in the identity by hand: 2 sectors for the left corners of a warp's row in 4 tiles. Of the right ones, the last
    # lane's is left, the others being the left ones of the next lane; there is none in the last tile.
    added = dense["scatter", "grad_input"]
    rows_added = 2 * 32 + (2 * 32 - 1)
    assert added.sectors_per_request * added.requests * 32 == pytest.approx(rows_added * (4 * 2 + 3))
    assert ("walk", "grad_input") not in dense and ("scatter", "grad_input") not in gather


def test_a_scatter_without_the_inputs_gradient_adds_nothing():
    rows = _rows(replace(PLAIN, gradients=("theta",)), (16, 8))
    assert {tensor for kernel, tensor in rows if kernel == "scatter"} == {"grad_output", "input"}


def test_a_field_and_its_gradient_are_read_and_written_in_whole_rows():
    """In the memory of a network's output, one component after the other: of 16 x 2 pixels of a warp 4 sectors."""
    rows = _rows(replace(PLAIN, transform=Fields(1.0)), (16, 8))
    for kernel, tensor in (("gather", "parameters"), ("scatter", "parameters"), ("scatter", "gradients")):
        row = rows[kernel, tensor]
        assert (row.requests, row.sectors_per_request, row.by_request) == (2 * 4, 4, row.floor)


def test_the_command_prints_what_it_counted_and_refuses_the_rest(capsys):
    assert main(["traffic", "mnist_28-float32", "--programs", "8", "--tile", "16x8", "--tile", "32x4"]) == 0
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert "32x4" in printed
    assert main(["traffic", "volume_flow", "--tile", "16x8"]) == 2
    assert "of volumes" in capsys.readouterr().err
    assert main(["traffic", "no such workload"]) == 2
    with pytest.raises(SystemExit):
        main(["traffic", "mnist_28", "--tile", "16"])
