"""GEMM 2 of one row in float64: its operand is known only to lie within a bound, and so are its scale factors."""

from __future__ import annotations

import torch
from torch import Tensor

from megaproof.reference.oracle.activation import E4M3_LEAST_NORMAL, U32, Bounded
from megaproof.reference.oracle.decode import BLOCK
from megaproof.reference.oracle.gemm import EXACT_SPAN, STEP, chain_error
from megaproof.reference.oracle.rounding import LEAST, UP, exponent_above, exponent_below, half_ulp_bf16, half_ulp_fp32

E4M3_GREATEST = 8
"""Exponent of 448."""


def gemm2(a: Bounded, sf_low: Tensor, sf_high: Tensor, w: Tensor, w_exp: Tensor, w_sf: Tensor, *, kind: str) -> Bounded:
    """One row [I] of re-quantised L2 activations times chosen rows of W2, rounded to BF16: [c].

    a is what the codes mean, code * scale factor; each group's scale factor lies between sf_low and sf_high [G].
    w float64 and w_exp int8 [c, I] (values and tensor-core exponents), w_sf float64 [c, I/128]; kind 'ue8m0' or 'fp32'.
    """
    groups, columns = sf_low.numel(), w.shape[0]
    width = a.value.numel() // groups
    shape = (columns, groups, width // STEP, STEP)
    w_abs = w.abs()
    exact = (a.value * w).view(shape).sum(-1).cumsum(-1).permute(1, 2, 0)  # [G, steps, c]: partial sums of each chain
    spread = (a.error * w_abs).view(shape).sum(-1).cumsum(-1).permute(1, 2, 0) * UP
    size = (a.value.abs() * w_abs).view(columns, groups, width).sum(-1).t()

    # The tensor core sees codes, so everything is over the scale factor there.
    low_sf, high_sf = sf_low.view(-1, 1), sf_high.view(-1, 1)
    low = (exact.abs() - spread).clamp(min=0) / high_sf.unsqueeze(1)
    high = (exact.abs() + spread) / low_sf.unsqueeze(1)
    code_low = (a.value.abs() - a.error).clamp(min=0) / sf_high.repeat_interleave(width)
    code_high = a.reach / sf_low.repeat_interleave(width)
    least = w_exp + exponent_below(code_low).clamp(min=E4M3_LEAST_NORMAL)  # [c, I]: exponent of each product
    most = w_exp + exponent_above(code_high).clamp(E4M3_LEAST_NORMAL, E4M3_GREATEST)
    zero = w == 0

    def largest(exponent: Tensor, absent: Tensor) -> Tensor:
        return exponent.masked_fill(absent, LEAST).view(shape).amax(-1).permute(1, 2, 0)

    def cut(step: int, top: Tensor) -> Tensor:
        below = least.view(shape)[:, :, step] < (top - EXACT_SPAN).t().unsqueeze(-1)
        return (below & ~zero.view(shape)[:, :, step]).sum(-1).t()

    # A code that may be zero can't be counted on to set the largest exponent.
    core = chain_error(low, high, largest(least, zero | (code_low == 0)), largest(most, zero), cut)  # [G, c]

    w_sf = w_sf.repeat_interleave(BLOCK // width, 1).t()  # [G, c]
    term = w_sf * exact[:, -1]
    reach = high[:, -1] + core
    term_error = w_sf.abs() * (spread[:, -1] + high_sf * core + size * 2.0**-45) + reach * 2.0**-150
    if kind == "fp32":  # fl(sf * w_sf) rounds; with a power of two it is exact
        term_error = term_error + U32 * w_sf.abs() * high_sf * reach
    total, bound = torch.zeros_like(term[0]), torch.zeros_like(term[0])
    for g in range(groups):
        total = total + term[g]
        bound = bound + term_error[g] + (total.abs() + term[g].abs()) * 2.0**-51  # float64's own rounding
        bound = bound + half_ulp_fp32(total.abs() + bound)
    slot = Bounded(total, bound * UP)
    return Bounded(slot.value, slot.error + half_ulp_bf16(slot.reach))
