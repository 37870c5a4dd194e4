"""Block sizes and warps from shapes, in plain Python.

Tile blocks are x first. A block of 8 or 16 along x makes a warp cover a patch of the image: the
rotation is known on the device alone, and a patch is never bad, where a line would touch 32 rows
of the input under a quarter turn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton import cdiv, next_power_of_2


@dataclass(frozen=True)
class Tile:
    block: tuple[int, ...]
    """Pixels along each axis, x first; powers of two."""
    block_c: int
    """Channels beside each other in a block; a power of two."""
    unroll: int
    """Blocks of channels held in registers at once."""
    channels_per_program: int
    num_warps: int
    max_registers: int
    """Per thread, on NVIDIA: left to itself, ptxas spills a few to reach the next step of occupancy."""

    def grid(self, images: int, channels: int, size: Sequence[int]) -> tuple[int, int]:
        """Programs for so many images, channels and an image size (y before x, as in a shape)."""
        return images * self.count(size), cdiv(channels, self.channels_per_program)

    def count(self, size: Sequence[int]) -> int:
        """Tiles that cover an image."""
        return math.prod(cdiv(s, b) for s, b in zip(reversed(size), self.block, strict=True))

    def constants(self, far: bool = False) -> dict[str, Any]:
        """The tile as a launch takes it; `far`, 64-bit offsets, takes registers of its own."""
        # An AMD wavefront has 64 threads, twice NVIDIA's warp; its compiler takes no register cap.
        amd = torch.version.hip is not None
        return {
            "BLOCK": self.block,
            "BLOCK_C": self.block_c,
            "UNROLL": self.unroll,
            "CHANNELS_PER_PROGRAM": self.channels_per_program,
            "num_warps": max(1, self.num_warps // 2) if amd else self.num_warps,
            **({} if amd else {"maxnreg": 255 if far else self.max_registers}),
        }


_BLOCKS = {1: {32: (32,), 128: (128,)}, 2: {32: (8, 4), 128: (16, 8)}, 3: {32: (8, 2, 2), 128: (8, 4, 4)}}


def gather_tile(
    dims: int, channels: int, channels_last: bool, dtype: torch.dtype, taps: int, tangent: bool = False
) -> Tile:
    """The tile of a program that owns output pixels and walks over channels."""
    layout = dims, channels, channels_last, dtype
    cap = 255 if tangent and dims == 3 else 128
    if channels_last:
        return _tile(*layout, most=64 if taps <= 2 else 32, per_program=256, cap=cap)
    return _tile(*layout, most=4 if taps <= 2 else 1, per_program=64, cap=cap)


def scatter_tile(
    dims: int, channels: int, channels_last: bool, dtype: torch.dtype, taps: int, whole: bool, fixed: bool = False
) -> Tile:
    """The tile of a program that owns output pixels and their gradients; it holds more than a gather.

    `whole` gives each program all channels, where it is the one writer of its pixels' gradients;
    `fixed` is for sums in 64-bit integers.
    """
    layout = dims, channels, channels_last, dtype
    per_program = next_power_of_2(channels) if whole else 64
    most = (32 if taps <= 2 else 16) if channels_last else (4 if taps <= 2 else 1)
    return _tile(*layout, most, per_program, cap=168 if taps <= 2 and dims <= 2 and not fixed else 255)


def walk_tile(
    dims: int, channels: int, channels_last: bool, dtype: torch.dtype, taps: int, folds: bool, tangent: bool = False
) -> Tile:
    """The tile of a program that owns input pixels and one block of channels; `folds` as its padding does."""
    # A walk holds four blocks at once; wider ones cost occupancy before they save coordinates.
    most = 32 if channels_last else 8
    steps = max(folds, (taps > 2 or dims > 2) + tangent)
    return _tile(dims, channels, channels_last, dtype, most, per_program=0, cap=(128, 168, 255)[steps])


def _tile(
    dims: int, channels: int, channels_last: bool, dtype: torch.dtype, most: int, per_program: int, cap: int
) -> Tile:
    # fp64 takes two registers a number: a quarter of the channels, and half the programs at a time.
    double = dtype == torch.float64
    held = min(next_power_of_2(channels), max(1, most // 4) if double else most)
    # Channels that lie apart are separate blocks: in one block, Triton would put a warp's threads on
    # them, or repeat the coordinates in every warp, as its version happens to break ties.
    block_c, unroll = (held, 1) if channels_last else (1, held)
    block = _BLOCKS[dims][32 if block_c >= 8 else 128]
    return Tile(block, block_c, unroll, max(held, per_program), num_warps=4, max_registers=255 if double else cap)


_MOST_PARTIALS = 2**18
"""Numbers in the partial sums of all maps together: a mebibyte in fp32, two in fp64."""


def shared_slots(programs: int, numbers: int) -> int:
    """How many slots of partial sums the programs of a map share, where all maps together have so many numbers: one
    for each, as long as the partial sums allow.
    """
    return max(1, min(programs, _MOST_PARTIALS // max(1, numbers)))


def programs(tiles: int, numbers: int) -> int:
    """How many programs take the tiles of a map, where each has a slot of its own, and one program of each map so
    many numbers in all: one for each tile, as long as the partial sums allow; else so few that all take as many.
    """
    most = max(1, _MOST_PARTIALS // max(1, numbers))
    return cdiv(tiles, cdiv(tiles, most))
