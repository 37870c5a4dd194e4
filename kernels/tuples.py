"""Elementwise arithmetic on tuples with one entry per axis or parameter."""

import triton
import triton.language as tl


@triton.jit
def to(x, dtype: tl.constexpr):
    result = ()
    for i in tl.static_range(len(x)):
        result = result + (x[i].to(dtype),)
    return result


@triton.jit
def add(x, y):
    result = ()
    for i in tl.static_range(len(x)):
        result = result + (x[i] + y[i],)
    return result


@triton.jit
def zeros(LENGTH: tl.constexpr, SHAPE: tl.constexpr, dtype: tl.constexpr):
    result = ()
    for _ in tl.static_range(LENGTH):
        result = result + (tl.zeros(SHAPE, dtype),)
    return result


@triton.jit
def where(condition, x, y):
    result = ()
    for i in tl.static_range(len(x)):
        result = result + (tl.where(condition, x[i], y[i]),)
    return result


@triton.jit
def scale(x, factor):
    result = ()
    for i in tl.static_range(len(x)):
        result = result + (x[i] * factor,)
    return result


@triton.jit
def floor_divide(x, divisor):
    result = ()
    for i in tl.static_range(len(x)):
        result = result + (x[i] // divisor,)
    return result
