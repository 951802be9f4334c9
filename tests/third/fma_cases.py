"""Operands that separate a fused multiply-add from its imitations: sums on and beside a tie of the float32 result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megaproof.tests.third.bits import Source

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]
"""uint32 [n] bit patterns a, b, c."""


def anything(s: Source, n: int) -> Triple:
    """Every 32-bit pattern alike: NaN, infinities, subnormals, both zeros."""
    return s.words(n), s.words(n), s.words(n)


def alike(s: Source, n: int) -> Triple:
    """Product and addend of about one size."""
    return s.floats(117, 137, n), s.floats(117, 137, n), s.floats(107, 147, n)


def tie_below_c(s: Source, n: int) -> Triple:
    """|a b| is half a unit in the last place of c, times 1 + (i + j) 2^-23 + i j 2^-46 with |i|, |j| <= 3."""
    field = s.below(200, n) + np.uint32(30)
    a = _near_power(s, n, np.full(n, 127, dtype=np.uint32))
    b = _near_power(s, n, field - np.uint32(24))
    return a, b, (s.words(n) & np.uint32(0x807FFFFF)) | field << np.uint32(23)


def tie_in_product(s: Source, n: int) -> Triple:
    """a b is exactly between two float32, and c is 2^-8 to 2^-120 of it: only the sign of c tells where to round."""
    # odd * odd with 25 bits in all; 12-bit and 13-bit factors give 24 or 25, the latter are kept.
    a_odd, b_odd = s.below(1 << 11, 4 * n) << 1 | 1 << 12 | 1, s.below(1 << 11, 4 * n) << 1 | 1 << 12 | 1
    keep = np.flatnonzero((a_odd.astype(np.int64) * b_odd) >> 24 == 1)[:n]
    if len(keep) != n:
        raise AssertionError(f"{len(keep)} products of 25 bits were drawn: {n} are needed")
    a, b = ((odd[keep] << 11 & 0x7FFFFF) | _sign_and_field(s, n, 127) for odd in (a_odd, b_odd))
    return a, b, s.floats(8, 120, n)


def tie_subnormal(s: Source, n: int) -> Triple:
    """Results among the subnormals: a product of 2^-150, half the smallest one, times 1 + small; c subnormal."""
    a = _near_power(s, n, np.full(n, 64, dtype=np.uint32))  # 2^-63
    b = _near_power(s, n, np.full(n, 40, dtype=np.uint32))  # 2^-87
    return a, b, s.words(n) & np.uint32(0x807FFFFF)


def overflow_edge(s: Source, n: int) -> Triple:
    """c is the largest finite value and a b half its unit in the last place, times 1 + small: finite or infinite."""
    a, b = _near_power(s, n, np.full(n, 127, dtype=np.uint32)), _near_power(s, n, np.full(n, 230, dtype=np.uint32))
    return a, b, np.uint32(0x7F7FFFFF) | (s.words(n) & np.uint32(1 << 31))


def cancelling(s: Source, n: int) -> Triple:
    """c is -a b rounded to float32: what is left is the rounding error, or zero."""
    a, b = s.floats(90, 150, n), s.floats(90, 150, n)
    with np.errstate(over="ignore"):
        product = a.view(np.float32) * b.view(np.float32)
    return a, b, (-product).view(np.uint32)


def _sign_and_field(s: Source, n: int, field: int) -> np.ndarray:
    return (s.words(n) & np.uint32(1 << 31)) | np.uint32(field << 23)


def _near_power(s: Source, n: int, field: np.ndarray) -> np.ndarray:
    """±2^(field - 127) moved by -3 to 3 units in the last place."""
    return ((field << np.uint32(23)) + s.below(7, n) - np.uint32(3)) | (s.words(n) & np.uint32(1 << 31))


FAMILIES: dict[str, Callable[[Source, int], Triple]] = {
    f.__name__: f for f in (anything, alike, tie_below_c, tie_in_product, tie_subnormal, overflow_edge, cancelling)
}
