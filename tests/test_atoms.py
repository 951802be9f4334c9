"""The readable atoms by their contracts: hand-computed sums of the tensor core, and every special input."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from quant import atoms, tables
from quant.formats import BF16, E4M3, f32_bits, f32_from_bits
from tests.bit_patterns import NAN, SPECIAL, assert_same, scattered, specials
from tests.third import exact

INF, MINUS = 0x7F800000, 0x80000000


def bits(x: Tensor) -> list[int]:
    return f32_bits(x).reshape(-1).tolist()


def floats(*patterns: int) -> Tensor:
    return f32_from_bits(torch.tensor(patterns))


# --- the tensor core, by hand -----------------------------------------------------------------------------------------

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


U8 = {"dtype": torch.uint8}
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


BAD_CHAINS: dict[str, tuple[Tensor, Tensor, Tensor | None, type[Exception], str]] = {
    "a-dtype": (torch.zeros(2, 32), torch.zeros(3, 32, **U8), None, TypeError, "a is torch.float32"),
    "b-dims": (torch.zeros(2, 32, **U8), torch.zeros(1, 3, 32, **U8), None, TypeError, "b is torch.uint8"),
    "depth": (torch.zeros(2, 48, **U8), torch.zeros(3, 48, **U8), None, ValueError, "depth 48 and 48"),
    "depths": (torch.zeros(2, 32, **U8), torch.zeros(3, 64, **U8), None, ValueError, "depth 32 and 64"),
    "c-shape": (torch.zeros(2, 32, **U8), torch.zeros(3, 32, **U8), torch.zeros(2, 2), ValueError, "c has shape"),
    "c-rows": (torch.zeros(2, 32, **U8), torch.zeros(3, 32, **U8), torch.zeros(1, 3), ValueError, "c has shape"),
    "c-dtype": (
        torch.zeros(2, 32, **U8),
        torch.zeros(3, 32, **U8),
        torch.zeros(2, 3, dtype=torch.int32),
        TypeError,
        "c has dtype",
    ),
}


@pytest.mark.parametrize("bad", BAD_CHAINS)
def test_a_chain_refuses_bad_operands_by_name(bad: str) -> None:
    *operands, error, message = BAD_CHAINS[bad]
    with pytest.raises(error, match=message):
        atoms.wgmma_chain(*operands)


# --- the special-function unit ----------------------------------------------------------------------------------------

FAST, PRECISE = (lambda x: atoms.silu(x, True)), (lambda x: atoms.silu(x, False))
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rcp": atoms.rcp_approx,
    "ex2": atoms.ex2_approx,
    "expf": atoms.expf,
    "silu_fast": FAST,
    "silu_precise": PRECISE,
}
VALUES: dict[str, dict[int, int]] = {
    "rcp": {
        0x00000000: INF,
        0x80000000: MINUS | INF,
        0x00000001: INF,  # a subnormal counts as zero
        0x807FFFFF: MINUS | INF,
        0x00800000: 0x7E800000,  # 2^-126 -> 2^126
        0x3F800000: 0x3F800000,
        0xC0000000: 0xBF000000,
        0x7E800000: 0x00800000,  # 2^126 -> 2^-126, the last result that is not zero
        0x7E800001: 0,
        0xFE800001: MINUS,
        0x7F000000: 0,
        0x7F7FFFFF: 0,
        INF: 0,
        MINUS | INF: MINUS,
    },
    "ex2": {
        0x00000000: 0x3F800000,
        0x80000000: 0x3F800000,
        0x007FFFFF: 0x3F800000,
        0x807FFFFF: 0x3F800000,
        0x33FFFFFF: 0x3F800000,  # below 2^-23: cut to zero, from both sides
        0xB3FFFFFF: 0x3F800000,
        0x3F800000: 0x40000000,
        0xBF800000: 0x3F000000,
        0x42FE0000: 0x7F000000,  # 127
        0x43000000: INF,  # 128
        0xC2FC0000: 0x00800000,  # -126
        0xC2FC0001: 0,  # one step below -126: a subnormal result is zero
        0xC2FE0000: 0,
        0x7F7FFFFF: INF,
        0xFF7FFFFF: 0,
        INF: INF,
        MINUS | INF: 0,
    },
    "expf": {
        0x00000000: 0x3F800000,
        0x80000000: 0x3F800000,
        0x00000001: 0x3F800000,
        0x42B20000: INF,  # 89
        0xC2D00000: 0,  # -104
        0x7F7FFFFF: INF,
        0xFF7FFFFF: 0,
        INF: INF,
        MINUS | INF: 0,
    },
    "silu_fast": {0: 0, MINUS: MINUS, 1: 0, INF: INF, MINUS | INF: NAN, 0x7F7FFFFF: 0x7F7FFFFF, 0xC2B00000: MINUS},
    "silu_precise": {0: 0, MINUS: MINUS, 2: 1, INF: INF, MINUS | INF: NAN, 0x7F7FFFFF: 0x7F7FFFFF, 0xC2C80000: MINUS},
}


@pytest.mark.parametrize(
    ("name", "x"),
    [(name, x) for name, values in VALUES.items() for x in values],
    ids=[f"{name}-{x:#010x}" for name, values in VALUES.items() for x in values],
)
def test_special_value(name: str, x: int) -> None:
    assert [f"{y:#010x}" for y in bits(FUNCTIONS[name](floats(x)))] == [f"{VALUES[name][x]:#010x}"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_nan(name: str) -> None:
    """Any NaN gives 0x7fffffff, nothing else does but what has no value, and every input has a result."""
    x = specials()
    y = FUNCTIONS[name](x)
    assert y.shape == x.shape
    nan = torch.isnan(x)
    assert int(nan.sum()) > 20
    assert set(bits(y[nan])) == {NAN}
    without = (x == -torch.inf) & torch.tensor(name.startswith("silu"))
    assert torch.equal(torch.isnan(y), nan | without)


@pytest.mark.parametrize("name", [*FUNCTIONS, "encode_e4m3", "encode_bf16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_another_dtype_is_refused(name: str, dtype: torch.dtype) -> None:
    function = FUNCTIONS.get(name) or getattr(atoms, name)
    with pytest.raises((TypeError, RuntimeError)):
        function(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_are_kept(name: str) -> None:
    function = FUNCTIONS[name]
    x = torch.linspace(-3, 3, 12).reshape(3, 4)
    assert_same(function(x.t()), function(x).t().contiguous())
    assert function(x[0, 0]).shape == ()
    assert function(x[:0]).shape == (0, 4)


def test_rcp_is_the_table_moved_by_the_exponent() -> None:
    table = tables.load("rcp").to(torch.int64)
    mantissa = torch.arange(0, 1 << 23, 4097)
    for field in (1, 2, 126, 127, 128, 252):
        x = f32_from_bits(field << 23 | mantissa)
        assert torch.equal(f32_bits(atoms.rcp_approx(x)), table[mantissa] + ((127 - field) << 23))
        assert torch.equal(f32_bits(atoms.rcp_approx(-x)), f32_bits(atoms.rcp_approx(x)) | MINUS)


def test_ex2_below_zero_complements_the_fraction() -> None:
    """x = -(n + f / 2^23): 2^(-n-1) * T[0x7fffff - f], the one's complement."""
    table = tables.load("ex2").to(torch.int64)
    f = torch.arange(1, 1 << 23, 4099)
    x = -(1.0 + f.double() / 2**23)
    assert torch.equal(x.float().double(), x)
    assert torch.equal(f32_bits(atoms.ex2_approx(x.float())), table[0x7FFFFF - f] - (2 << 23))


