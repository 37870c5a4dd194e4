"""Maps of points, the links of a chain: where a normalised point goes; below each, the way back.

A link has one of two forms. With a few numbers per map, theta, a tuple of scalars:

    f(theta, v)           point v → point
    f_vjp(theta, v, g)    gradient g of that point → gradients of theta and of v, lane by lane

This is what a user registers. With a table of any length, or a field, it reads as it goes:

    f(table, v, …)           with TANGENT, its part that is linear in the table, without the rest
    f_vjp(table, v, g, …)    adds the gradients of the table, summed over lanes, and returns that of v

A table is (numbers, their gradient, sizes, field, the field's gradient, held numbers): pointers to this map's own, a
field with its strides and size, x first; held are the map's numbers also where `numbers` are a
tangent of them. Points are tuples of lanes, normalised to [-1, 1] on the image.
Far away is _FAR: out of bounds for whatever comes next.
"""

import triton
import triton.language as tl

from . import tuples
from .coordinates import middle, offset, pixels_per_unit
from .interpolation import product, product_vjp
from .matrix import divide, divide_vjp, rows, rows_vjp

_FAR = tl.constexpr(2.0**20)


@triton.jit
def affine(theta, v):
    """theta, (d, d+1)."""
    return rows(theta, v)


@triton.jit
def affine_vjp(theta, v, g):
    return rows_vjp(g, v), _transposed(theta, g, len(v))


@triton.jit
def projective(theta, v):
    """A homogeneous matrix, (d+1, d+1); at or behind infinity, far away."""
    _inverse, y, ahead = divide(theta, v)
    result = ()
    for a in tl.static_range(len(v)):
        result = result + (tl.where(ahead, y[a], _FAR),)
    return result


@triton.jit
def projective_vjp(theta, v, g):
    inverse, y, ahead = divide(theta, v)
    grad_rows = divide_vjp(inverse, y, ahead, g)
    return rows_vjp(grad_rows, v), _transposed(theta, grad_rows, len(v))


@triton.jit
def _transposed(theta, g, dims: tl.constexpr):
    """Gradient g of each row's number → that of the point."""
    result = ()
    for b in tl.static_range(dims):
        s = theta[b] * g[0]
        for a in tl.static_range(1, len(g)):
            s += theta[a * (dims + 1) + b] * g[a]
        result = result + (s,)
    return result


@triton.jit
def thin_plate(table, v, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
               INDEX: tl.constexpr, TANGENT: tl.constexpr):  # fmt: skip
    """K target points (K, 2), their weights (K, 2) and an affine part (3, 2): 1, x, y."""
    knots = table[2][0]
    weights = table[0] + 2 * knots
    plane = weights + 2 * knots
    x = tl.load(plane).to(COMPUTE) + tl.load(plane + 2).to(COMPUTE) * v[0] + tl.load(plane + 4).to(COMPUTE) * v[1]
    y = tl.load(plane + 1).to(COMPUTE) + tl.load(plane + 3).to(COMPUTE) * v[0] + tl.load(plane + 5).to(COMPUTE) * v[1]
    for k in range(knots):
        u, _slope, _dx, _dy = _bend(table[5] + 2 * k, v, COMPUTE)
        x += tl.load(weights + 2 * k).to(COMPUTE) * u
        y += tl.load(weights + 2 * k + 1).to(COMPUTE) * u
    return (x, y)


