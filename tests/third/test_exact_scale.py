"""The UE8M0 exponent of a group against ceil(log2(amax / 448)), decided on integers.

amax = X * 2^(E-150) with a 24-bit X, and 448 = 7 * 2^6. So 2^e >= amax / 448 exactly when X <= 7 * 2^(e + 156 - E):
the least such e is E - 135 for X <= 7 * 2^21, else E - 134, since 7 * 2^20 < 2^23 <= X < 2^24 = 8 * 2^21.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from megaproof.quant import scale
from megaproof.tests.third import exact
from megaproof.tests.third.bits import Source, assert_same_bits, to_float

THRESHOLD = 7 << 21


def ours(bits: np.ndarray) -> np.ndarray:
    return scale.ue8m0_exponent(to_float(bits)).numpy()


def expected(bits: np.ndarray) -> np.ndarray:
    """float32 bits of normal positive values -> e, before it is clamped."""
    field, significand = (bits >> 23).astype(np.int64), (bits & 0x7FFFFF | 0x800000).astype(np.int64)
    return field - 135 + (significand > THRESHOLD)


def test_every_mantissa_of_one_binade() -> None:
    bits = (127 << 23) + np.arange(1 << 23, dtype=np.uint32)
    assert_same_bits(ours(bits), expected(bits), "e of amax in [1, 2)")


def test_every_exponent() -> None:
    """All normal binades, mantissas at both ends, around the threshold and random; e ends at -126 below."""
    random = Source(81).below(1 << 23, 60).astype(np.int64)
    edge = np.arange(-4, 5) + (THRESHOLD - (1 << 23))
    mantissas = np.concatenate([np.arange(4), edge, (1 << 23) - 1 - np.arange(4), random])
    bits = ((np.arange(1, 255)[:, None] << 23) + mantissas).reshape(-1).astype(np.uint32)
    e = expected(bits)
    assert (e.min(), e.max()) == (-134, 120)
    assert_same_bits(ours(bits), e.clip(-126, 126), "e over all binades")


def test_ends() -> None:
    """Zero, subnormals and infinity: the least and the greatest exponent."""
    bits = np.concatenate([[0], Source(82).below(1 << 23, 2000), [1, (1 << 23) - 1]]).astype(np.uint32)
    assert (ours(bits) == -126).all()
    assert ours(np.array([0x7F800000], dtype=np.uint32)).tolist() == [126]


def test_against_fractions() -> None:
    """The integer rule above, and ours, by the definition: 2^(e-1) < amax / 448 <= 2^e."""
    bits = Source(83).floats(20, 254, 2000) & np.uint32(0x7FFFFFFF)
    multiples = np.array([448 * 2.0**k for k in range(-100, 100)], dtype=np.float32).view(np.uint32)
    bits = np.concatenate([bits, multiples - 1, multiples, multiples + 1])
    assert_same_bits(ours(bits), expected(bits), "e")
    for x, e in zip(bits.tolist(), ours(bits).tolist(), strict=True):
        ratio = exact.value(x) / Fraction(448)
        assert exact.power(e - 1) < ratio <= exact.power(e), f"amax {x:#010x}"
