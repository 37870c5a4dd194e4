"""Quotients of indices by sizes that the host knows: a product and a shift, where a GPU's own division takes some
twenty instructions and as many steps one after another.

For a divisor d, s = ⌈log2 d⌉ and the multiplier ⌊2^32 (2^s - d) / d⌋ + 1, the quotient of an n below 2^31 is
(high word of n · multiplier + n) >> s (Granlund and Montgomery 1994).
"""

import triton
import triton.language as tl


def divisor(d):
    """A divisor from 1 to 2^31 as kernels take it, one integer: the multiplier in its high word, and 2 s + 1 in its
    low one. So it has more than 32 bits and is odd: Triton compiles for integers of 64 bits, of 1, and of multiples
    of 16 anew.
    """
    shift = max(0, d - 1).bit_length()
    multiplier = (2**32 * (2**shift - d)) // d + 1
    packed = multiplier << 32 | 2 * shift + 1
    return packed - 2**64 if packed >= 2**63 else packed


@triton.jit
def quotient(n, divisor):
    """n // d for 0 <= n < 2^31, a number or a block of them."""
    n = tl.cast(n, tl.uint32)
    high = tl.umulhi(n, (divisor >> 32).to(tl.uint32))
    return ((high + n) >> ((divisor.to(tl.uint32) & 63) >> 1)).to(tl.int32)
