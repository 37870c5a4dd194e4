"""What a GPU would compute, without one: the PTX that Triton makes of a kernel, instruction by instruction.

Triton's interpreter runs a kernel's Python. This runs what its compiler made of it, by the very launch that a GPU would
get, so that all in between is tried: types, layouts, shuffles, masks, shared memory, vector loads. It is not slower.
What ptxas makes of PTX is not tried, but products are fused with additions wherever it may do so.

    with emulator.emulated(), resources.kernels_on_the_cpu():
        tri_stn.warp(image, tri_stn.Affine(theta))

All threads of some programs go side by side; where they part, those that are furthest behind go on. Every address must
lie in a tensor that the kernel was given, and be aligned. Races are not found: threads take turns in their order.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from .ptx import ATOMIC, TYPES, U1, U4, UNSIGNED, WARP, Array, Program, constant
from .resources import launched_by

_THREADS_AT_ONCE = 2**14
Grid = tuple[int, int, int]


class Watch:
    """Chooses which programs of a launch run, and sees what they do; this one lets all run and looks away."""

    def begin(self, kernel: Any, grid: Grid, arguments: Sequence[Any]) -> Array:
        """The numbers of the programs that are to run."""
        return np.arange(math.prod(grid))

    def executed(self, instructions: int) -> None:
        """So many instructions, counted once for each warp."""

    def accessed(self, operation: str, addresses: Array, size: int, threads: Array) -> None:
        """A "load", "store" or "atomic" of so many bytes at each address by a thread, a number over all programs."""


@contextlib.contextmanager
def emulated(arch: str = "sm_90", watch: Watch | None = None) -> Iterator[None]:
    """Launches on tensors of the CPU run here."""
    from triton.backends.nvidia.compiler import CUDABackend

    as_usual = CUDABackend.hash
    with (
        launched_by(functools.partial(run, watch=watch or Watch()), arch),
        # Assembling is most of the time of a compilation; what lacks it has a key of its own in Triton's cache.
        mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""),
        mock.patch.object(CUDABackend, "hash", lambda self: f"{as_usual(self)}-not-assembled"),
    ):
        yield


def run(kernel: Any, grid: Grid, arguments: Sequence[Any], watch: Watch) -> None:
    """A compiled kernel, on the arguments of a launch."""
    program = _program(kernel.asm["ptx"])
    given = list(flat(kernel.src.signature.values(), arguments))
    memory = Memory([argument for argument in given if isinstance(argument, torch.Tensor)], program.tables.values())
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given]
    values += [0] * (len(program.parameters) - len(values))  # scratch memory that nobody asked for
    parameters = {n: constant(v, TYPES[kind]) for (n, kind), v in zip(program.parameters.items(), values, strict=True)}
    programs = watch.begin(kernel, grid, arguments)
    at_once = max(1, _THREADS_AT_ONCE // program.threads)
    for first in range(0, len(programs), at_once):
        some = programs[first : first + at_once]
        Threads(program, parameters, memory, kernel.metadata.shared, some, grid, watch, first).run()


_program = functools.lru_cache(2**10)(Program)


def flat(signature: Iterable[Any], arguments: Iterable[Any]) -> Iterator[Any]:
    """Arguments as a kernel takes them: tuples opened, and without what was compiled in."""
    for kind, argument in zip(signature, arguments, strict=True):
        if isinstance(kind, (tuple, list)):
            yield from flat(kind, argument)
        elif kind != "constexpr":
            yield argument


class OutOfBoundsError(Exception):
    """An address in none of the tensors, or beyond a program's shared memory."""


class MisalignedError(Exception):
    """An address that is no multiple of the bytes read or written there."""


