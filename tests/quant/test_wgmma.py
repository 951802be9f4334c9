"""The readable tensor core by its contract: sums worked out by hand, and operands that it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaproof.quant import atoms
from megaproof.quant.formats import E4M3, f32_bits
from megaproof.tests.support.bad_chains import BAD_CHAINS, U8
from megaproof.tests.support.bit_patterns import MINUS, NAN, assert_same, bits, floats

TINY = (2.0**-6, 2.0**-7)
"""A product of 2^-13: the last place of a sum whose largest exponent is 0."""


def code(value: float) -> int:
    found = int(E4M3.encode(torch.tensor([float(value)]))[0])
    assert float(E4M3.decode(torch.tensor([found]))[0]) == value, f"{value} is no E4M3 value"
    return found


def element(pairs: list[tuple[float, float]], c: float | Tensor = 0.0) -> Tensor:
    """One output of one step: the products of `pairs`, the rest of the 32 are 0 * 0, and the accumulator c."""
    padded = pairs + [(0.0, 0.0)] * (32 - len(pairs))
    a, b = (torch.tensor([[code(pair[side]) for pair in padded]], dtype=torch.uint8) for side in (0, 1))
    c = c if isinstance(c, Tensor) else torch.tensor([float(c)])
    return atoms.wgmma_e4m3(a, b, c.reshape(1, 1)).reshape(())


RULES: dict[str, tuple[list[tuple[float, float]], float, float]] = {
    # 1.5 * 1.5 = 2.25 keeps exponent 0, so units of 2^-13 count; as 1.125 * 2^1 they would be lost.
    "products-are-not-normalised": ([(1.5, 1.5), TINY, TINY], 0, 2.25 + 2**-12),
    "exact-products-give-an-exact-sum": ([(1.5, 1.5), (-2, 3), (0.5, 0.25)], 1, 2.25 - 6 + 0.125 + 1),
    # -1.5 units of 2^-13 become -1 unit; flooring would make -2.
    "a-negative-term-is-cut-toward-zero": ([(1, 1), (-1.5 * 2**-6, 2**-7)], 0, 1 - 2**-13),
    "a-positive-term-is-cut-toward-zero": ([(-1, 1), (1.5 * 2**-6, 2**-7)], 0, -1 + 2**-13),
    # 31 terms of 0.75 units each would make 23 units.
    "cut-bits-leave-nothing-behind": ([(1, 1)] + [(1.5 * 2**-6, 2**-8)] * 31, 0, 1.0),
    "no-sticky-bit-below-a-difference": ([(1, 1), (-1.5 * 2**-6, 2**-8)], 0, 1.0),
    # Beside c = 1024 the unit is 2^-3: 32 products of 2^-4 vanish, one by one; added first they would make 2.
    "c-takes-part-in-the-largest-exponent": ([(2**-2, 2**-2)] * 32, 1024, 1024.0),
    "c-is-cut-beside-a-larger-product": ([(16, 16)], 1 + 2**-5 + 2**-6, 257 + 2**-5),
    # One sum of 33 terms: products of the second half are cut by the first half's exponent.
    "one-sum-of-33-not-two-of-17": ([(16, 16)] * 16 + [(2**-3, 2**-3)] * 16, 0, 4096.0),
    # 16 + 15 units has 18 bits, of which the upper 14 stay; 16 units more are the next value.
    "fourteen-significant-bits-stay": ([(1, 1)] * 16 + [TINY] * 15, 0, 16.0),
    "the-fourteenth-bit-counts": ([(1, 1)] * 16 + [TINY] * 16, 0, 16 + 2**-9),
    "fourteen-bits-of-a-negative-sum": ([(-1, 1)] * 16 + [(-TINY[0], TINY[1])] * 15, 0, -16.0),
    # Cancellation: what is left was cut to units of the large terms.
    "cancelled-terms-still-set-the-unit": ([(256, 256), (-256, 256), (2**-3, 2**-3)], 0, 0.0),
    # 448 * 0 has no say in the exponent.
    "a-zero-product-has-no-exponent": ([(448, 0), (0, 448), TINY], 0, 2**-13),
    "a-zero-product-beside-a-small-c": ([(448, 0)], 2.0**-100, 2.0**-100),
    "subnormal-codes-count-in-full": ([(2**-9, 2**-9)], 0, 2**-18),
    # 2^-9 has exponent -6, not -9: beside it the unit is 2^-19.
    "subnormal-codes-are-not-normalised": ([(2**-9, 1)], 2.0**-20, 2**-9),
    "largest-products": ([(448, 448)] * 32, 0, 448 * 448 * 32),
}


@pytest.mark.parametrize("rule", RULES)
def test_tensor_core_rule(rule: str) -> None:
    pairs, c, expected = RULES[rule]
    assert bits(element(pairs, c)) == bits(torch.tensor([float(expected)])), float(element(pairs, c))


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_the_products_does_not_count(rule: str) -> None:
    pairs, c, _ = RULES[rule]
    padded = pairs + [(0.0, 0.0)] * (32 - len(pairs))
    assert bits(element(padded[::-1], c)) == bits(element(padded[7:] + padded[:7], c)) == bits(element(pairs, c))


@pytest.mark.parametrize(
    ("c", "expected"),
    [
        (0x3F800001, 0x3F800000),
        (0x3F8003FF, 0x3F800000),
        (0x3F800400, 0x3F800400),
        (0xBF8007FF, 0xBF800400),
        (0x00000001, 0),
        (0x80000001, 0),
        (0x800003FF, 0),
        (0x007FFFFF, 0x007FFC00),
        (0x80400401, 0x80400400),
        (0x7F7FFFFF, 0x7F7FFC00),
        (0, 0),
        (MINUS, 0),
    ],
    ids=hex,
)
def test_c_alone_is_cut_too(c: int, expected: int) -> None:
    """13 fraction bits of its own exponent, a subnormal's being -126; what is cut to nothing is +0."""
    assert bits(element([], floats(c))) == [expected]
    assert bits(element([(0, -3), (-0.0, 5)], floats(c))) == [expected]