@triton.jit
def thin_plate_vjp(table, v, g, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
                   INDEX: tl.constexpr, NEED_POINT: tl.constexpr):  # fmt: skip
    knots = table[2][0]
    weights = table[0] + 2 * knots
    plane = weights + 2 * knots
    grad_weights = table[1] + 2 * knots
    grad_plane = grad_weights + 2 * knots
    grad_v = (tl.zeros_like(v[0]), tl.zeros_like(v[0]))
    for a in tl.static_range(2):
        _add(grad_plane + a, g[a])
        _add(grad_plane + 2 + a, g[a] * v[0])
        _add(grad_plane + 4 + a, g[a] * v[1])
    if NEED_POINT:
        x = tl.load(plane + 2).to(COMPUTE) * g[0] + tl.load(plane + 3).to(COMPUTE) * g[1]
        y = tl.load(plane + 4).to(COMPUTE) * g[0] + tl.load(plane + 5).to(COMPUTE) * g[1]
        grad_v = (x, y)
    for k in range(knots):
        u, slope, dx, dy = _bend(table[5] + 2 * k, v, COMPUTE)
        _add(grad_weights + 2 * k, g[0] * u)
        _add(grad_weights + 2 * k + 1, g[1] * u)
        if NEED_POINT:
            wg = tl.load(weights + 2 * k).to(COMPUTE) * g[0] + tl.load(weights + 2 * k + 1).to(COMPUTE) * g[1]
            grad_v = (grad_v[0] + wg * slope * dx, grad_v[1] + wg * slope * dy)
    return grad_v


@triton.jit
def _bend(target, v, COMPUTE: tl.constexpr):
    """The plate's bending r² log r² about a target point, its slope by r²/2, and the way there."""
    dx = v[0] - tl.load(target).to(COMPUTE)
    dy = v[1] - tl.load(target + 1).to(COMPUTE)
    square = dx * dx + dy * dy
    log = tl.log(tl.where(square > 0, square, 1.0))
    return square * log, tl.where(square > 0, 2 * (log + 1), 0.0), dx, dy


@triton.jit
def free_form(table, v, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
              INDEX: tl.constexpr, TANGENT: tl.constexpr):  # fmt: skip
    """A lattice, (*lattice_size, d), of displacements: uniform cubic B-splines."""
    dims: tl.constexpr = len(v)
    s, i, _inner = _cells(table, v)
    moved = tuples.zeros(dims, v[0].shape, COMPUTE)
    for tap in range(4**dims):
        at, weights, _slopes = _tap(table, s, i, tap, False)
        moved = tuples.add(moved, tuples.scale(_vector(table[0] + at * dims, 1, dims, mask, COMPUTE), product(weights)))
    if TANGENT:
        return moved
    else:
        return tuples.add(v, moved)


@triton.jit
def free_form_vjp(table, v, g, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
                  INDEX: tl.constexpr, NEED_POINT: tl.constexpr):  # fmt: skip
    dims: tl.constexpr = len(v)
    sizes = table[2]
    s, i, inner = _cells(table, v)
    # The tile's lanes touch few control points, the same ones: each is summed over lanes, and added once.
    count = tl.max(mask.to(tl.int32))
    lows = ()
    spans = ()
    for a in tl.static_range(dims):
        low = tl.min(tl.where(mask, i[a], 2**30))
        span = tl.max(tl.where(mask, i[a], -1)) + 4 - low
        lows = lows + (low,)
        spans = spans + (span,)
        count *= tl.where(span > 0, span, 0)
    for number in range(count):
        rest = number
        at = 0
        step = 1
        weight = tl.where(mask, 1.0, 0.0).to(COMPUTE)
        for a in tl.static_range(dims):
            c = lows[a] + rest % spans[a]
            rest = rest // spans[a]
            at += c * step
            step *= sizes[a]
            near = (c >= i[a]) & (c <= i[a] + 3)
            weight *= tl.where(near, _spline(s[a] + 1 - c), 0.0)
        for a in tl.static_range(dims):
            _add(table[1] + at * dims + a, g[a] * weight)
    if NEED_POINT:
        grad_s = tuples.zeros(dims, v[0].shape, COMPUTE)
        for tap in range(4**dims):
            at, weights, slopes = _tap(table, s, i, tap, True)
            along = _dot(g, _vector(table[0] + at * dims, 1, dims, mask, COMPUTE))
            grad_s = tuples.add(grad_s, product_vjp(weights, slopes, along))
        grad_v = ()
        for a in tl.static_range(dims):
            per_unit = tl.cast(sizes[a] - 3, COMPUTE) * 0.5
            grad_v = grad_v + (g[a] + tl.where(inner[a], grad_s[a] * per_unit, 0.0),)
        return grad_v
    else:
        return g


