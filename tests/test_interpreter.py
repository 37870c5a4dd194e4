"""The interpreter that the kernels' tests run in, as `interpreter` puts it right."""

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="kernels are compiled here")


@triton.jit
def _add(sum_ptr, x_ptr, y_ptr):
    i = tl.arange(0, 2)
    tl.store(sum_ptr + i, (tl.load(x_ptr + i) + tl.load(y_ptr + i)).to(sum_ptr.dtype.element_ty))


def add(x, y, dtype):
    result = torch.empty(2, dtype=dtype)
    _add[(1,)](result, x, y)
    return result


def test_rounds_to_nearest_even_in_bf16():
    x, y = torch.tensor([1.0, 1.0]), torch.tensor([2.0**-8, 3 * 2.0**-8])
    assert torch.equal(add(x, y, torch.bfloat16), (x + y).bfloat16())


def test_fails_where_an_index_overflows():
    x = torch.tensor([0, 2**31 - 1], dtype=torch.int32)
    assert torch.equal(add(x, torch.zeros_like(x), torch.int32), x)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="add overflows int32"):
        add(x, torch.ones_like(x), torch.int32)
