"""Quotients by a product and a shift are those of whole numbers."""

import pytest
import torch
import triton
import triton.language as tl
from tri_stn.kernels.division import divisor, quotient

DIVISORS = [1, 2, 3, 5, 6, 7, 9, 16, 31, 33, 100, 641, 2**15 + 1, 2**16, 2**20 - 1, 6700417, 2**30 + 1, 2**31 - 1]


@triton.jit
def divide_kernel(out_ptr, n_ptr, divisor, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    tl.store(out_ptr + lane, quotient(tl.load(n_ptr + lane), divisor))


def numbers(d):
    """Those about multiples of a divisor, where a quotient that is a little off shows."""
    multiples = [k * d for k in (0, 1, 2, 3, (2**31 - 1) // d - 1, (2**31 - 1) // d)]
    near = [m + more for m in multiples for more in (-1, 0, 1)] + [2**31 - 1, 2**31 - 2]
    return [n for n in near if 0 <= n < 2**31]


@pytest.mark.parametrize("d", DIVISORS)
def test_quotients(d):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = (numbers(d) * 32)[:32]
    out = torch.empty(32, dtype=torch.int32, device=device)
    divide_kernel[(1,)](out, torch.tensor(n, dtype=torch.int32, device=device), divisor(d), 32)
    assert out.tolist() == [i // d for i in n]


def test_every_divisor_is_passed_as_one_kind_of_integer():
    """Triton compiles anew for integers of another width, for 1 and for multiples of 16."""
    for d in (*range(1, 5000), *DIVISORS, 2**31):
        packed = divisor(d)
        assert -(2**63) <= packed < 2**63 and not -(2**31) <= packed < 2**31 and packed % 2 == 1, d
        multiplier, shift = packed >> 32 & (2**32 - 1), (packed & 63) >> 1
        for n in numbers(d):
            assert ((n * multiplier >> 32) + n) % 2**32 >> shift == n // d, (n, d)
