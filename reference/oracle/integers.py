"""Exact arithmetic on arrays of integers: n * 2^e with n int64, and the roundings that a lattice case still has.

Every function refuses, naming what broke, rather than round where the kernel must not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaproof.reference.oracle.decode import Refused

Ints = NDArray[np.int64]
FP32_BITS, BF16_BITS, E4M3_BITS = 24, 8, 4
"""Significant bits of the formats."""
SAFE_EXPONENT = 100
"""Magnitudes stay within 2^+-100, far from the ends of float32, so exponents need no further care."""


class NotLattice(Refused):
    """The input is not of the lattice family: some step before the two BF16 roundings would round."""


class Scaled(NamedTuple):
    """n * 2^e: one exponent for a whole array."""

    n: Ints
    e: int


def require(condition: bool | np.bool_ | NDArray[np.bool_], what: str) -> None:
    """Raises `NotLattice` unless the condition holds everywhere."""
    if not np.all(condition):
        raise NotLattice(f"not a lattice input: {what}")


def bit_length(n: Ints) -> Ints:
    """Bits of |n|; 0 for 0."""
    m = np.abs(n)
    for shift in (1, 2, 4, 8, 16, 32):
        m = m | m >> shift
    return np.bitwise_count(m).astype(np.int64)


def trailing_zeros(n: Ints) -> Ints:
    """Zero bits below the lowest set bit; not meaningful for 0."""
    return np.bitwise_count((n & -n) - 1).astype(np.int64)


def significant_bits(n: Ints) -> Ints:
    """Bits from the highest to the lowest set one; 0 or less for 0."""
    return bit_length(n) - trailing_zeros(n)


def align(n: Ints, e: Ints | int, what: str) -> Scaled:
    """n * 2^e with an exponent for each element (broadcast) -> the same values on one exponent."""
    e = np.broadcast_to(np.asarray(e, dtype=np.int64), n.shape)
    least = int(e.min(where=n != 0, initial=SAFE_EXPONENT)) if np.any(n) else 0
    shift = np.where(n != 0, e - least, 0)
    require(abs(least) <= SAFE_EXPONENT, f"{what}: exponent {least} is outside +-{SAFE_EXPONENT}")
    require(bit_length(n) + shift <= 62, f"{what}: values too far apart for 62-bit integers")
    scaled = Scaled(n << shift, least)
    require(bit_length(scaled.n) + least <= SAFE_EXPONENT, f"{what}: magnitude above 2^{SAFE_EXPONENT}")
    return scaled


def running_sum(terms: Scaled, what: str) -> Scaled:
    """Sum along the last axis from the left; every partial sum must be exact in float32."""
    require(bit_length(terms.n).max(initial=0) + terms.n.shape[-1].bit_length() <= 62, f"{what}: 62-bit overflow")
    partial = np.cumsum(terms.n, axis=-1, dtype=np.int64)
    require(significant_bits(partial) <= FP32_BITS, f"{what}: a partial sum has more than {FP32_BITS} significant bits")
    return Scaled(partial[..., -1], terms.e)


def multiply(a: Scaled, b: Scaled, what: str) -> Scaled:
    """The product, which must be exact in float32."""
    require(bit_length(a.n) + bit_length(b.n) <= 62, f"{what}: 62-bit overflow")
    product = align(a.n * b.n, a.e + b.e, what)
    require(significant_bits(product.n) <= FP32_BITS, f"{what}: a product has more than {FP32_BITS} significant bits")
    return product


def round_bf16(value: Scaled) -> Scaled:
    """To 8 significant bits, nearest even: on the integers."""
    magnitude = np.abs(value.n)
    drop = (bit_length(magnitude) - BF16_BITS).clip(min=0)
    kept, rest = magnitude >> drop, magnitude & ((np.int64(1) << drop) - 1)
    half = (np.int64(1) << drop) >> 1
    up = (drop > 0) & ((rest > half) | ((rest == half) & (kept & 1 == 1)))
    return Scaled(np.sign(value.n) * ((kept + up) << drop), value.e)


def bf16_bits(value: Scaled) -> NDArray[np.int16]:
    """Bit patterns of values that are exact in BF16; zero is +0."""
    magnitude = np.abs(value.n)
    length = bit_length(magnitude)
    significand = np.where(
        length > BF16_BITS, magnitude >> (length - BF16_BITS).clip(min=0), magnitude << (BF16_BITS - length).clip(min=0)
    )
    field = value.e + length - 1 + 127
    bits = (value.n < 0).astype(np.int64) << 15 | field << 7 | significand & 0x7F
    return np.where(value.n == 0, 0, bits).astype(np.uint16).view(np.int16)
