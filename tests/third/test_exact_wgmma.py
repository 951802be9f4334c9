"""The tensor-core atom against `exact.wgmma_element`, which computes with fractions from the specification's text."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megaproof.quant import atoms
from megaproof.tests.third import exact
from megaproof.tests.third.bits import Source, assert_same_bits, to_bits, to_float


def ours(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Row by row: uint8 [n,32], uint8 [n,32], uint32 [n] -> uint32 [n]."""
    d = atoms.wgmma_e4m3(torch.from_numpy(a)[:, None], torch.from_numpy(b)[:, None], to_float(c)[:, None, None])
    return to_bits(d)[:, 0, 0]


def expected(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    return np.array([exact.wgmma_element(*row) for row in rows], dtype=np.uint32)


def codes(data: bytes) -> np.ndarray:
    return np.array(list(data), dtype=np.uint8).reshape(1, 32)


C_BITS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.builds(
        lambda sign, e, m: sign << 31 | e << 23 | m, st.booleans(), st.integers(100, 150), st.integers(0, 2**23 - 1)
    ),
    st.builds(lambda sign, m: sign << 31 | m, st.booleans(), st.integers(0, 2**24 - 1)),
    st.sampled_from([0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFF800001, 0x7F7FFFFF, 0x00800000]),
)
ANY_CODES = st.binary(min_size=32, max_size=32)
OPERAND = st.one_of(ANY_CODES.map(lambda data: bytes(code & 0xBF for code in data)), ANY_CODES)
"""32 codes: magnitudes below 2 (no NaN), or anything."""
NONE = bytes(32)


@settings(max_examples=300)
@given(OPERAND, OPERAND, C_BITS)
@example(NONE, NONE, 1)  # a subnormal accumulator alone: 13 fraction bits of 2^-126
@example(NONE, NONE, 0x807FFFFF)
@example(b"\x80" * 32, b"\x38" * 32, 1 << 31)  # only negative zeros: +0
@example(b"\x01" + bytes(31), b"\x01" + bytes(31), 0)  # the smallest product, 2^-18
@example(b"\x7e" * 32, b"\x7e" * 32, 0x7F7FFFFF)  # the largest products beside the largest accumulator
@example(b"\x7e" * 32, b"\xfe" * 32, 0x4B800000)
@example(b"\x7f" + bytes(31), NONE, 0x7F800000)  # NaN wins over an infinite accumulator, even times zero
def test_one_element(a: bytes, b: bytes, c: int) -> None:
    operands = codes(a), codes(b), np.array([c], dtype=np.uint32)
    assert_same_bits(ours(*operands), expected(*operands), "wgmma against fractions")


def test_many_elements() -> None:
    """3,000 outputs: realistic operands with C near them, all codes with C anywhere, sparse ones with subnormal C."""
    n, s = 1000, Source(31)
    sparse = np.where(s.below(40, n, 32) == 0, s.codes(n, 32), np.uint8(0))
    a = np.concatenate([s.narrow_codes(n, 32), s.words(n, 32).astype(np.uint8), sparse])
    b = np.concatenate([s.narrow_codes(n, 32), s.codes(n, 32), s.codes(n, 32)])
    c = np.concatenate([s.floats(118, 142, n), s.floats(0, 255, n), s.floats(0, 1, n)])
    assert_same_bits(ours(a, b, c), expected(a, b, c), "wgmma against fractions")


def test_chain_of_four_steps() -> None:
    s = Source(32)
    a, b = s.narrow_codes(12, 128), s.codes(8, 128)
    d = to_bits(atoms.wgmma_chain(torch.from_numpy(a), torch.from_numpy(b)))
    for i in range(a.shape[0]):
        for j in range(b.shape[0]):
            c = 0
            for k in range(0, 128, 32):
                c = exact.wgmma_element(a[i, k : k + 32].tolist(), b[j, k : k + 32].tolist(), c)
            assert int(d[i, j]) == c, (i, j)