class Memory:
    """The tensors that a kernel was given, and tables of its own, by address."""

    def __init__(self, tensors: Iterable[torch.Tensor], tables: Iterable[Array]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        storages |= {table.ctypes.data: table.nbytes for table in tables}
        self.starts = sorted(start for start, size in storages.items() if size)
        self.sizes = [storages[start] for start in self.starts]

    def places(self, addresses: Array, width: int, vector: int) -> Iterator[tuple[Array, Array, Array]]:
        """Tensor by tensor: its words of so many bytes, `vector` of them at each address; where in it, and which of the
        addresses.
        """
        if (addresses % np.uint64(width * vector)).any():
            raise MisalignedError(
                f"{width * vector} bytes at {addresses[addresses % np.uint64(width * vector) > 0][0]}"
            )
        left = np.arange(len(addresses))
        while len(left):
            i = bisect.bisect_right(self.starts, int(addresses[left[0]])) - 1
            start, size = (self.starts[i], self.sizes[i]) if i >= 0 else (0, 0)
            beyond = addresses[left] - np.uint64(start)
            here = beyond < np.uint64(max(size - width * vector + 1, 0))
            if not here[0]:
                raise OutOfBoundsError(f"{beyond[0]} bytes beyond the start of a tensor of {size}")
            memory = memoryview((ctypes.c_uint8 * size).from_address(start))
            words = np.frombuffer(memory, UNSIGNED[width], size // width)
            yield words, (beyond[here] // np.uint64(width)).astype(np.intp), left[here]
            left = left[~here]


class Threads:
    """Those of some programs of a launch, with the shared memory of each program."""

    def __init__(
        self, program: Program, parameters: dict[str, Array], memory: Memory, shared: int, programs: Array, grid: Grid,
        watch: Watch, before: int,
    ) -> None:  # fmt: skip
        self.program, self.parameters, self.memory, self.watch = program, parameters, memory, watch
        self.END = len(program.blocks)
        self.count = len(programs) * program.threads
        self.before = before * program.threads
        self.everyone = np.arange(self.count)
        self.shared = np.zeros((len(programs), -(-shared // 16) * 16), U1)
        x, y, z = (np.repeat(n, program.threads).astype(U4) for n in np.unravel_index(programs, grid, order="F"))
        self.ctaid_x, self.ctaid_y, self.ctaid_z = x, y, z
        self.nctaid_x, self.nctaid_y, self.nctaid_z = (np.array([n], U4) for n in grid)
        self.tid_x = np.tile(np.arange(program.threads, dtype=U4), len(programs))
        self.tid_y = self.tid_z = np.zeros(1, U4)

    def run(self) -> None:
        registers: list[Array | None] = [None] * len(self.program.registers)
        at: int | Array = 0  # the block where everybody is, or of each thread where they have parted
        with np.errstate(all="ignore"):
            while True:
                block, mask = self._next(at) if isinstance(at, np.ndarray) else (at, None)
                if block == self.END:
                    return
                warps = self.count // WARP if mask is None else int(mask.reshape(-1, WARP).any(1).sum())
                self.watch.executed(warps * self.program.lengths[block])
                function = self.program.blocks[block][mask is not None]
                following = function(self, registers, self.program.constants, mask)
                at = following if mask is None else np.where(mask, following, at)

    def _next(self, at: Array) -> tuple[int, Array | None]:
        """The first block that some threads are at, and they: all of those that must be there together."""
        for block in map(int, np.unique(at)):
            mask = np.broadcast_to(at == block, self.count)
            if mask.all():
                return block, None
            if block in self.program.together:
                size = self.program.together[block]
                mask = np.repeat(mask.reshape(-1, size).all(1), size)
            if block != self.END and mask.any():
                return block, mask
        raise RuntimeError("Threads wait for others that do not come.")

    def _each(self, value: Array, threads: Array) -> Array:
        return np.broadcast_to(value, self.count)[threads]

    def _taking_part(self, mask: Array | None) -> Array:
        return self.everyone if mask is None else np.flatnonzero(np.broadcast_to(mask, self.count))

    # --- memory

    def _global(
        self, operation: str, addresses: Array, width: int, vector: int, mask: Array | None
    ) -> Iterator[tuple[Array, Array, Array]]:
        """Of the threads that take part, tensor by tensor: its words, where in it, and which threads."""
        threads = self._taking_part(mask)
        addresses = self._each(addresses, threads)
        self.watch.accessed(operation, addresses, width * vector, self.before + threads)
        for words, index, which in self.memory.places(addresses, width, vector):
            yield words, index, threads[which]

    def load_global(self, addresses: Array, width: int, vector: int, mask: Array | None) -> Array:
        results = np.zeros((vector, self.count), UNSIGNED[width])
        for words, index, threads in self._global("load", addresses, width, vector, mask):
            for i in range(vector):
                results[i, threads] = words[index + i]
        return results

    def store_global(self, addresses: Array, values: list[Array], mask: Array | None) -> None:
        width, vector = values[0].dtype.itemsize, len(values)
        for words, index, threads in self._global("store", addresses, width, vector, mask):
            for i, value in enumerate(values):
                words[index + i] = self._each(value, threads).view(words.dtype)

    def change_atomically(self, addresses: Array, values: list[Array], operation: str, mask: Array | None) -> Array:
        """What was there before all of them."""
        width, vector = values[0].dtype.itemsize, len(values)
        before = np.zeros((vector, self.count), UNSIGNED[width])
        for words, index, threads in self._global("atomic", addresses, width, vector, mask):
            for i, value in enumerate(values):
                before[i, threads] = words[index + i]
                ATOMIC[operation].at(words.view(value.dtype), index + i, self._each(value, threads))
        return before

    def _shared_words(self, addresses: Array, width: int, vector: int, threads: Array) -> tuple[Array, Array, Array]:
        addresses, size = self._each(addresses, threads).astype(np.intp), width * vector
        if (addresses % size).any():
            raise MisalignedError(f"{size} bytes of shared memory")
        if len(addresses) and int(addresses.max()) + size > self.shared.shape[1]:
            raise OutOfBoundsError(f"{addresses.max()} + {size} of {self.shared.shape[1]} bytes of shared memory")
        return self.shared.view(UNSIGNED[width]), threads // self.program.threads, addresses // width

    def load_shared(self, addresses: Array, width: int, vector: int, mask: Array | None) -> Array:
        results, threads = np.zeros((vector, self.count), UNSIGNED[width]), self._taking_part(mask)
        words, owner, index = self._shared_words(addresses, width, vector, threads)
        for i in range(vector):
            results[i, threads] = words[owner, index + i]
        return results

    def store_shared(self, addresses: Array, values: list[Array], mask: Array | None) -> None:
        threads = self._taking_part(mask)
        words, owner, index = self._shared_words(addresses, values[0].dtype.itemsize, len(values), threads)
        for i, value in enumerate(values):
            words[owner, index + i] = self._each(value, threads).view(words.dtype)

    # --- between the threads of a warp

    def shuffle(self, value: Array, by: Array, whole: Array, how: str) -> Array:
        if how not in ("bfly", "idx") or whole[0] != WARP - 1:
            raise NotImplementedError(f"shfl.{how} within {whole[0]}")
        lane = self.everyone % WARP
        source = lane ^ by.astype(np.intp) if how == "bfly" else by.astype(np.intp) % WARP
        return np.broadcast_to(value, self.count)[self.everyone - lane + source]

    def reduce(self, value: Array, operation: str) -> Array:
        return np.repeat(ATOMIC[operation].reduce(np.broadcast_to(value, self.count).reshape(-1, WARP), 1), WARP)