def test_a_zero_sum_is_plus_zero() -> None:
    assert bits(element([(1, 1), (-1, 1)])) == [0]
    assert bits(element([(2, -3)], 6.0)) == [0]
    assert bits(element([(-0.0, 1), (1, -0.0)], floats(MINUS))) == [0]


def test_a_subnormal_c_is_lost_beside_any_product() -> None:
    assert bits(element([(2**-9, 2**-9)], floats(0x007FFFFF))) == bits(torch.tensor(2.0**-18))


@pytest.mark.parametrize("c", [0x7F800001, 0xFFC00000, NAN, 0xFFFFFFFF], ids=hex)
def test_nan_in_c(c: int) -> None:
    assert bits(element([(1, 1)], floats(c))) == [NAN]


@pytest.mark.parametrize("nan_code", [0x7F, 0xFF], ids=hex)
def test_nan_code_spoils_its_row_or_column_only(nan_code: int) -> None:
    """Even times zero, even beside an infinite c."""
    a, b = torch.zeros(3, 32, dtype=torch.uint8), torch.full((4, 32), code(1), dtype=torch.uint8)
    a[1, 17] = nan_code
    c = torch.ones(3, 4)
    c[1, 0] = torch.inf
    d = f32_bits(atoms.wgmma_e4m3(a, b * 0, c))
    assert d[1].tolist() == [NAN] * 4
    assert d[0].tolist() == d[2].tolist() == [0x3F800000] * 4
    assert f32_bits(atoms.wgmma_e4m3(b * 0, a, c.t().contiguous()))[:, 1].tolist() == [NAN] * 4


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_c_comes_back(sign: int) -> None:
    assert float(element([(448, -448)] * 32, sign * math.inf)) == sign * math.inf


