"""What warps and programs touch: 32-byte sectors and 128-byte lines of a workload, counted and never timed.

    python -m bench traffic rotate_1k --tile 16x8 --tile 32x4

For a sample of programs, the kernels' own loops are replayed in numpy, without values: which addresses a warp asks
for in one instruction, and which distinct sectors and lines a program touches in all. The gather; and for the
gradients the walk, or, where the map is none that walks or the input has no gradient, the scatter.

    by request  every warp's sectors: what goes through L1; four corners mostly ask for the same ones again
    by program  a program's distinct sectors: what comes from L2 if L1 keeps what the program touched
    floor       the distinct bytes of the whole tensor: what comes from memory at least

The scatter's atomics go past L1: of grad_input, *by request* is what comes to L2. They add in fp32 at least.

A model, in three respects. A warp is 32 neighbouring lanes of the tile, x before y; in channels_last, threads lie
along channels first, each with 16 bytes if the channels are a multiple of that, else with one number. Planes of
an NCHW image start at multiples of 128 bytes. And no program keeps anything for another. The walk is counted where each
lane owns one pixel; a map that magnifies so much that lanes share one is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from tri_stn.kernels.tiling import Tile

    from .workloads import Workload

SECTOR, LINE, WARP, VECTOR = 32, 128, 32, 16
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Image:
    """How an image lies in memory, and how a tile of a kernel reads or writes it."""

    channels: int
    size: tuple[int, int]
    itemsize: int
    channels_last: bool
    block_c: int
    """Channels side by side in one access."""
    per_program: int
    """Channels of a program."""

    def requests(self, pixels: Ints, mask: Ints) -> tuple[float, float, float]:
        """Of a program, the mean over those given: warps' requests, their sectors, the share of their lanes in use.

        `pixels` and `mask` are (programs, accesses, lanes): y * width + x, and whether the lane takes part.
        """
        address, threads = pixels[..., None] * self.itemsize, 1
        if self.channels_last:
            held = min(self.block_c, self.channels)
            vector = VECTOR if self.channels * self.itemsize % VECTOR == 0 else self.itemsize
            threads = max(1, held * self.itemsize // vector)
            address = address * self.channels + np.arange(threads) * vector
            times = self.per_program / held
        else:
            times = self.per_program
        shape = (*pixels.shape[:2], -1, WARP)
        sectors = np.broadcast_to(address // SECTOR, (*pixels.shape, threads)).reshape(shape)
        taken = np.broadcast_to(mask[..., None], (*pixels.shape, threads)).reshape(shape)
        found = _distinct(np.where(taken, sectors, -1))
        asked = found > 0
        count = len(pixels)
        lanes = taken.sum() / max(1, asked.sum() * WARP)
        return times * asked.sum() / count, times * found.sum() / count, lanes

    def distinct(self, pixels: Ints, mask: Ints, unit: int) -> float:
        """A program's distinct sectors or lines, the mean over those given."""
        count = 0
        for program, taken in zip(pixels, mask, strict=True):
            places = np.unique(program[taken]) * self.itemsize
            if self.channels_last:
                first = places * self.channels
                last = first + self.per_program * self.itemsize - 1
                reach = np.arange((last // unit - first // unit).max(initial=0) + 1)
                units = first[:, None] // unit + reach
                count += len(np.unique(units[units <= (last // unit)[:, None]]))
            else:
                count += len(np.unique(places // unit)) * self.per_program
        return count / len(pixels)


@dataclass(frozen=True)
class Traffic:
    """A tensor's share in a kernel's work, all per program but the last three: MiB of the whole workload."""

    kernel: str
    tile: str
    tensor: str
    requests: float
    sectors_per_request: float
    lanes_in_use: float
    """Of the warps that ask for anything."""
    sectors: float
    lines: float
    by_request: float
    by_program: float
    floor: float


HEADERS = (
    "kernel", "tile", "tensor", "requests", "sectors/request", "lanes used", "sectors", "lines",
    "MiB by request", "MiB by program", "MiB floor", "program/floor",
)  # fmt: skip


def cells(row: Traffic) -> tuple[object, ...]:
    """A row as the table shows it, under HEADERS."""
    names, numbers = astuple(row)[:3], astuple(row)[3:]
    requests, per_request, lanes, *rest = numbers
    return (*names, f"{requests:.0f}", f"{per_request:.2f}", f"{lanes:.0%}", *(f"{n:.0f}" for n in rest[:2]),
            *(f"{n:.1f}" for n in rest[2:]), f"{row.by_program / row.floor:.2f}")  # fmt: skip


def unavailable(workload: Workload) -> str:
    """Why the workload cannot be counted; empty if it can."""
    w = workload
    if len(w.size) != 2 or w.mode != "bilinear" or w.padding_mode != "zeros":
        return f"{w}: traffic is counted in 2-D, bilinear, with zeros padding."
    return ""


def count(
    workload: Workload, block: tuple[int, int] | None = None, programs: int = 256, seed: int = 0
) -> list[Traffic]:
    """The traffic of the gather and of the walk or the scatter, for a tile (width, height) or those that the kernels
    would take; of so many programs, drawn at random over maps and tiles.
    """
    from tri_stn.kernels import tiling

    w = workload
    layout = w.channels, w.layout == "channels_last", getattr(torch, w.dtype)
    theta = w.transform.draw(w.batch * w.maps, w.size, w.seed).double().numpy()
    rows = _gather(w, _shaped(tiling.gather_tile(w.size, *layout, taps=2), block), theta, programs, seed)
    if "input" in w.gradients and w.transform.kind == "affine":
        tile = tiling.walk_tile(w.input_size, *layout, taps=2, folds=False)
        rows += _walk(w, _shaped(tile, block), theta, programs, seed)
    elif w.gradients:
        all_channels = w.transform.dense and "theta" in w.gradients
        tile = tiling.scatter_tile(w.size, *layout, taps=2, all_channels=all_channels)
        rows += _scatter(w, _shaped(tile, block), theta, programs, seed)
    return rows


def _shaped(tile: Tile, block: tuple[int, int] | None) -> Tile:
    return tile if block is None else replace(tile, block=block)


# --- the kernels' loops, without values ----------------------------------------------------------------


def _gather(w: Workload, tile: Tile, theta: np.ndarray, programs: int, seed: int) -> list[Traffic]:
    taps, own = _from_the_output(w, tile, theta, programs, seed)
    image, output = (_image(w, size, tile) for size in (w.input_size, w.size))
    work = len(theta) * tile.count(w.size)
    return [
        _traffic("gather", tile, "input", image, *taps, work, _share(w, theta) * w.batch),
        _traffic("gather", tile, "output", output, *own, work, len(theta)),
    ]


def _scatter(w: Workload, tile: Tile, theta: np.ndarray, programs: int, seed: int) -> list[Traffic]:
    taps, own = _from_the_output(w, tile, theta, programs, seed)
    image, output = (_image(w, size, tile) for size in (w.input_size, w.size))
    work, touched = len(theta) * tile.count(w.size), _share(w, theta) * w.batch
    rows = [_traffic("scatter", tile, "grad_output", output, *own, work, len(theta))]
    if "theta" in w.gradients:
        rows.append(_traffic("scatter", tile, "input", image, *taps, work, touched))
    if "input" in w.gradients:
        sums = replace(image, itemsize=max(4, image.itemsize))
        added = taps if tile.block_c > 1 or not 1 < tile.block[0] <= 32 else (taps[0], _shared(*taps, tile))
        rows.append(_traffic("scatter", tile, "grad_input", sums, *added, work, touched))
    return rows


def _shared(pixels: Ints, inside: Ints, tile: Tile) -> Ints:
    """Which corners are left to add where each lane adds the right ones of the lane before it, if they are its left."""
    left, right = slice(0, None, 2), slice(1, None, 2)
    column = np.arange(pixels.shape[-1]) % tile.block[0]
    same = (np.roll(pixels[:, right], 1, -1) == pixels[:, left]).all(1, keepdims=True) & (column > 0)
    before = same & np.roll(inside[:, right], 1, -1)
    adds = inside.copy()
    adds[:, left] |= before
    adds[:, right] &= ~np.roll(same, -1, -1)
    return adds


def _from_the_output(
    w: Workload, tile: Tile, theta: np.ndarray, programs: int, seed: int
) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
    """Of the sampled programs, the input pixels at each lane's four corners, and the lanes' own; each with its mask."""
    maps, (x, y), mask = _sample(tile, w.size, len(theta), programs, seed)
    at = _places(w, theta, maps, x, y)
    first = [np.floor(a).astype(np.int64) for a in at]
    pixels, inside = [], []
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        tap_x, tap_y = first[0] + dx, first[1] + dy
        pixels.append(tap_y * w.input_size[1] + tap_x)
        inside.append(mask & (tap_x >= 0) & (tap_x < w.input_size[1]) & (tap_y >= 0) & (tap_y < w.input_size[0]))
    return (np.stack(pixels, 1), np.stack(inside, 1)), ((y * w.size[1] + x)[:, None], mask[:, None])


def _walk(w: Workload, tile: Tile, theta: np.ndarray, programs: int, seed: int) -> list[Traffic]:
    images, (x, y), mask = _sample(tile, w.input_size, w.batch, programs, seed)
    pixels: list[Ints] = []
    hits: list[Ints] = []
    for k in range(w.maps):
        steps = _candidates(w, theta[images * w.maps + k, None], x, y, mask)
        pixels += [k * w.size[0] * w.size[1] * (w.channels if w.layout == "contiguous" else 1) + p for p, _ in steps]
        hits += [hit for _, hit in steps]
    if not pixels:
        pixels, hits = [np.zeros_like(x)], [np.zeros_like(mask)]
    own = (y * w.input_size[1] + x)[:, None]
    image, output = (_image(w, size, tile) for size in (w.input_size, w.size))
    work = w.batch * tile.count(w.input_size)
    rows = [
        _traffic("walk", tile, "grad_output", output, np.stack(pixels, 1), np.stack(hits, 1), work, len(theta)),
        _traffic("walk", tile, "grad_input", image, own, mask[:, None], work, w.batch),
    ]
    if "theta" in w.gradients:  # read once for each map
        again = np.repeat(own, w.maps, 1)
        share = _share(w, theta) * w.batch
        rows.insert(
            1, _traffic("walk", tile, "input", image, again, np.repeat(mask[:, None], w.maps, 1), work, share)
        )  # fmt: skip
    return rows


def _candidates(w: Workload, theta: np.ndarray, x: Ints, y: Ints, mask: Ints) -> list[tuple[Ints, Ints]]:
    """One step after another: the output pixel that each lane visits, and whether it touches the lane's pixel."""
    a, b, c, d, tx, ty = _coefficients(w, theta)
    (height, width), (in_height, in_width) = w.size, w.input_size
    qx, qy = x - (in_width - 1) / 2, y - (in_height - 1) / 2
    # By each lane's own bounds, as the kernel masks them, a rounding wider, so that no candidate is missed.
    reach_x = 1 + (abs(tx) + in_width + abs(a) * width + abs(b) * height) * 2.0**-20
    reach_y = 1 + (abs(ty) + in_height + abs(c) * width + abs(d) * height) * 2.0**-20
    determinant = a * d - b * c
    centre = (a * (qy - ty) - c * (qx - tx)) / determinant + (height - 1) / 2
    half = (abs(a) * reach_y + abs(c) * reach_x) / abs(determinant)
    first_row, last_row = _integers(centre - half, centre + half, height)
    rows = int(np.where(mask, last_row - first_row + 1, 0).max(initial=0))
    lanes = x.shape[-1]
    if rows > lanes:
        raise ValueError(f"{w}: lanes share pixels that {rows} rows of the output touch; that is not counted.")
    steps = []
    for r in range(rows):
        row = first_row + r
        in_row = mask & (row <= last_row)
        v = row - (height - 1) / 2
        first, last = np.zeros_like(row), np.full_like(row, width - 1)
        for slope, other, shift, q, reach in ((a, b, tx, qx, reach_x), (c, d, ty, qy, reach_y)):
            offset = other * v + shift - q
            with np.errstate(divide="ignore", invalid="ignore"):
                middle, half = (width - 1) / 2 - offset / slope, reach / abs(slope)
                low, high = _integers(middle - half, middle + half, width)
            flat = np.broadcast_to(abs(slope) < 1e-30, offset.shape)
            first = np.maximum(first, np.where(flat, 0, low))
            last = np.minimum(last, np.where(flat, np.where(abs(offset) <= reach, width - 1, -1), high))
        for step in range(int(np.where(in_row, last - first + 1, 0).max(initial=0))):
            column = first + step
            look_x, look_y = _look(w, theta, column, row)
            hit = in_row & (column <= last)
            for look, pixel in ((look_x, x), (look_y, y)):
                hit = hit & (np.floor(look) <= pixel) & (pixel <= np.floor(look) + 1)
            steps.append((row * width + column, hit))
    return steps


def _sample(
    tile: Tile, size: Sequence[int], images: int, programs: int, seed: int
) -> tuple[Ints, tuple[Ints, Ints], Ints]:
    """Some programs: the image (or map) of each, its lanes' pixels x and y (programs, lanes), and which exist."""
    everything = images * tile.count(size)
    chosen = np.arange(everything)
    if programs < everything:
        chosen = np.random.default_rng(seed).choice(everything, programs, replace=False)
    image, index = np.divmod(chosen, tile.count(size))
    across = -(-size[1] // tile.block[0])
    lane = np.arange(tile.block[0] * tile.block[1])
    x = (index % across)[:, None] * tile.block[0] + lane % tile.block[0]
    y = (index // across)[:, None] * tile.block[1] + lane // tile.block[0]
    return image, (x, y), (x < size[1]) & (y < size[0])


def _coefficients(w: Workload, theta: np.ndarray) -> tuple[np.ndarray, ...]:
    """Theta (…, 2, 3) in centred pixels: a, b, c, d and the translation."""
    inside, outside = (
        [(n - 1 if w.align_corners else n) / 2 for n in reversed(size)] for size in (w.input_size, w.size)
    )
    linear = [theta[..., i, j] * (inside[i] / outside[j]) for i in range(2) for j in range(2)]
    return (*linear, theta[..., 0, 2] * inside[0], theta[..., 1, 2] * inside[1])


def _look(w: Workload, theta: np.ndarray, x: Ints, y: Ints) -> tuple[np.ndarray, np.ndarray]:
    """Output pixels → where they look, in input pixels, in fp64."""
    a, b, c, d, tx, ty = _coefficients(w, theta)
    u, v = x - (w.size[1] - 1) / 2, y - (w.size[0] - 1) / 2
    return a * u + b * v + tx + (w.input_size[1] - 1) / 2, c * u + d * v + ty + (w.input_size[0] - 1) / 2


def _places(w: Workload, theta: np.ndarray, maps: Ints, x: Ints, y: Ints) -> tuple[np.ndarray, np.ndarray]:
    """The same for output pixels (programs, lanes) of a map of any kind for each program."""
    if w.transform.kind == "affine":
        return _look(w, theta[maps, None], x, y)
    numbers = torch.from_numpy(theta)
    kept = w.transform.kept(w.size, w.input_size, w.align_corners, numbers)
    at = np.empty((*x.shape, 2))
    for m in np.unique(maps):
        grid = w.transform.grid(numbers[m : m + 1], kept, w.size, w.align_corners)[0].numpy()
        mine = maps == m
        at[mine] = grid[y[mine].clip(max=w.size[0] - 1), x[mine].clip(max=w.size[1] - 1)]
    sizes = np.array(w.input_size[::-1])
    at = (at + 1) / 2 * (sizes - 1) if w.align_corners else ((at + 1) * sizes - 1) / 2
    return at[..., 0], at[..., 1]


def _integers(first: np.ndarray, last: np.ndarray, size: int) -> tuple[Ints, Ints]:
    """The integers of [first, last] within an axis; a bound that is not a number is the end of the axis."""
    low = np.nan_to_num(np.ceil(first), nan=0).clip(0, size)
    high = np.nan_to_num(np.floor(last), nan=size - 1).clip(-1, size - 1)
    return low.astype(np.int64), high.astype(np.int64)


# --- sums ----------------------------------------------------------------------------------------------


def _image(w: Workload, size: tuple[int, ...], tile: Tile) -> Image:
    per_program = min(w.channels, tile.channels_per_program)
    return Image(
        w.channels, (size[0], size[1]), w.itemsize, w.layout == "channels_last", tile.block_c, per_program
    )  # fmt: skip


def _traffic(
    kernel: str, tile: Tile, tensor: str, image: Image, pixels: Ints, mask: Ints, work: int, images: float
) -> Traffic:
    """`work` is how many tiles there are in all, `images` how many images a floor reads or writes."""
    requests, sectors, lanes = image.requests(pixels, mask)
    own, lines = image.distinct(pixels, mask, SECTOR), image.distinct(pixels, mask, LINE)
    programs = work * image.channels / image.per_program
    mib = SECTOR * programs / 2**20
    floor = images * image.channels * image.size[0] * image.size[1] * image.itemsize / 2**20
    shape = f"{tile.block[0]}x{tile.block[1]}"
    shape += f" c{tile.block_c}" if tile.block_c > 1 else f" u{tile.unroll}"
    per_request = sectors / max(requests, 1e-9)
    return Traffic(
        kernel, shape, tensor, requests, per_request, lanes, own, lines, sectors * mib, own * mib, floor
    )  # fmt: skip


def _share(w: Workload, theta: np.ndarray, most: int = 4) -> float:
    """The share of the input's pixels that any sample touches, in a few of the images."""
    seen = []
    for n in range(min(w.batch, most)):
        touched = np.zeros(w.input_size, bool)
        y, x = (index.reshape(1, -1) for index in np.indices(w.size))
        for k in range(w.maps):
            at = _places(w, theta, np.array([n * w.maps + k]), x, y)
            first = [np.floor(a).astype(np.int64) for a in at]
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                tx, ty = first[0] + dx, first[1] + dy
                ok = (tx >= 0) & (tx < w.input_size[1]) & (ty >= 0) & (ty < w.input_size[0])
                touched[ty[ok], tx[ok]] = True
        seen.append(touched.mean())
    return float(np.mean(seen))


def _distinct(values: Ints) -> Ints:
    """How many different values that are not negative lie along the last axis."""
    ordered = np.sort(values, -1)
    new = np.ones(ordered.shape, bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return (new & (ordered >= 0)).sum(-1)
