"""The fma atom against one exact rational sum and one rounding (`exact.fma`)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megaproof.quant import atoms
from megaproof.tests.third import exact, fma_cases
from megaproof.tests.third.bits import Source, assert_same_bits, to_bits, to_float

COUNT = 8000


def expected(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.array([exact.fma(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], dtype=np.uint32)


def ours(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return to_bits(atoms.fma(to_float(a), to_float(b), to_float(c)))


BITS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1 << 31, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0xFFC00000]),
)


@settings(max_examples=400)
@given(BITS, BITS, BITS)
@example(0x3F800001, 0x3F7FFFFE, 0x4B800001)  # just below a tie that float64 cannot see
@example(0x00000001, 0x3F000000, 0)  # half the smallest subnormal: to even, +0
@example(0x80000001, 0x3F000000, 0)  # the same, -0: a product that rounds to zero keeps its sign
@example(0x80000000, 0x3F800000, 0x80000000)  # -0 + -0 is -0
@example(0x80000000, 0x3F800000, 0)  # -0 + +0 is +0
@example(0x7F7FFFFF, 0x40000000, 0xFF7FFFFF)  # a product beyond float32, a sum within
@example(0x7F800000, 0, 0x3F800000)  # inf * 0
@example(0x7F800000, 0x3F800000, 0xFF800000)  # inf - inf
def test_one(a: int, b: int, c: int) -> None:
    operands = [np.array([bits], dtype=np.uint32) for bits in (a, b, c)]
    assert_same_bits(ours(*operands), expected(*operands), "fma against fractions")


@pytest.mark.parametrize("family", fma_cases.FAMILIES)
def test_families(family: str) -> None:
    operands = fma_cases.FAMILIES[family](Source(41), COUNT)
    assert_same_bits(ours(*operands), expected(*operands), f"fma against fractions, {family}")