def test_chain_feeds_each_result_back() -> None:
    """Beside a sum of 1024 each later product of 2^-4 is lost; before it, 32 of them count."""
    small, large = [code(2**-2)] * 32, [code(32)] + [0] * 31
    late = torch.tensor([large + small], dtype=torch.uint8)
    early = torch.tensor([small + large], dtype=torch.uint8)
    assert atoms.wgmma_chain(late, late).tolist() == [[1024.0]]
    assert atoms.wgmma_chain(early, early).tolist() == [[1026.0]]


def test_chain_is_its_steps() -> None:
    codes = torch.arange(6 * 96).reshape(6, 96).mul(37).remainder(127).to(torch.uint8)
    a, b = codes[:2], codes[2:]
    c = torch.arange(8.0).reshape(2, 4) - 3
    for start in (c, None):
        acc = torch.zeros(2, 4) if start is None else start
        for k in (0, 32, 64):
            acc = atoms.wgmma_e4m3(a[:, k : k + 32], b[:, k : k + 32], acc)
        assert_same(atoms.wgmma_chain(a, b, start), acc)
    assert c.tolist() == [[-3, -2, -1, 0], [1, 2, 3, 4]], "c is not written"


def test_steps_broadcast_over_leading_dimensions() -> None:
    codes = torch.arange(5 * 3 * 32).mul(29).remainder(126).to(torch.uint8).reshape(5, 3, 32)
    c = torch.ones(3, 3)
    together = atoms.wgmma_e4m3(codes, codes[0], c)
    assert_same(together, torch.stack([atoms.wgmma_e4m3(tile, codes[0], c) for tile in codes]))
    assert atoms.wgmma_e4m3(codes[:0], codes[0], c).shape == (0, 3, 3)


BAD_STEPS: dict[str, tuple[Tensor, Tensor, Tensor, type[Exception], str]] = {
    "a-dtype": (torch.zeros(2, 32), torch.zeros(3, 32, **U8), torch.zeros(2, 3), TypeError, "a has dtype"),
    "b-dtype": (torch.zeros(2, 32, **U8), torch.zeros(3, 32), torch.zeros(2, 3), TypeError, "b has dtype"),
    "a-depth": (torch.zeros(2, 64, **U8), torch.zeros(3, 32, **U8), torch.zeros(2, 3), ValueError, "a has depth 64"),
    "b-depth": (torch.zeros(2, 32, **U8), torch.zeros(3, 16, **U8), torch.zeros(2, 3), ValueError, "b has depth 16"),
    "a-dims": (torch.zeros(32, **U8), torch.zeros(3, 32, **U8), torch.zeros(1, 3), ValueError, "a has depth 32, shape"),
    "c-dtype": (
        torch.zeros(2, 32, **U8),
        torch.zeros(3, 32, **U8),
        torch.zeros(2, 3, dtype=torch.float64),
        TypeError,
        "c has dtype",
    ),
    "c-shape": (
        torch.zeros(2, 32, **U8),
        torch.zeros(3, 32, **U8),
        torch.zeros(3, 2),
        ValueError,
        r"c has shape \(3, 2\)",
    ),
}


@pytest.mark.parametrize("bad", BAD_STEPS)
def test_a_step_refuses_bad_operands_by_name(bad: str) -> None:
    *operands, error, message = BAD_STEPS[bad]
    with pytest.raises(error, match=message):
        atoms.wgmma_e4m3(*operands)


SMALLER = {
    "c-columns": (torch.zeros(2, 32, **U8), torch.zeros(3, 32, **U8), torch.zeros(2, 2), ValueError, "c has shape"),
    "c-rows": (torch.zeros(2, 32, **U8), torch.zeros(3, 32, **U8), torch.zeros(1, 3), ValueError, "c has shape"),
}
"""Accumulators that a readable chain might repeat; a twin that did not look would read past their end."""


@pytest.mark.parametrize("bad", BAD_CHAINS | SMALLER)
def test_a_chain_refuses_bad_operands_by_name(bad: str) -> None:
    *operands, error, message = (BAD_CHAINS | SMALLER)[bad]
    with pytest.raises(error, match=message):
        atoms.wgmma_chain(*operands)
