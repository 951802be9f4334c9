"""Exponents and half ulps in float64, each rounded to the safe side, so that a bound made of them is rigorous."""

from __future__ import annotations

import torch
from torch import Tensor

UP, DOWN = 1 + 2.0**-40, 1 - 2.0**-40
"""Covers the few float64 roundings (2^-53 each) behind a value before its exponent is read."""
OVERFLOW = 1e38
"""Above it the oracle refuses: float32 and bfloat16 end at 3.4e38."""
LEAST = -1000
"""Exponent reported for a zero: below that of every float32."""


def exp2i(exponent: Tensor) -> Tensor:
    """2^e exactly, int -> float64, built from bits; 0 below 2^-1022."""
    e = exponent.to(torch.int64)
    return ((e + 1023) << 52).where(e > -1023, 0).view(torch.float64)


def exponent_above(v: Tensor) -> Tensor:
    """At least floor(log2 v): float64 >= 0 -> int64, LEAST for 0."""
    return torch.frexp(v * UP)[1].to(torch.int64).sub(1).where(v > 0, LEAST)


def exponent_below(v: Tensor) -> Tensor:
    """At most floor(log2 v): float64 >= 0 -> int64, LEAST for 0."""
    return torch.frexp(v * DOWN)[1].to(torch.int64).sub(1).where(v > 0, LEAST)


def half_ulp_fp32(v: Tensor) -> Tensor:
    """At least the error of rounding any |value| <= v to float32, nearest."""
    return exp2i(exponent_above(v).clamp(min=-126) - 24)


def half_ulp_bf16(v: Tensor) -> Tensor:
    """At least the error of rounding any |value| <= v to bfloat16, nearest."""
    return exp2i(exponent_above(v).clamp(min=-126) - 8)
