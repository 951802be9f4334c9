"""The readable special-function unit by its contract: every special input, and the table behind each result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaproof.quant import atoms, tables
from megaproof.quant.formats import f32_bits, f32_from_bits
from megaproof.tests.support.bit_patterns import INF, MINUS, NAN, assert_same, bits, floats, specials

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