@triton.jit
def _cells(table, v):
    """Along each axis the place in cells, the first control point there, and whether it is within the lattice:
    beyond, the displacement is the border's.
    """
    places = ()
    cells = ()
    inner = ()
    for a in tl.static_range(len(v)):
        cells_along = tl.cast(table[2][a] - 3, v[a].dtype)
        s = (v[a] + 1) * (cells_along * 0.5)
        inner = inner + ((s >= 0) & (s <= cells_along),)
        s = tl.where(s > 0, tl.where(s < cells_along, s, cells_along), 0.0)  # NaN becomes 0
        i = tl.where(s < cells_along, tl.floor(s), cells_along - 1).to(tl.int32)
        places = places + (s,)
        cells = cells + (i,)
    return places, cells, inner


@triton.jit
def _tap(table, s, i, tap, SLOPES: tl.constexpr):
    """One of the 4 ** d control points about each lane: its number, its weight along each axis and, if asked for, the
    slopes of these.
    """
    at = tl.zeros_like(i[0])
    step = 1
    weights = ()
    slopes = ()
    for a in tl.static_range(len(s)):
        c = i[a] + tap % 4
        tap = tap // 4
        at += c * step
        step *= table[2][a]
        weights = weights + (_spline(s[a] + 1 - c),)
        if SLOPES:
            slopes = slopes + (_spline_slope(s[a] + 1 - c),)
    return at, weights, slopes


@triton.jit
def _spline(x):
    """The cubic B-spline, at most 2 from its middle."""
    d = tl.abs(x)
    outer = 2 - d
    return tl.where(d <= 1, (0.5 * d - 1) * d * d + 2 / 3, outer * outer * outer / 6)


@triton.jit
def _spline_slope(x):
    d = tl.abs(x)
    outer = 2 - d
    return tl.where(x < 0, -1.0, 1.0) * tl.where(d <= 1, (1.5 * d - 2) * d, -0.5 * outer * outer)


@triton.jit
def piecewise_affine(table, v, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
                     INDEX: tl.constexpr, TANGENT: tl.constexpr):  # fmt: skip
    """T triangles: a matrix (3, 3) from (x, y, 1) to barycentric coordinates, and the source points (3, 2)."""
    outside = 0.0 if TANGENT else _FAR
    x = tl.full(v[0].shape, outside, COMPUTE)
    y = tl.full(v[0].shape, outside, COMPUTE)
    free = v[0] == v[0]
    for t in range(table[2][0]):
        shares, here = _triangle(table[5] + 15 * t, v, free, COMPUTE)
        corners = table[0] + 15 * t + 9
        x_here = tl.zeros_like(v[0])
        y_here = tl.zeros_like(v[0])
        for k in tl.static_range(3):
            x_here += shares[k] * tl.load(corners + 2 * k).to(COMPUTE)
            y_here += shares[k] * tl.load(corners + 2 * k + 1).to(COMPUTE)
        x = tl.where(here, x_here, x)
        y = tl.where(here, y_here, y)
        free = free & (here == 0)
    return (x, y)


@triton.jit
def piecewise_affine_vjp(table, v, g, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
                         INDEX: tl.constexpr, NEED_POINT: tl.constexpr):  # fmt: skip
    free = v[0] == v[0]
    grad_x = tl.zeros_like(v[0])
    grad_y = tl.zeros_like(v[0])
    for t in range(table[2][0]):
        triangle = table[0] + 15 * t
        shares, here = _triangle(triangle, v, free, COMPUTE)
        for k in tl.static_range(3):
            for a in tl.static_range(2):
                _add(table[1] + 15 * t + 9 + 2 * k + a, tl.where(here, g[a] * shares[k], 0.0))
            if NEED_POINT:
                corner = triangle + 9 + 2 * k
                along = g[0] * tl.load(corner).to(COMPUTE) + g[1] * tl.load(corner + 1).to(COMPUTE)
                grad_x += tl.where(here, along * tl.load(triangle + 3 * k).to(COMPUTE), 0.0)
                grad_y += tl.where(here, along * tl.load(triangle + 3 * k + 1).to(COMPUTE), 0.0)
        free = free & (here == 0)
    return (grad_x, grad_y)


