"""Correctly rounded 1/x over [1, 2) and 2^x over [0, 1) for all 2^23 float32 mantissas, by integer arithmetic alone.

Written apart from `quant/tables.py`, whose base it checks; nothing of this project is imported but `exact.py`.
"""

from __future__ import annotations

import functools

import numpy as np

from megaproof.tests.third.exact import SCALE, exp2_fixed

SIZE = 1 << 23
HIGH_BITS, LOW_BITS = 12, 11
FIXED = 60
"""Fraction bits of the lower bounds of 2^x."""
SLACK = 1 << 19
"""2^x lies in [bound, bound + SLACK), in units of 2^-FIXED: 2^-18 of a unit in the last place of float32."""


@functools.cache
def reciprocal() -> np.ndarray:
    """int64 [2^23]: float32 bits of 1/(1 + i/2^23), nearest. A tie cannot occur: 2^48 / X is no odd integer."""
    x = np.arange(SIZE, 2 * SIZE, dtype=np.int64)
    units = ((1 << 47) + (x >> 1)) // x  # of 2^-24, so 2^24 for 1/1
    return (126 << 23) + units - SIZE  # 2^23 units are 0.5; 2^24 carry into the exponent of 1.0


def reciprocal_error(bits: np.ndarray) -> float:
    """Largest |T - 1/x| in units of 2^-24 (the unit in the last place of the results below 1). bits: int64 [2^23]."""
    x = np.arange(SIZE, 2 * SIZE, dtype=np.int64)
    units = bits.astype(np.int64) - (126 << 23) + SIZE
    return float((np.abs(units * x - (1 << 47)) / x).max())


@functools.cache
def exp2_bounds() -> np.ndarray:
    """int64 [2^23]: lower bounds of 2^(i/2^23) with 60 fraction bits, at most SLACK low.

    2^(i/2^23) = h * (1 + d) with h of the upper 12 bits of i and d of the lower 11; H and D are their 60-bit floors.
    H * D is formed from their upper 31 and 32 bits, which drops under (2^31 + 2^32) / 2^14 units.
    """
    high = np.array([exp2_fixed(i, HIGH_BITS) >> (SCALE - FIXED) for i in range(1 << HIGH_BITS)], dtype=np.int64)
    low = np.array([exp2_fixed(j, 23) - (1 << SCALE) >> (SCALE - FIXED) for j in range(1 << LOW_BITS)], dtype=np.int64)
    return (high[:, None] + ((high[:, None] >> 30) * (low >> 16) >> 14)).reshape(-1)


@functools.cache
def exp2() -> np.ndarray:
    """int64 [2^23]: float32 bits of 2^(i/2^23), nearest. Where the bounds straddle a tie, 200 bits decide."""
    half, shift = 1 << (FIXED - 24), FIXED - 23
    bound = exp2_bounds()
    units = bound + half >> shift
    for i in np.flatnonzero(units != bound + half + SLACK >> shift).tolist():
        fixed = exp2_fixed(i, 23) + (1 << (SCALE - 24))
        units[i] = fixed >> (SCALE - 23)
        if units[i] != fixed + (1 << 10) >> (SCALE - 23):
            raise AssertionError(f"2^({i}/2^23) is too close to a tie for {SCALE} bits")
    return (126 << 23) + units  # 2^23 units are 1.0, whose bits are 127 << 23


def exp2_error(bits: np.ndarray) -> float:
    """Largest |T - 2^x| in units of 2^-23, the unit in the last place of all results. bits: int64 [2^23]."""
    error = ((bits.astype(np.int64) - (126 << 23)) << (FIXED - 23)) - exp2_bounds()
    return float(np.abs(error).max() + SLACK) / 2 ** (FIXED - 23)
