"""The emulator computes what a GPU would, and stops where that would read or write what it must not."""

import pytest
import torch
import triton
import triton.language as tl
from conftest import compiled

from bench import emulator

pytestmark = compiled


@pytest.fixture(autouse=True)
def on_tensors_of_the_cpu():
    with emulator.emulated():
        yield


@triton.jit
def arithmetic_kernel(out_ptr, x_ptr, i_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    x, i = tl.load(x_ptr + lane), tl.load(i_ptr + lane)
    tl.store(out_ptr + lane, tl.maximum(x, 0.5))
    tl.store(out_ptr + N + lane, tl.floor(x).to(tl.int32).to(tl.float32))
    tl.store(out_ptr + 2 * N + lane, (i // 3 + i % 3).to(tl.float32))
    tl.store(out_ptr + 3 * N + lane, (i.to(tl.uint32) >> 28).to(tl.float32))
    tl.store(out_ptr + 4 * N + lane, x.to(tl.bfloat16).to(tl.float32))
    tl.store(out_ptr + 5 * N + lane, tl.where(x != x, 1.0, tl.where(x < 0, 2.0, 3.0)))
    tl.store(out_ptr + 6 * N + lane, (i.to(tl.int64) * i).to(tl.float32))
    tl.store(out_ptr + 7 * N + lane, tl.sum(tl.where(x < 9, i, 0), 0).to(tl.float32) + lane * 0)


def test_numbers():
    x = torch.linspace(-40, 40, 64)
    x[3], x[4], x[5] = torch.nan, torch.inf, -1e20
    i = (torch.arange(64) - 20).to(torch.int32) * 3001
    out = torch.full((8, 64), torch.nan)
    arithmetic_kernel[(1,)](out, x, i, 64, num_warps=2)
    towards_zero = torch.div(i, 3, rounding_mode="trunc")
    whole = x.double().floor().nan_to_num(0).clamp(-(2**31), 2**31 - 1).float()
    expected = [
        torch.fmax(x, torch.tensor(0.5)),  # of a number and NaN the number, on every GPU
        whole,  # the nearest that there is, and 0 for NaN
        towards_zero + (i - 3 * towards_zero),
        (i.long() % 2**32) >> 28,
        x.bfloat16().float(),
        torch.where(x.isnan(), 1.0, torch.where(x < 0, 2.0, 3.0)),
        (i.long() * i).float(),
        i[x < 9].sum().expand(64),
    ]
    torch.testing.assert_close(out, torch.stack([e.float() for e in expected]), rtol=0, atol=0, equal_nan=True)


@triton.jit
def parting_kernel(out_ptr, sums_ptr, turns_ptr, N: tl.constexpr):
    """Programs take as many turns as they are told, and add up what all their threads have."""
    program = tl.program_id(0)
    lane = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for turn in range(tl.load(turns_ptr + program)):
        total += tl.where(lane % 2 == 0, 1.0 + turn, 0.0)
        total += tl.sum(total, 0) * 1e-3
    tl.store(out_ptr + program * N + lane, total)
    tl.atomic_add(sums_ptr + lane % 4, total)


def test_threads_part_and_meet_again():
    turns, out, sums = torch.tensor([3, 0, 7, 1], dtype=torch.int32), torch.full((4, 128), torch.nan), torch.zeros(4)
    parting_kernel[(4,)](out, sums, turns, 128)
    for program, count in enumerate(turns.tolist()):
        total = torch.zeros(128)
        for turn in range(count):
            total[::2] += 1 + turn
            total += total.sum() * 1e-3
        torch.testing.assert_close(out[program], total)
    torch.testing.assert_close(sums, out.view(4, 32, 4).sum((0, 1)))


@triton.jit
def copying_kernel(out_ptr, x_ptr, start, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, tl.load(x_ptr + start + lane))


@pytest.mark.parametrize("start", [1, -1, 2**20])
def test_reading_beside_a_tensor_is_an_error(start):
    x, out = torch.zeros(64), torch.zeros(64)
    copying_kernel[(1,)](out, x, 0, 64)
    with pytest.raises(emulator.OutOfBoundsError):
        copying_kernel[(1,)](out, x, start, 64)
    with pytest.raises(emulator.OutOfBoundsError):
        copying_kernel[(1,)](out[:32].clone(), x, 0, 64)


def test_a_wide_load_at_an_odd_address_is_an_error():
    """What was compiled for aligned pointers, and is given others."""
    x, out = torch.zeros(256), torch.zeros(512)
    kernel = copying_kernel[(1,)](out, x, 0, 256, num_warps=1)
    assert "v4" in kernel.asm["ptx"]
    with pytest.raises(emulator.MisalignedError):
        emulator.run(kernel, (1, 1, 1), (out[1:], x, 0, 256), emulator.Watch())


def test_some_programs_are_watched():
    class Last(emulator.Watch):
        def __init__(self):
            self.instructions, self.seen = 0, []

        def begin(self, kernel, grid, arguments):
            return emulator.np.array([grid[0] - 1])

        def executed(self, instructions):
            self.instructions += instructions

        def accessed(self, operation, addresses, size, threads):
            self.seen.append((operation, size, len(addresses), threads.max()))

    watch, out, sums = Last(), torch.zeros(4, 32), torch.zeros(4)
    with emulator.emulated(watch=watch):
        parting_kernel[(4,)](out, sums, torch.full((4,), 2, dtype=torch.int32), 32, num_warps=1)
    assert out[:3].eq(0).all() and out[3].ne(0).all()
    assert watch.instructions > 50
    assert watch.seen == [("load", 4, 32, 31), ("store", 4, 32, 31), ("atomic", 4, 32, 31)]