@triton.jit
def _triangle(matrix, v, free, COMPUTE: tl.constexpr):
    """Barycentric coordinates, and the lanes that are in this triangle and in none before it."""
    shares = ()
    here = free
    for k in tl.static_range(3):
        row = matrix + 3 * k
        share = tl.load(row).to(COMPUTE) * v[0] + tl.load(row + 1).to(COMPUTE) * v[1] + tl.load(row + 2).to(COMPUTE)
        here = here & (share >= -1e-6)  # no gap between neighbours: either of them will do there
        shares = shares + (share,)
    return shares, here


@triton.jit
def linear_basis(table, v, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
                 INDEX: tl.constexpr, TANGENT: tl.constexpr):  # fmt: skip
    """Coefficients (d, B) of a basis, (*size, B): B numbers for each output pixel."""
    dims: tl.constexpr = len(v)
    count = table[2][0]
    at = offset(p, table[3][1], INDEX)
    result = tuples.zeros(dims, v[0].shape, COMPUTE)
    for b in range(count):
        basis = tl.load(table[3][0] + at + b * table[3][1][dims], mask=mask, other=0.0).to(COMPUTE)
        result = tuples.add(result, tuples.scale(_vector(table[0] + b, count, dims, None, COMPUTE), basis))
    return result


@triton.jit
def linear_basis_vjp(table, v, g, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
                     INDEX: tl.constexpr, NEED_POINT: tl.constexpr):  # fmt: skip
    dims: tl.constexpr = len(v)
    count = table[2][0]
    at = offset(p, table[3][1], INDEX)
    for b in range(count):
        basis = tl.load(table[3][0] + at + b * table[3][1][dims], mask=mask, other=0.0).to(COMPUTE)
        along = tl.zeros_like(g[0])
        for a in tl.static_range(dims):
            _add(table[1] + a * count + b, g[a] * basis)
            along += g[a] * tl.load(table[0] + a * count + b).to(COMPUTE)
        if len(table[4]) > 0:
            tl.atomic_add(
                table[4][0] + offset(p, table[4][1], INDEX) + b * table[4][1][dims], along, mask=mask, sem="relaxed"
            )
    return g


@triton.jit
def field(table, v, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
          INDEX: tl.constexpr, TANGENT: tl.constexpr):  # fmt: skip
    """A field of points, (*field_size, d), read bilinearly; beyond its border, the border's."""
    dims: tl.constexpr = len(v)
    result = tuples.zeros(dims, v[0].shape, COMPUTE)
    first, fraction, _inner = _field_cells(table, v, ALIGN_CORNERS, COMPUTE)
    for corner in tl.static_range(2**dims):
        index, weights, _slopes = _field_corner(table, first, fraction, corner)
        at = table[3][0] + offset(index, table[3][1], INDEX)
        vector = _vector(at, table[3][1][dims], dims, mask, COMPUTE)
        result = tuples.add(result, tuples.scale(vector, product(weights)))
    return result


@triton.jit
def field_vjp(table, v, g, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
              INDEX: tl.constexpr, NEED_POINT: tl.constexpr):  # fmt: skip
    dims: tl.constexpr = len(v)
    grad_x = tuples.zeros(dims, v[0].shape, COMPUTE)
    first, fraction, inner = _field_cells(table, v, ALIGN_CORNERS, COMPUTE)
    for corner in tl.static_range(2**dims):
        index, weights, slopes = _field_corner(table, first, fraction, corner)
        if len(table[4]) > 0:
            at = table[4][0] + offset(index, table[4][1], INDEX)
            for a in tl.static_range(dims):
                tl.atomic_add(at + a * table[4][1][dims], product(weights) * g[a], mask=mask, sem="relaxed")
        if NEED_POINT:
            vector = _vector(table[3][0] + offset(index, table[3][1], INDEX), table[3][1][dims], dims, mask, COMPUTE)
            grad_x = tuples.add(grad_x, product_vjp(weights, slopes, _dot(g, vector)))
    grad_v = ()
    for a in tl.static_range(dims):
        per_unit = pixels_per_unit(table[3][2][a], ALIGN_CORNERS, COMPUTE)
        grad_v = grad_v + (tl.where(inner[a], grad_x[a] * per_unit, 0.0),)
    return grad_v


