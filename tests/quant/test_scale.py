"""amax -> scale factor, by the definition and on every mantissa."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from megaproof.quant import scale
from megaproof.quant.formats import f32_bits, f32_from_bits, pow2

INF = 0x7F800000
THRESHOLD = 0x600000
"""Mantissa of 448 = 1.75 * 2^8: the exponent steps up just above it."""


def from_bits(*bits: int) -> Tensor:
    return f32_from_bits(torch.tensor(bits))


def assert_least_power(amax: Tensor, e: Tensor) -> None:
    """2^(e-1) * 448 < amax <= 2^e * 448, in float64, where both products are exact."""
    amax = amax.double()
    bound = 448.0 * torch.ldexp(torch.ones_like(amax), e)
    wrong = (amax > bound) | (amax * 2 <= bound)
    assert not bool(wrong.any()), f"{int(wrong.sum())} wrong, first amax = {float(amax[wrong][0]).hex()}"


def test_reciprocal_is_the_rounded_one() -> None:
    bits = scale.RECIPROCAL_448_BITS
    value = Fraction(float(from_bits(bits)[0]))
    neighbours = [Fraction(float(from_bits(bits + step)[0])) for step in (-1, 1)]
    error = abs(value - Fraction(1, 448))
    assert all(error < abs(neighbour - Fraction(1, 448)) for neighbour in neighbours)


def test_amax_over_448_is_a_multiplication() -> None:
    """A division, the other way to write it, differs in more than half of a binade: the choice is real."""
    amax = f32_from_bits((127 << 23) + torch.arange(0, 1 << 23, 8))
    product = scale.amax_over_448(amax)
    exact = amax.double() * float(from_bits(scale.RECIPROCAL_448_BITS)[0])  # 48 bits
    assert torch.equal(product, exact.float())
    assert 0.5 < float((product != amax / 448.0).double().mean()) < 0.6


def test_exponent_of_every_mantissa() -> None:
    for chunk in torch.arange(1 << 23).split(1 << 21):
        amax = f32_from_bits((130 << 23) + chunk)
        assert_least_power(amax, scale.ue8m0_exponent(amax))


def test_exponent_at_the_edges_of_every_binade() -> None:
    mantissa = torch.tensor([0, 1, THRESHOLD - 1, THRESHOLD, THRESHOLD + 1, (1 << 23) - 1])
    amax = f32_from_bits((torch.arange(9, 255)[:, None] << 23 | mantissa).reshape(-1))
    e = scale.ue8m0_exponent(amax)
    inside = e > -126
    assert_least_power(amax[inside], e[inside])
    assert bool((amax[~inside].double() <= 448 * 2.0**-126).all()), "clamped below only where 2^-126 is enough"
    assert int(inside.sum()) > 240 * len(mantissa)


@pytest.mark.parametrize(
    ("bits", "e"),
    [(0, -126), (1, -126), (0x7FFFFF, -126), (0x00800000, -126), (0x43E00000, 0), (0x43E00001, 1), (INF, 126)],
    ids=["zero", "least-subnormal", "largest-subnormal", "least-normal", "448", "above-448", "inf"],
)
def test_exponent_of_special_values(bits: int, e: int) -> None:
    assert scale.ue8m0_exponent(from_bits(bits)).tolist() == [e]


def test_largest_finite_amax() -> None:
    e = scale.ue8m0_exponent(from_bits(INF - 1))
    assert e.tolist() == [120]


# --- activation scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_group", ["clamp", "public"])
def test_ue8m0_stores_the_power_and_multiplies_by_its_inverse(zero_group: str) -> None:
    amax = torch.cat([f32_from_bits(torch.arange(1, 255) << 23 | 0x654321), from_bits(INF)])
    stored, factor = scale.activation_scale(amax, "ue8m0", zero_group)
    assert bool((f32_bits(stored) & 0x807FFFFF == 0).all())
    product = stored.double() * factor.double()
    alive = stored != 0
    assert torch.equal(product[alive], torch.ones_like(product[alive]))
    assert torch.equal(alive, torch.ones_like(alive) if zero_group == "clamp" else scale.amax_over_448(amax) != 0)


def test_a_zero_group_under_both_rules() -> None:
    """The default stores 2^-126, the public kernel 0; what the values are multiplied with is the same."""
    amax = from_bits(0, 1, 200, 0x3F800000)
    ours, public = (scale.activation_scale(amax, "ue8m0", rule) for rule in ("clamp", "public"))
    assert f32_bits(ours[0]).tolist() == [0x00800000] * 3 + [0x3B800000]
    assert f32_bits(public[0]).tolist() == [0, 0, 0, 0x3B800000]
    assert torch.equal(ours[1], public[1])
    assert ours[1].tolist() == [2.0**126] * 3 + [2.0**8]


def test_public_rule_where_the_scaled_amax_is_a_subnormal() -> None:
    """fl(amax / 448) not 0 but subnormal: exponent field 0 and a mantissa, so e = -126 under both rules."""
    amax = from_bits(0x00700000, 0x00800000)
    assert bool((scale.amax_over_448(amax) != 0).all())
    stored, _ = scale.activation_scale(amax, "ue8m0", "public")
    assert f32_bits(stored).tolist() == [0x00800000] * 2


@pytest.mark.parametrize("zero_group", ["clamp", "public"])
def test_fp32_kind(zero_group: str) -> None:
    """sf = fl(max(amax, 1e-10) * fl(1/448)) and fl(1 / sf), by one exact product and one exact quotient."""
    amax = torch.cat([f32_from_bits(torch.arange(1, 0x7F80) << 16 | 0x5A5A), from_bits(0, INF - 1, 0x43E00000)])
    stored, factor = scale.activation_scale(amax, "fp32", zero_group)
    floor = float(torch.tensor(1e-10))
    exact = amax.double().clamp(min=floor) * float(from_bits(scale.RECIPROCAL_448_BITS)[0])
    assert torch.equal(stored, exact.float())
    assert torch.equal(factor, (1.0 / stored.double()).float())  # 53 >= 2 * 24 + 2: rounding twice changes nothing
    assert bool(torch.isfinite(factor).all())


def test_fp32_kind_of_an_infinite_amax() -> None:
    stored, factor = scale.activation_scale(from_bits(INF), "fp32", "clamp")
    assert f32_bits(stored).tolist() == [INF]
    assert f32_bits(factor).tolist() == [0]


def test_input_scale() -> None:
    amax = from_bits(0, 1, 0x43E00000, 0x3F800000)
    stored = scale.input_scale(amax)
    assert stored[0] == 1.0, "an all-zero group"
    assert stored[2] == 1.0
    assert torch.equal(stored[1:], (amax[1:].double() / 448).float())


def test_powers_cover_the_exponents() -> None:
    e = torch.arange(-126, 127)
    assert pow2(e).tolist() == [2.0**i for i in range(-126, 127)]
    assert torch.equal(pow2(e) * pow2(-e), torch.ones(len(e)))
