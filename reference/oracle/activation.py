"""SwiGLU and the re-quantisation of the L2 activations in float64, each with what its roundings may do at most.

A value carries a bound on its error from stage to stage. The largest error by far is that of the re-quantisation to
E4M3, which keeps 4 significant bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megaproof.reference.oracle.decode import Refused
from megaproof.reference.oracle.rounding import (
    LEAST,
    OVERFLOW,
    UP,
    exp2i,
    exponent_above,
    exponent_below,
    half_ulp_bf16,
)

U32 = 2.0**-24
"""Unit roundoff of float32."""
TINY = 2.0**-149
"""Covers a float32 rounding in the subnormal range, where the relative bound fails."""
SILU_MINIMUM = -1.2784645427610738
"""Where x * sigmoid(x) has its minimum: it falls before and rises after."""
E4M3_MAX, E4M3_LEAST_NORMAL = 448.0, -6


class Bounded(NamedTuple):
    """A real value and a bound on a correct kernel's distance from it; float64 of one shape."""

    value: Tensor
    error: Tensor

    @property
    def reach(self) -> Tensor:
        """The largest magnitude that a correct kernel can have."""
        return self.value.abs() + self.error


def swiglu(gate: Bounded, up: Bounded, weight: Tensor, *, limit: float, silu: str, l1_rounding: str) -> Bounded:
    """Clamp, silu(gate) * up, times the weight [rows, 1]; three float32 multiplications."""
    if l1_rounding == "bf16":
        gate, up = (Bounded(t.value, t.error + half_ulp_bf16(t.reach)) for t in (gate, up))
    gate, up = clamped(gate, -math.inf, limit), clamped(up, -limit, limit)
    act = silu_bound(gate, silu)
    v = product(act, up)
    v = Bounded(v.value, v.error + U32 * v.reach + TINY)
    v = product(v, Bounded(weight, torch.zeros_like(weight)))
    v = Bounded(v.value, v.error + U32 * v.reach + TINY)
    if (v.reach > OVERFLOW).any():
        raise Refused(f"the activation reaches {OVERFLOW}: too near to the end of float32")
    return v


def clamped(t: Bounded, low: float, high: float) -> Bounded:
    """The clamp of the value; the interval around it is clamped too, so beyond the limit the error vanishes."""
    value = t.value.clamp(low, high)
    above, below = ((t.value + side * t.error).clamp(low, high) for side in (1, -1))
    return Bounded(value, torch.maximum(above - value, value - below))


def product(a: Bounded, b: Bounded) -> Bounded:
    """The exact product of two perturbed values; float64's own rounding included."""
    value = a.value * b.value
    error = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error
    return Bounded(value, error * UP + value.abs() * 2.0**-50)


def silu_bound(gate: Bounded, silu: str) -> Bounded:
    """x * sigmoid(x) of a perturbed gate: the range of the function over the interval, then the error of computing it.

    fast (numerics of ex2.approx and rcp.approx): relative 2^-23 * ((2 + 1.173 |x|) sigmoid(-x) + 2.5).
    precise: expf is within 3 * 2^-23 (ex2's 1.5 ulp, its argument cut at 2^-23 and rounded), then 1 + e, the division
    and the product round once each: relative 2^-23 * (3 sigmoid(-x) + 1.5).
    Far below zero 1 + e overflows or its reciprocal is flushed, and silu is -0: the whole value is lost.
    """
    low, high = gate.value - gate.error, gate.value + gate.error
    value, at_low, at_high = _silu(gate.value), _silu(low), _silu(high)
    error = torch.maximum((at_low - value).abs(), (at_high - value).abs())
    dips = (low < SILU_MINIMUM) & (high > SILU_MINIMUM)
    error = torch.where(dips, torch.maximum(error, value - _silu(torch.tensor(SILU_MINIMUM).double())), error)

    reach, far = value.abs() + error, torch.maximum(low.abs(), high.abs())
    weight = torch.sigmoid(-low)  # the largest in the interval
    relative = 2.0**-23 * ((2 + 1.173 * far) * weight + 2.5 if silu == "fast" else 3 * weight + 1.5)
    computing = (relative * reach * (1 + 2.0**-18)).where(low > -87, reach * (1 + 2.0**-18))
    return Bounded(value, error + computing + TINY + value.abs() * 2.0**-48)


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def scale_range(v: Bounded, granularity: int, kind: str) -> tuple[Tensor, Tensor]:
    """The least and the largest scale factor that a correct kernel can give each group: [rows, I] -> two [rows, G]."""
    magnitude = v.value.abs()
    extremes = ((magnitude - v.error).clamp(min=0) * (1 - 2.0**-40), v.reach * UP)
    least, most = (t.unflatten(1, (-1, granularity)).amax(-1) / E4M3_MAX for t in extremes)
    if kind == "fp32":
        return least.clamp(min=1e-10 / E4M3_MAX) * (1 - 2.0**-22), most.clamp(min=1e-10 / E4M3_MAX) * (1 + 2.0**-22)
    # The least power of two that is not below amax / 448.
    floor_low, floor_high = exponent_below(least), exponent_above(most)
    low, high = (e + (exp2i(e) < t).long() for e, t in ((floor_low, least), (floor_high, most)))
    return exp2i(low.clamp(-126, 126)), exp2i(high.clamp(-126, 126))


def requantisation_error(v: Bounded, granularity: int, sf_low: Tensor, sf_high: Tensor, kind: str) -> Tensor:
    """Half an E4M3 ulp, times the scale factor, at the largest magnitude each value can have; [rows, I].

    A power-of-two scale factor drops out of a normal value's ulp. Below half of the least subnormal all of it is lost.
    """
    low, high = (sf.repeat_interleave(granularity, 1) for sf in (sf_low, sf_high))
    reach = v.reach
    if kind == "ue8m0":
        normal = exp2i((exponent_above(reach) - 4).clamp(min=LEAST))
    else:
        exponent = exponent_above(reach / low * (1 + 2.0**-21)).clamp(min=E4M3_LEAST_NORMAL)
        normal = torch.minimum(exp2i(exponent - 4) * high, reach * 2.0**-4)
    normal = normal.where(reach * UP >= low * 2.0**E4M3_LEAST_NORMAL * (1 - 2.0**-20), 0)
    subnormal = torch.minimum(high * 2.0 ** (E4M3_LEAST_NORMAL - 4), reach)
    error = torch.maximum(normal, subnormal)
    if kind == "fp32":  # fl(1 / sf) and the product with it move the value before it is rounded
        error = error + reach * 2.0**-22
    # The public rule stores a scale of 0 where fl(amax * fl(1/448)) is 0: what little there was is gone.
    return (torch.maximum(error, reach.clamp(max=2.0**-139)) + TINY) * UP
