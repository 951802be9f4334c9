"""Errors of expf and silu against Python's decimal module, whose exp is correctly rounded at any precision."""

from __future__ import annotations

from decimal import Context, Decimal, localcontext

import numpy as np

from megaproof.quant import atoms
from megaproof.tests.third import exact
from megaproof.tests.third.bits import Source, to_bits, to_float

PRECISE = Context(prec=60, Emax=10**6, Emin=-(10**6))


def decimal(bits: int) -> Decimal:
    """A finite float32; 60 digits, which is exact but for some subnormals."""
    x = exact.value(bits)
    return Decimal(x.numerator) / Decimal(x.denominator)


def error_in_ulps(result: int, value: Decimal) -> float:
    """|result - value| in units of the last place of value's binade, which is at least 2^-149. value > 0."""
    binade = max(int((value.ln() / Decimal(2).ln()).to_integral_value("ROUND_FLOOR")), -126)
    return float(abs(decimal(result) - value) * Decimal(2) ** (23 - binade))


def sample(low: float, high: float, count: int) -> np.ndarray:
    """float32 bits: `count` spread evenly over [low, high], and up to as many with exponents from 2^-30 to 2^7."""
    s = Source(72)
    spread = (low + (high - low) * (s.words(count) / 2**32)).astype(np.float32)
    small = s.floats(97, 134, count).view(np.float32)
    return np.concatenate([spread, small[(small >= low) & (small <= high)]]).view(np.uint32)


def expf_errors(count: int) -> list[float]:
    """Errors of expf in units of the last place, from results of 2^-149 to the largest finite one."""
    bits = sample(-103.9, 88.72, count)
    results = to_bits(atoms.expf(to_float(bits)))
    with localcontext(PRECISE):
        return [error_in_ulps(y, decimal(x).exp()) for x, y in zip(bits.tolist(), results.tolist(), strict=True)]


def silu_shares_of_bound(fast: bool, count: int) -> list[float]:
    """Relative errors of silu as shares of 2^-23 * ((2 + 1.173 |x|) * sigmoid(-x) + 2.5), for x in [-80, 88]."""
    bits = sample(-80.0, 88.0, count)
    results = to_bits(atoms.silu(to_float(bits), fast))
    shares = []
    with localcontext(PRECISE):
        for x_bits, y in zip(bits.tolist(), results.tolist(), strict=True):
            x = decimal(x_bits)
            relative = abs(decimal(y) * (1 + (-x).exp()) / x - 1)
            bound = ((2 + Decimal("1.173") * abs(x)) / (1 + x.exp()) + Decimal("2.5")) / 2**23
            shares.append(float(relative / bound))
    return shares
