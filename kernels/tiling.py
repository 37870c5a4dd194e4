"""Block sizes and warps from shapes, in plain Python: every launch comes through here.

Tile blocks are x first. A block of 8 or 16 along x makes a warp cover a patch of the image: the
rotation is known on the device alone, and a patch is never bad, where a line would touch 32 rows
of the input under a quarter turn. Where the image is smaller than the block along an axis, the block
is as much longer along the others.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .division import divisor

_WARP = 32


_ENOUGH = 2**13
"""Programs of a launch, some 15 for each that a GPU of 132 multiprocessors holds at a time: the last ones to end do
not matter."""


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
    whole: bool = False
    """Whether blocks are known to hold nothing but channels of the image."""
    tiles: int = 1
    """How many tiles of an image a program takes, one after another: what it does once for all of them, dividing,
    loading a matrix, adding up over its lanes, takes as long as a small tile."""

    @property
    def is_crowded(self) -> bool:
        """Whether a walk with so many channels has no register left, where four of its programs are to fit."""
        return self.block_c * self.unroll > 32

    def grid(self, images: int, channels: int, size: Sequence[int]) -> tuple[int, int]:
        """Programs for so many images, channels and an image size (y before x, as in a shape)."""
        return images * self.programs(size), _quotient(channels, self.channels_per_program)

    def programs(self, size: Sequence[int]) -> int:
        return _quotient(self.count(size), self.tiles)

    def for_images(self, images: int, channels: int, size: Sequence[int]) -> "Tile":
        """The same with as many tiles for a program as leave programs enough, and few turns without a tile.

        One, where a program walks over blocks of channels: in a loop over tiles as well it holds so many numbers that
        a third fewer programs fit, and of many blocks what it does once is little. (Of few it is not, as in fp64.)
        """
        if self.channels_per_program > self.unroll * self.block_c:
            return self
        programs, count = math.prod(self.grid(images, channels, size)), self.count(size)
        even = (n for n in (8, 4, 2) if programs >= n * _ENOUGH and _quotient(count, n) * n <= 1.125 * count)
        return replace(self, tiles=next(even, 1))

    def count(self, size: Sequence[int]) -> int:
        """Tiles that cover an image."""
        return math.prod(_quotient(s, b) for s, b in zip(reversed(size), self.block, strict=True))

    def divisors(self, size: Sequence[int]) -> tuple[int, ...]:
        """The counts of tiles along the axes but the last, x first, as kernels divide by them."""
        return tuple(divisor(_quotient(s, b)) for s, b in zip(reversed(size[1:]), self.block, strict=False))

    def constants(self, far: bool = False) -> dict[str, Any]:
        """The tile as a launch takes it; `far`, 64-bit offsets, takes registers of its own."""
        # An AMD wavefront has 64 threads, twice NVIDIA's warp; its compiler takes no register cap.
        amd = torch.version.hip is not None
        return {
            "BLOCK": self.block,
            "BLOCK_C": self.block_c,
            "UNROLL": self.unroll,
            "CHANNELS_PER_PROGRAM": self.channels_per_program,
            "WHOLE": self.whole,
            "num_warps": max(1, self.num_warps // 2) if amd else self.num_warps,
            **({} if amd else {"maxnreg": 255 if far else self.max_registers}),
        }


_BLOCKS = {
    1: {1: (128,), 2: (64,), 4: (32,)},
    2: {1: (16, 8), 2: (8, 8), 4: (8, 4)},
    3: {1: (8, 4, 4), 2: (8, 4, 2), 4: (8, 2, 2)},
}
"""A program's pixels in a large image, by dimensions and threads for each pixel: 4 warps. (16, 16) would be 8, one
thread a pixel; bench/NOTES.md says why to try."""
_THREAD = 16
"""Bytes that a thread loads at once of channels beside each other."""
_SIDE_BY_SIDE = 4 * _THREAD
"""Bytes of a pixel's channels in one block, two sectors. Each thread computes its pixel's coordinates, so few share a
pixel, and they hold several such blocks. In NCHW no channels lie in one block: Triton would put a warp's threads on
them, or repeat the coordinates in every warp, as its version happens to break ties."""
_FEW = 4
"""Channels in channels_last that are taken one by one, as in NCHW: side by side, each thread would compute the
coordinates of four pixels. Their stores reach L2 in three or four parts, but in half the instructions."""
_LONGEST = 128


def gather_tile(
    size: Sequence[int],
    channels: int,
    channels_last: bool,
    dtype: torch.dtype,
    taps: int,
    tangent: bool = False,
    of_volumes: bool = False,
) -> Tile:
    """The tile of a program that owns output pixels and walks over channels; `size` is the output's, y before x.
    `tangent` is of derivatives, `of_volumes` of images with a depth, which a projection's output lacks.
    """
    channels_last = channels_last and channels > _FEW
    most = (64 if taps <= 2 else 8 if tangent else 32) if channels_last else (4 if taps <= 2 else 1)
    cap = 128 if not tangent else 255 if of_volumes else 168 if taps > 2 and channels_last else 128
    return _tile(size, channels, channels_last, dtype, taps, most, per_program=256 if channels_last else 64, cap=cap)


def scatter_tile(
    size: Sequence[int],
    channels: int,
    channels_last: bool,
    dtype: torch.dtype,
    taps: int,
    all_channels: bool,
    fixed: bool = False,
    tangent: bool = False,
) -> Tile:
    """The tile of a program that owns output pixels and their gradients; it holds more than a gather.

    `all_channels` gives each program all of them, where it is the one writer of its pixels' gradients;
    `fixed` is for sums in 64-bit integers.
    """
    channels_last = channels_last and channels > _FEW
    per_program = _power_of_two(channels) if all_channels else 64
    most = (32 if taps <= 2 else 8 if tangent else 16) if channels_last else (4 if taps <= 2 else 1)
    cap = 168 if taps <= 2 and len(size) <= 2 and not fixed else 255
    tile = _tile(size, channels, channels_last, dtype, taps, most, per_program, cap)
    # Without a mask of channels, sm_80's compiler moves a cubic sample's loads together and spills two of them.
    return replace(tile, whole=False) if taps > 2 else tile


def walk_tile(
    size: Sequence[int],
    channels: int,
    channels_last: bool,
    dtype: torch.dtype,
    taps: int,
    folds: bool,
    tangent: bool = False,
    several: bool = False,
    fill: bool = False,
) -> Tile:
    """The tile of a program that owns input pixels, of an input of this size, and one block of channels; `folds` as
    its padding does; with `several` maps of an image it holds their sums from one to the next, with a `fill` that too.
    """
    channels_last = channels_last and channels > _FEW
    most = 8 if not channels_last else 64 if taps <= 2 else 32
    more = several and channels > 4 and not channels_last
    steps = max(folds, (taps > 2 or len(size) > 2) + (tangent or more))
    tile = _tile(size, channels, channels_last, dtype, taps, most, per_program=0, cap=(128, 168, 255)[steps])
    if tile.is_crowded and (several or fill or not tile.whole):
        return replace(tile, max_registers=max(168, tile.max_registers))
    return tile


def _tile(
    size: Sequence[int],
    channels: int,
    channels_last: bool,
    dtype: torch.dtype,
    taps: int,
    most: int,
    per_program: int,
    cap: int,
) -> Tile:
    """At most so many channels held at once, and some more for each program, one after another."""
    # Rounded up to what makes a difference, so that few keys, and few compilations, serve all shapes.
    extent = tuple(min(_power_of_two(n), _LONGEST) for n in reversed(size))
    # fp64 takes two registers a number: a quarter of the channels, and half the programs at a time.
    double = dtype == torch.float64
    most = max(1, most // 4) if double else most
    block_c = min(_power_of_two(min(channels, most)), _SIDE_BY_SIDE // dtype.itemsize) if channels_last else 1
    blocks = _quotient(channels, block_c)
    unroll = _quotient(blocks, _quotient(blocks, max(1, most // block_c)))
    held = block_c * unroll
    threads = 1
    if block_c >= 8:
        # Triton knows of multiples of 16 alone, of others a thread loads one number at once; and cubic samples, with
        # 16 corners and more, have registers for fewer.
        threads = max(1, block_c * dtype.itemsize // _THREAD) if channels % 16 == 0 and taps <= 2 else 4
    block = _block(extent, threads)
    in_all = held if channels <= held else held * max(1, _quotient(per_program, held))
    num_warps = math.prod(block) * threads // _WARP
    return Tile(block, block_c, unroll, in_all, num_warps, 255 if double else cap, whole=channels % held == 0)


@functools.lru_cache(1024)
def _block(extent: tuple[int, ...], threads: int) -> tuple[int, ...]:
    return _fitted(_BLOCKS[len(extent)][threads], extent)


def _fitted(block: tuple[int, ...], extent: tuple[int, ...]) -> tuple[int, ...]:
    """A block of the same number of pixels that is no longer along an axis than the image, its size rounded up to a
    power of two; of fewer, but a warp's, where the whole image has fewer.
    """
    fitted = [min(b, e) for b, e in zip(block, extent, strict=True)]
    while math.prod(fitted) < math.prod(block):
        short = [axis for axis, pixels in enumerate(fitted) if pixels < extent[axis]]
        if not short:
            fitted[0] *= max(1, _WARP // math.prod(fitted))
            break
        fitted[min(short, key=lambda axis: fitted[axis] / block[axis])] *= 2
    return tuple(fitted)


def _power_of_two(n: int) -> int:
    """The least that is not below n; as `_quotient`, much quicker than Triton's own, which serve kernels as well."""
    return 1 << max(0, n - 1).bit_length()


def _quotient(n: int, d: int) -> int:
    """Rounded up."""
    return -(-n // d)


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
    return _quotient(tiles, _quotient(tiles, most))
