"""What warps and programs touch: 32-byte sectors and 128-byte lines of a workload, counted and never timed.

    python -m bench traffic rotate_1k --tile 16x8 --tile 32x4

The kernels that a step of tri_stn starts are compiled, and some of their programs are emulated. At every load, store
and atomic, the addresses tell which memory a warp asks for in that request, and which a program touches in all.

    by request  every warp's sectors: what goes through L1; four corners mostly ask for the same ones again
    by program  a program's distinct sectors: what comes from L2 if L1 keeps what the program touched
    floor       the distinct bytes of the whole tensor: what comes from memory at least

Atomics go past L1: of those, *by request* is what comes to L2. No program keeps anything for another. Instructions are
PTX's, loops as often as they ran; ptxas makes some more of them, or fewer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from . import measure
from .emulator import Grid, Watch, emulated
from .providers import TRI_STN
from .ptx import WARP, Array
from .resources import kernels_on_the_cpu
from .workloads import Tensors, Workload

SECTOR, LINE = 32, 128
_IMAGES = {"input", "output", "grad_output", "grad_input"}


@dataclass
class Access:
    """What a kernel's programs do with one tensor, of those that were emulated."""

    operation: str
    bytes: int
    """Of the whole tensor."""
    requests: int = 0
    sectors: int = 0
    """Of each request, added up."""
    threads: int = 0
    """That take part, of each request."""
    touched: list[Array] = field(default_factory=list)
    """Which program, and which of the tensor's sectors, as one number."""

    def distinct(self, unit: int) -> int:
        """Sectors or lines of each program, added up."""
        together = unit // SECTOR
        return len(np.unique(np.concatenate([np.unique(t // together) for t in self.touched])))


@dataclass
class Launch:
    """A kernel that was started, and the programs of it that were emulated."""

    kernel: str
    tile: str
    programs: int
    emulated: int
    instructions: int = 0
    """Of each warp, added up."""
    accesses: dict[str, Access] = field(default_factory=dict)


class Count(Watch):
    """So many programs of each launch, drawn at random."""

    def __init__(self, programs: int, seed: int) -> None:
        self.programs, self.random = programs, np.random.default_rng(seed)
        self.launches: list[Launch] = []

    def begin(self, kernel: Any, grid: Grid, arguments: Sequence[Any]) -> Array:
        everything = math.prod(grid)
        chosen = np.arange(everything)
        if self.programs < everything:
            chosen = self.random.choice(everything, self.programs, replace=False)
        named = dict(zip(kernel.src.fn.arg_names, arguments, strict=True))
        tensors = {name.removesuffix("_ptr"): t for name, t in named.items() if isinstance(t, torch.Tensor)}
        # One that stands for two, as where there is no tangent, has the first of the names.
        self._starts = {t.data_ptr(): (name, t) for name, t in reversed(tensors.items())}
        self._threads = WARP * kernel.metadata.num_warps
        self.launches.append(Launch(kernel.name.removesuffix("_kernel"), _tile(named), everything, len(chosen)))
        return chosen

    def executed(self, instructions: int) -> None:
        self.launches[-1].instructions += instructions

    def accessed(self, operation: str, addresses: Array, size: int, threads: Array) -> None:
        if not len(addresses):
            return
        start = max(s for s in self._starts if s <= addresses[0])
        name, tensor = self._starts[start]
        new = Access(operation, tensor.nbytes)
        access = self.launches[-1].accesses.setdefault(name, new)
        sectors = (addresses - np.uint64(start)).astype(np.int64) // SECTOR
        access.requests += len(np.unique(threads // WARP))
        access.sectors += len(np.unique(threads // WARP << 40 | sectors))
        access.threads += len(threads)
        access.touched.append(np.unique(threads // self._threads << 40 | sectors))


def _tile(constants: dict[str, Any]) -> str:
    """Pixels, channels beside each other, blocks of them, and tiles of a program: 8x4 c16 u4, 16x8 u3 ×8."""
    beside, blocks, tiles = (constants.get(name, 1) for name in ("BLOCK_C", "UNROLL", "TILES"))
    channels = f" c{beside}" * (beside > 1) + f" u{blocks}" * (blocks > 1 or beside == 1)
    return "x".join(map(str, constants["BLOCK"])) + channels + f" ×{tiles}" * (tiles > 1)


@dataclass(frozen=True)
class Traffic:
    """A tensor's share in a kernel's work, per program but for the last four: instructions a pixel, and MiB of all."""

    kernel: str
    tile: str
    tensor: str
    requests: float
    sectors_per_request: float
    threads_in_use: float
    """Of the warps that ask for anything."""
    sectors: float
    lines: float
    instructions: float
    """PTX that the kernel runs for a pixel that it owns, of all its channels."""
    by_request: float
    by_program: float
    floor: float


HEADERS = (
    "kernel", "tile", "tensor", "requests", "sectors/request", "threads used", "sectors", "lines", "PTX/pixel",
    "MiB by request", "MiB by program", "MiB floor", "program/floor",
)  # fmt: skip


def cells(row: Traffic) -> tuple[object, ...]:
    """A row as the table shows it, under HEADERS."""
    requests, per_request, threads, sectors, lines, instructions, *mib = astuple(row)[3:]
    return (
        row.kernel, row.tile, row.tensor, f"{requests:.0f}", f"{per_request:.2f}", f"{threads:.0%}", f"{sectors:.0f}",
        f"{lines:.0f}", f"{instructions:.0f}", *(f"{n:.1f}" for n in mib), f"{row.by_program / row.floor:.2f}",
    )  # fmt: skip


def count(
    workload: Workload, block: tuple[int, int] | None = None, programs: int = 256, seed: int = 0
) -> list[Traffic]:
    """The traffic of a step's kernels, for a tile (width, height) or those that the kernels would take; of so many
    programs, drawn at random.
    """
    tensors, counted = _tensors(workload), Count(programs, seed)
    with tiles_of(block), kernels_on_the_cpu(), emulated(watch=counted):
        output = TRI_STN.build(workload, tensors)()
        if wanted := list(tensors.wanted.values()):
            torch.autograd.grad(output, wanted, tensors.grad_output)
    share = _share(workload, tensors)
    return [row for launch in counted.launches for row in _rows(workload, launch, share)]


def _tensors(workload: Workload) -> Tensors:
    """Maps as the workload draws them; images of which nobody has read anything take no memory."""
    w = workload
    layout = {"contiguous": torch.contiguous_format}.get(
        w.layout, torch.channels_last if len(w.size) == 2 else torch.channels_last_3d
    )

    def image(count: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(count, w.channels, *size, dtype=getattr(torch, w.dtype), memory_format=layout)

    theta = w.transform.draw(w.batch * w.maps, w.size, w.seed).unflatten(0, w.lead)
    grad_output = image(w.batch * w.maps, w.size).unflatten(0, w.lead)
    input = image(w.batch, w.input_size).requires_grad_("input" in w.gradients)
    return Tensors(
        input, theta.requires_grad_("theta" in w.gradients), grad_output, grad_output.narrow(-len(w.size) - 1, 0, 1)
    )


@contextlib.contextmanager
def tiles_of(block: tuple[int, int] | None) -> Iterator[None]:
    """Images take tiles of so many pixels, as if they were those of large ones."""
    from tri_stn.kernels import tiling

    if block is None:
        yield
        return
    with mock.patch.dict(tiling._BLOCKS, {2: dict.fromkeys(tiling._BLOCKS[2], block)}):
        tiling._block.cache_clear()
        try:
            yield
        finally:
            tiling._block.cache_clear()


def _share(workload: Workload, tensors: Tensors, most: int = 2**22) -> float:
    """The share of the input's pixels that any sample touches, in some of the images."""
    w = workload
    images = max(1, min(w.batch, most // max(w.maps * math.prod(w.size), math.prod(w.input_size))))
    few = replace(w, batch=images)
    maps = images * len(tensors.theta) // w.batch
    some = Tensors(tensors.input[:images], tensors.theta[:maps], tensors.grad_output[:maps], tensors.clear[:maps])
    return measure.touched(few, some)


def _rows(workload: Workload, launch: Launch, share: float) -> Iterator[Traffic]:
    w, owned = workload, {"walk": workload.batch * math.prod(workload.input_size)}
    pixels = owned.get(launch.kernel, w.batch * w.maps * math.prod(w.size))
    part = launch.programs / launch.emulated
    for tensor in sorted(launch.accesses):
        access = launch.accesses[tensor]
        if tensor not in _IMAGES and not (w.transform.dense and tensor in ("parameters", "gradients")):
            continue  # a few numbers for each map
        sectors = access.distinct(SECTOR)
        mib = part * SECTOR / 2**20
        written = tensor == "grad_input" and access.operation == "store"
        floor = access.bytes / 2**20 * (share if tensor in ("input", "grad_input") and not written else 1)
        yield Traffic(
            launch.kernel, launch.tile, tensor, access.requests / launch.emulated, access.sectors / access.requests,
            access.threads / WARP / access.requests, sectors / launch.emulated,
            access.distinct(LINE) / launch.emulated, launch.instructions * part * WARP / pixels,
            access.sectors * mib, sectors * mib, floor,
        )  # fmt: skip
