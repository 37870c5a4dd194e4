"""From a tile's lanes to pixel indices, and from normalised units to pixels.

Axes are ordered x first everywhere in the kernels, as in a grid's last dimension. An index is
*centred* when it is measured from the middle of its axis, ``index - (size - 1) / 2``. The middle is
the normalised coordinate 0 under both values of ``align_corners``, so a centred index differs from
a normalised coordinate by a factor alone, and the identity map gives every pixel exactly itself.
"""

import triton
import triton.language as tl

from . import tuples
from .division import quotient


@triton.jit
def middle(size, COMPUTE: tl.constexpr):
    """The pixel index of the normalised coordinate 0."""
    return tl.cast(size - 1, COMPUTE) * 0.5


@triton.jit
def pixels_per_unit(size, ALIGN_CORNERS: tl.constexpr, COMPUTE: tl.constexpr):
    """How many pixels one normalised unit spans."""
    if ALIGN_CORNERS:
        return tl.cast(size - 1, COMPUTE) * 0.5
    else:
        return tl.cast(size, COMPUTE) * 0.5


@triton.jit
def tile_index(tile, lane, size, divisors, BLOCK: tl.constexpr):
    """Pixel indices, x first, of one lane or a block of lanes in a tile, and whether they exist; the divisors divide by
    the counts of tiles along the axes but the last.

    Lanes run along x, then y, then z: a warp of 32 lanes over a block 8 wide covers an 8 × 4 patch.
    """
    index = ()
    mask = lane >= 0
    for axis in tl.static_range(len(BLOCK)):
        left = 0
        if axis < len(BLOCK) - 1:
            left = quotient(tile, divisors[axis])
            tile -= left * _tiles_along(size[axis], BLOCK[axis])
        along = tile * BLOCK[axis] + lane % BLOCK[axis]
        mask = mask & (along < size[axis])
        index = index + (along,)
        tile = left
        lane = lane // BLOCK[axis]
    return index, mask


@triton.jit
def tile_count(size, BLOCK: tl.constexpr):
    """How many tiles cover an image."""
    count = _tiles_along(size[0], BLOCK[0])
    for axis in tl.static_range(1, len(BLOCK)):
        count *= _tiles_along(size[axis], BLOCK[axis])
    return count


@triton.jit
def _tiles_along(size, block: tl.constexpr):
    # Without a sign, the quotient is a shift.
    return ((tl.cast(size, tl.uint32) + (block - 1)) // block).to(tl.int32)


@triton.jit
def centred(index, size, COMPUTE: tl.constexpr):
    """Indices measured from the middle of their axes: what transforms take."""
    result = ()
    for axis in tl.static_range(len(index)):
        result = result + (index[axis].to(COMPUTE) - middle(size[axis], COMPUTE),)
    return result


@triton.jit
def from_finer(v, per_axis):
    """Centred indices of an output of per_axis pixels, along each axis, for one → the same places among these.

    A factor, rounded once, and not a quotient, so that every kernel finds the same place.
    """
    return tuples.scale(v, 1.0 / tl.cast(per_axis, v[0].dtype))


@triton.jit
def offset(index, strides, INDEX: tl.constexpr):
    """Element offset of a pixel within one image."""
    result = index[0].to(INDEX) * strides[0]
    for axis in tl.static_range(1, len(index)):
        result += index[axis].to(INDEX) * strides[axis]
    return result


@triton.jit
def image_start(ptr, n, batch, strides):
    """Where image n begins. A tensor of a smaller batch, not None, serves a larger one over and over: vmap's."""
    if batch is None:
        return ptr + n * strides[0]
    else:
        return ptr + (n % batch) * strides[0]


@triton.jit
def block_offset(pixel, c, strides, INDEX: tl.constexpr):
    """Element offsets of a [pixels, channels] block within an image, whose strides are (n, c, *x first)."""
    return offset(pixel, strides[2:], INDEX)[:, None] + (c.to(INDEX) * strides[1])[None, :]


@triton.jit
def block_mask(mask, c, channels, WHOLE: tl.constexpr):
    """Pixels that are wanted → those of them whose channels exist, which all do if the blocks are whole."""
    if WHOLE:
        return mask[:, None]
    else:
        return mask[:, None] & (c < channels)[None, :]


@triton.jit
def exactly(index):
    """A place as `corner_pointers` takes it: the index itself, and nothing beyond."""
    beyond = ()
    for _ in tl.static_range(len(index)):
        beyond = beyond + (0,)
    return index, beyond


@triton.jit
def corner_pointers(ptr, place, c, strides, INDEX: tl.constexpr):
    """Where a sample's corner lies in an image: an index, and so many pixels beyond it."""
    index, beyond = place
    # In 64 bits and added last it stays apart: corners of one index share an address but for this.
    further = tl.cast(0, tl.int64)
    for axis in tl.static_range(len(beyond)):
        further += tl.cast(beyond[axis], tl.int64) * strides[2 + axis]
    return ptr + block_offset(index, c, strides, INDEX) + further


@triton.jit
def load_block(ptr, place, c, strides, mask, INDEX: tl.constexpr, COMPUTE: tl.constexpr):
    """A [pixels, channels] block of an image, 0 where masked; of corners, or `exactly` of pixels."""
    return tl.load(corner_pointers(ptr, place, c, strides, INDEX), mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def load_fill(fill_ptr, c, channels, COMPUTE: tl.constexpr):
    """What lies outside the image in some channels, [1, channels]."""
    return tl.load(fill_ptr + c, mask=c < channels, other=0.0).to(COMPUTE)[None, :]


@triton.constexpr_function
def lanes(block):
    """How many pixels a tile holds."""
    result = 1
    for size in block:
        result *= size
    return result
