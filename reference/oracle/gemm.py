"""A block-scaled FP8 GEMM in float64, and how far the SM90 tensor core may be from it.

One k32 step is a fused sum of 32 products and the accumulator. Every term is cut toward zero to 13 fraction bits below
the largest exponent `top` of the non-zero terms, so it loses less than 2^(top - 13); products carry their operands'
exponents added up, not normalised, and 6 fraction bits, so those with an exponent of top - 7 or more lose nothing. The
sum is then cut to 14 significant bits. Here these losses are counted, never simulated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megaproof.reference.oracle.decode import (
    BLOCK,
    EXPONENTS,
    VALUES,
    Refused,
    check_codes,
    check_scales,
    check_shape,
    host,
    look_up,
)
from megaproof.reference.oracle.rounding import (
    LEAST,
    OVERFLOW,
    UP,
    exp2i,
    exponent_above,
    exponent_below,
    half_ulp_fp32,
)

STEP = 32
"""Depth of one FP8 tensor-core instruction."""
FRACTION = 13
"""Fraction bits kept below the largest exponent."""
EXACT_SPAN = FRACTION - 6
"""A product whose exponent is at most this far below the largest has all its 6 fraction bits kept."""
ROWS = 1024
"""Weight rows that are decoded at a time: bounds the memory."""


def gemm_bound(a: Tensor, a_sf: Tensor, w: Tensor, w_sf: Tensor, group: int = BLOCK) -> tuple[Tensor, Tensor]:
    """sum over K of (a * a_sf) * (w * w_sf), and a bound on a correct kernel's distance from it.

    a uint8 [M, K], a_sf float32 [M, K/group], w uint8 [N, K], w_sf float32 [N/128, K/128]; group 128 or 64 is also the
    length of one tensor-core chain -> (exact, bound), float64 [M, N]. A correct kernel is a chain of k32 steps from 0
    for each group, then sum = fma(fl(a_sf * w_sf), chain, sum) in float32, groups ascending.
    Raises `Refused` for NaN, infinity, overflow and wrong shapes.
    """
    a, a_sf, w, w_sf = host(a, a_sf, w, w_sf)
    (m, k), n = a.shape, w.shape[0]
    if group not in (64, BLOCK) or k % BLOCK or n % BLOCK:
        raise Refused(f"group = {group} must be 64 or 128, and K = {k} and N = {n} multiples of {BLOCK}")
    check_shape(a_sf, (m, k // group), "a_sf")
    check_shape(w, (n, k), "w")
    check_shape(w_sf, (n // BLOCK, k // BLOCK), "w_sf")
    for codes, name in ((a, "a"), (w, "w")):
        check_codes(codes, name)
    for scales, name in ((a_sf, "a_sf"), (w_sf, "w_sf")):
        check_scales(scales, name)

    exact, bound = torch.empty(m, n, dtype=torch.float64), torch.empty(m, n, dtype=torch.float64)
    rows_sf = w_sf.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK // group, 1)  # [N, K/group]
    for rows in (slice(first, min(first + ROWS, n)) for first in range(0, n, ROWS)):
        chunk = w[rows].t().contiguous()  # [K, rows]: reductions over K run along whole rows of memory
        value, exponent = look_up(VALUES, chunk), look_up(EXPONENTS, chunk)
        for i in range(m):
            chain, error = _chains(a[i], value, exponent, group)
            total = _promote(chain, error, a_sf[i], rows_sf[rows].t())
            exact[i, rows], bound[i, rows] = total
    if (exact.abs() + bound > OVERFLOW).any():
        raise Refused(f"the GEMM reaches {OVERFLOW}: too near to the end of float32")
    return exact, bound


def _chains(a: Tensor, value: Tensor, exponent: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """One row against all columns: exact sums of each group and the tensor core's possible error, [K/group, N].

    a uint8 [K], value float64 [K, N], exponent int8 [K, N]. Sums of up to 128 products are exact: all are multiples of
    2^-18 and below 2^25.
    """
    n = value.shape[1]
    steps = torch.bmm(look_up(VALUES, a).view(-1, 1, STEP), value.view(-1, STEP, n)).view(-1, group // STEP, n)
    products = exponent.view(-1, STEP, n) + look_up(EXPONENTS, a).view(-1, STEP, 1)
    top = _halve(products, torch.maximum).view(-1, group // STEP, n)
    products = products.view(-1, group // STEP, STEP, n)

    def cut(step: int, largest: Tensor) -> Tensor:
        # A product with a zero operand has an exponent below -40, which as uint8, like the limit's, is a large number:
        # the biased comparison leaves it out. Real products lie in [-12, 16].
        bias = 12
        limit = (largest - EXACT_SPAN + bias).clamp(0, 100).to(torch.uint8)
        below = (products[:, step] + bias).view(torch.uint8) < limit.unsqueeze(1)
        return _halve(below.view(torch.uint8), torch.add)

    partial = steps.cumsum(1)
    error = chain_error(partial.abs(), partial.abs(), top, top, cut)
    return partial[:, -1], error


def chain_error(
    low: Tensor, high: Tensor, top_low: Tensor, top_high: Tensor, cut: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Bound on the error of a chain of tensor-core steps from 0.

    low, high float64 [G, steps, N]: the magnitude of the exact partial sum after each step lies between them; top_low,
    top_high int [G, steps, N]: so does the largest exponent of a step's non-zero products; cut(step, largest) gives
    [G, N]: at least the number of the step's products that lose bits when `largest` is the largest exponent.
    Returns float64 [G, N].
    """
    error = torch.zeros_like(high[:, 0])
    before_low, before_high = torch.zeros_like(error), torch.zeros_like(error)
    for step in range(high.shape[1]):
        c_low, c_high = exponent_below(before_low), exponent_above(before_high)  # exponent of the accumulator
        least = torch.maximum(top_low[:, step].to(torch.int64), c_low)
        most = torch.maximum(top_high[:, step].to(torch.int64), c_high)
        unit = exp2i((most - FRACTION).clamp(min=LEAST))
        loss = cut(step, most) * unit
        # The accumulator has 14 significant bits, so it is cut only where a product has a larger exponent.
        loss = loss + torch.minimum(unit, before_high).where(top_high[:, step] > c_low, 0)
        reach = high[:, step] + error + loss  # the largest possible magnitude of the uncut sum
        digit = exp2i(exponent_above(reach) - FRACTION).where(reach * UP >= exp2i(least + 1), 0)
        error = error + loss + digit
        before_low, before_high = (low[:, step] - error).clamp(min=0), high[:, step] + error
    return error


