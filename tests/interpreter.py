"""Triton's interpreter, made to round bf16 as GPUs do, to fail where an index overflows, and quicker: what it does over
and over, it does once.

Imported where TRITON_INTERPRET is set, before any kernel runs.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_semantic

_cast, _patch_lang, _np_dtype = InterpreterBuilder.cast_impl, interpreter._patch_lang, interpreter._get_np_dtype
_patched, _np_dtypes = set(), {}


def _cast_rounding_bf16(self, src, dst_type):
    """The interpreter truncates fp32 to bf16 and garbles fp64; every GPU rounds to nearest even."""
    if src.dtype.scalar in (tl.float32, tl.float64) and dst_type.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(self, src, dst_type)


def _patch_lang_once(fn):
    """The interpreter patches the language anew for every call of a device function: half of its time."""
    modules = {m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core}
    if modules <= _patched:
        return interpreter._LangPatchScope()
    scope = _patch_lang(fn)
    restore = scope.restore

    def restore_and_forget():
        restore()
        _patched.difference_update(modules)

    scope.restore = restore_and_forget
    _patched.update(modules)
    return scope


def _np_dtype_once(dtype):
    """Asked for by every operation, and looked up in a table made for the question."""
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _np_dtype(dtype)
    return _np_dtypes[name]


def _assert_no_overflow(lhs, rhs, operation):
    """The interpreter looks for it in two fifths of its time, by a dozen operations more, and drops what it found."""
    x, y = lhs.handle.data, rhs.handle.data
    if x.dtype.kind in "iu" and x.dtype.itemsize < 8:
        exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__](x, y, dtype=np.int64)
        limits = np.iinfo(x.dtype)
        assert limits.min <= exact.min() and exact.max() <= limits.max, f"{operation.__name__} overflows {lhs.dtype}"


InterpreterBuilder.cast_impl = _cast_rounding_bf16
interpreter._patch_lang = _patch_lang_once
interpreter._get_np_dtype = _np_dtype_once
interpreter_semantic.binary_op_sanitize_overflow_impl = _assert_no_overflow