@pytest.mark.parametrize(
    ("name", "low", "high", "sign"), [("rcp", 1.0, 2.0, -1), ("ex2", -3.0, 3.0, 1), ("expf", -87.0, 88.0, 1)]
)
def test_monotone(name: str, low: float, high: float, sign: int) -> None:
    """Steps of 2^-12 of the range: far more than the ulp by which a table may dip."""
    x = torch.linspace(low, high, 4097)
    assert bool((FUNCTIONS[name](x).diff() * sign > 0).all())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_close_to_the_function(name: str) -> None:
    """Within 2^-20 of float64, where the result is normal: the wrong table or exponent is far outside."""
    x = torch.linspace(-80, 80, 8191)
    exactly = {
        "rcp": lambda t: 1 / t,
        "ex2": torch.exp2,
        "expf": torch.exp,
        "silu_fast": lambda t: t * torch.sigmoid(t),
        "silu_precise": lambda t: t * torch.sigmoid(t),
    }[name](x.double())
    error = (FUNCTIONS[name](x).double() / exactly - 1).abs()
    assert float(error[exactly.abs() > 1e-37].max()) < (2.0**-17 if name == "silu_fast" else 2.0**-20)


def test_precise_silu_keeps_what_fast_loses() -> None:
    """At -88 the sigmoid is a subnormal: rcp.approx.ftz drops it, the IEEE division keeps it."""
    x = torch.tensor([-88.0])
    assert bits(FAST(x)) == [MINUS]
    assert -6e-37 < float(PRECISE(x)) < -5e-37


