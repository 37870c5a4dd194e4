"""A matrix, row by row a flat tuple, times points: what affine and projective maps share."""

import triton
import triton.language as tl


@triton.jit
def rows(matrix, u):
    """A matrix of len(u) + 1 columns, times (u, 1): one number per row."""
    dims: tl.constexpr = len(u)
    result = ()
    for a in tl.static_range(len(matrix) // (dims + 1)):
        s = matrix[a * (dims + 1) + dims]
        # x comes last: a loop along a row then costs one multiply-add per axis.
        for b in tl.static_range(dims):
            s = tl.fma(matrix[a * (dims + 1) + dims - 1 - b], u[dims - 1 - b], s)
        result = result + (s,)
    return result


@triton.jit
def rows_vjp(g, u):
    gradients = ()
    for a in tl.static_range(len(g)):
        for b in tl.static_range(len(u)):
            gradients = gradients + (g[a] * u[b],)
        gradients = gradients + (g[a],)
    return gradients