@triton.jit
def displacement(table, v, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
                 INDEX: tl.constexpr, TANGENT: tl.constexpr):  # fmt: skip
    """The point, moved by a field of normalised displacements."""
    return tuples.add(v, field(table, v, p, mask, input_size, ALIGN_CORNERS, COMPUTE, INDEX, TANGENT))


@triton.jit
def displacement_vjp(table, v, g, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
                     INDEX: tl.constexpr, NEED_POINT: tl.constexpr):  # fmt: skip
    return tuples.add(g, field_vjp(table, v, g, p, mask, input_size, ALIGN_CORNERS, COMPUTE, INDEX, NEED_POINT))


@triton.jit
def pixel_displacement(table, v, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
                       INDEX: tl.constexpr, TANGENT: tl.constexpr):  # fmt: skip
    """The same by displacements in pixels of the input."""
    moved = field(table, v, p, mask, input_size, ALIGN_CORNERS, COMPUTE, INDEX, TANGENT)
    return tuples.add(v, _in_units(moved, input_size, ALIGN_CORNERS, COMPUTE))


@triton.jit
def pixel_displacement_vjp(table, v, g, p, mask, input_size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr,
                           INDEX: tl.constexpr, NEED_POINT: tl.constexpr):  # fmt: skip
    moved = _in_units(g, input_size, ALIGN_CORNERS, COMPUTE)
    return tuples.add(g, field_vjp(table, v, moved, p, mask, input_size, ALIGN_CORNERS, COMPUTE, INDEX, NEED_POINT))


@triton.jit
def _in_units(x, size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """Pixels of an image → normalised units; gradients of these → of pixels."""
    result = ()
    for a in tl.static_range(len(x)):
        result = result + (x[a] / pixels_per_unit(size[a], ALIGN_CORNERS, COMPUTE),)
    return result


@triton.jit
def _field_cells(table, v, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """Along each axis the first of the two pixels, the share of the second, and whether within the border."""
    first = ()
    fraction = ()
    inner = ()
    for a in tl.static_range(len(v)):
        size = table[3][2][a]
        last = tl.cast(size - 1, COMPUTE)
        x = v[a] * pixels_per_unit(size, ALIGN_CORNERS, COMPUTE) + middle(size, COMPUTE)
        inner = inner + ((x > 0) & (x < last),)
        x = tl.where(x > 0, tl.where(x < last, x, last), 0.0)  # NaN becomes 0
        below = tl.floor(x)
        first = first + (below.to(tl.int32),)
        fraction = fraction + (x - below,)
    return first, fraction, inner


@triton.jit
def _field_corner(table, first, fraction, corner: tl.constexpr):
    """One of the 2 ** d pixels about each lane: where, its weights along each axis, and their slopes per pixel."""
    index = ()
    weights = ()
    slopes = ()
    for a in tl.static_range(len(first)):
        if corner // 2**a % 2 == 0:
            index = index + (first[a],)
            weights = weights + (1 - fraction[a],)
            slopes = slopes + (-1.0,)
        else:
            last = tl.zeros_like(first[a]) + (table[3][2][a] - 1)
            index = index + (tl.minimum(first[a] + 1, last),)
            weights = weights + (fraction[a],)
            slopes = slopes + (1.0,)
    return index, weights, slopes


@triton.jit
def _vector(ptr, stride, LENGTH: tl.constexpr, mask, COMPUTE: tl.constexpr):
    """Some numbers that lie so far apart, 0 where masked."""
    result = ()
    for a in tl.static_range(LENGTH):
        if mask is None:
            result = result + (tl.load(ptr + a * stride).to(COMPUTE),)
        else:
            result = result + (tl.load(ptr + a * stride, mask=mask, other=0.0).to(COMPUTE),)
    return result


@triton.jit
def _dot(x, y):
    result = x[0] * y[0]
    for a in tl.static_range(1, len(x)):
        result += x[a] * y[a]
    return result


@triton.jit
def _add(ptr, values):
    tl.atomic_add(ptr, tl.sum(values), sem="relaxed")
