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


@triton.jit
def divide(matrix, u):
    """A matrix with a last row for the divisor → that one's inverse, the quotients, and what is ahead of infinity."""
    dims: tl.constexpr = len(u)
    products = rows(matrix, u)
    ahead = products[dims] > 1e-30
    inverse = 1.0 / tl.where(ahead, products[dims], 1.0)
    y = ()
    for a in tl.static_range(dims):
        y = y + (products[a] * inverse,)
    return inverse, y, ahead


@triton.jit
def divide_vjp(inverse, y, ahead, g):
    """Gradients of the quotients → of the products, the divisor's last; none at or behind infinity."""
    result = ()
    last = tl.zeros_like(inverse)
    for a in tl.static_range(len(y)):
        row = tl.where(ahead, g[a] * inverse, 0.0)
        result = result + (row,)
        last -= row * y[a]
    return result + (last,)