def _promote(chain: Tensor, error: Tensor, a_sf: Tensor, w_sf: Tensor) -> tuple[Tensor, Tensor]:
    """sum = fma(fl(a_sf * w_sf), chain, sum) over groups: chain, error [G, N], a_sf [G], w_sf [G, N] -> two [N]."""
    scale = a_sf.double().unsqueeze(1) * w_sf.double()  # exact
    rounded = (a_sf.unsqueeze(1) * w_sf).double()
    if not torch.isfinite(rounded).all():
        raise Refused("a product of two scale factors overflows float32")
    term, total = scale * chain, torch.zeros_like(chain[0])
    term_error = rounded.abs() * error + (rounded - scale).abs() * chain.abs()
    bound = torch.zeros_like(total)
    for g in range(chain.shape[0]):
        total = total + term[g]
        bound = bound + term_error[g] + (total.abs() + term[g].abs()) * 2.0**-51  # float64's own rounding
        bound = bound + half_ulp_fp32(total.abs() + bound)
    return total, bound * UP


def _halve(t: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[G, 32, N] -> [G, N] by a tree of halves: whole-row operations, many times faster than a strided reduction."""
    while t.shape[1] > 1:
        half = t.shape[1] // 2
        t = combine(t[:, :half], t[:, half:])
    return t.squeeze(1)