# --- minimum, maximum, fma --------------------------------------------------------------------------------------------

ZERO, ONE, MINUS_ONE = 0, 0x3F800000, 0xBF800000
MINIMA = {
    (ZERO, MINUS): MINUS,
    (MINUS, ZERO): MINUS,
    (ZERO, ZERO): ZERO,
    (MINUS, MINUS): MINUS,
    (ONE, NAN): ONE,
    (0xFF800001, MINUS_ONE): MINUS_ONE,
    (NAN, 0xFFFFFFFF): NAN,
    (INF, ONE): ONE,
    (MINUS | INF, ONE): MINUS | INF,
    (1, 0x80000001): 0x80000001,
}
MAXIMA = MINIMA | {
    (ZERO, MINUS): ZERO,
    (MINUS, ZERO): ZERO,
    (INF, ONE): INF,
    (MINUS | INF, ONE): ONE,
    (1, 0x80000001): 1,
}


@pytest.mark.parametrize(("function", "table"), [(atoms.fmin, MINIMA), (atoms.fmax, MAXIMA)], ids=["fmin", "fmax"])
def test_minimum_and_maximum(function: Callable[[Tensor, Tensor], Tensor], table: dict[tuple[int, int], int]) -> None:
    for (a, b), expected in table.items():
        assert bits(function(floats(a), floats(b))) == [expected], (hex(a), hex(b))
        assert bits(function(floats(b), floats(a))) == [expected], (hex(b), hex(a))


def test_minimum_broadcasts() -> None:
    x = torch.tensor([[1.0, 3.0], [torch.nan, -1.0]])
    assert atoms.fmin(x, torch.tensor(2.0)).tolist() == [[1.0, 2.0], [2.0, -1.0]]
    assert atoms.fmax(torch.tensor(2.0), x).tolist() == [[2.0, 3.0], [2.0, 2.0]]


def test_fma_of_all_special_triples() -> None:
    """Against one exact rational sum and one rounding."""
    chosen = [*(pattern for pattern in SPECIAL[::3]), INF, 0x7F800001, 1]
    chosen += [pattern | MINUS for pattern in chosen]
    triples = torch.tensor(list(product(chosen, chosen, chosen[::2])))
    got = bits(atoms.fma(*(f32_from_bits(column) for column in triples.unbind(1))))
    wrong = [(triple, hex(y)) for triple, y in zip(triples.tolist(), got, strict=True) if y != exact.fma(*triple)]
    assert wrong == []


def test_fma_broadcasts_like_its_expression() -> None:
    a, b, c = torch.arange(6.0).reshape(2, 3), torch.tensor([[2.0], [3.0]]), torch.tensor(1.0)
    assert_same(atoms.fma(a, b, c), a * b + c)


# --- conversions ------------------------------------------------------------------------------------------------------


def test_conversions_are_the_formats() -> None:
    x = scattered(1 << 12, 1)
    assert_same(atoms.encode_e4m3(x), E4M3.encode(x))
    assert_same(atoms.encode_bf16(x), BF16.encode(x).view(torch.bfloat16))
    every = torch.arange(256).to(torch.uint8)
    assert_same(atoms.decode_e4m3(every), E4M3.decode(every))


def test_bf16_round_trips_and_has_one_nan() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    values = atoms.decode_bf16(every)
    assert_same(atoms.encode_bf16(values)[~values.isnan()], every[~values.isnan()])
    assert set(bits(values[values.isnan()])) == {NAN}
    assert set((atoms.encode_bf16(values[values.isnan()]).view(torch.int16)).tolist()) == {0x7FFF}


@pytest.mark.parametrize("encode", [atoms.encode_e4m3, atoms.encode_bf16])
def test_encoding_is_monotone(encode: Callable[[Tensor], Tensor]) -> None:
    codes = encode(f32_from_bits(torch.arange(0, INF + 1, 1021)))
    as_integers = codes.view(torch.int16) if codes.dtype == torch.bfloat16 else codes
    assert bool((as_integers.to(torch.int64).diff() >= 0).all())
