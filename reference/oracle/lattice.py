"""Expected y of a lattice input by integers alone: operands -1, 0, 1 and power-of-two scales make every step exact.

What makes it exact, all of it checked:
- x, w1 and w2 hold only -1, 0 and 1; all scale factors are powers of two; routing weights are powers of two or 0;
- a chain of the tensor core stays below 2^13 of its smallest unit, so none of its cuts bites; float32 sums have at most
  24 significant bits;
- after the clamp (none, or >= 32) a gate is 0 or >= 32. exp(-32) is below 2^-46, so 1 + exp(-gate) rounds to 1, whose
  reciprocal is 1 in both forms of silu: silu(gate) = gate; silu(0) = 0;
- the amax of a group is 0 or 448 * 2^j, so its scale factor is 2^j under every rule, and all its codes are exact.

Two roundings are left, of each slot and of y, to BF16: done here on integers. For such inputs y is the same under every
recipe of the reference (silu, scale kind, BF16 rounding of gate and up, where the weight enters, the zero-group rule).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megaproof.reference.oracle.decode import (
    BLOCK,
    UNITS,
    Weights,
    by_expert,
    check_codes,
    check_expert,
    check_scales,
    check_tokens,
    host,
)
from megaproof.reference.oracle.integers import (
    E4M3_BITS,
    FP32_BITS,
    SAFE_EXPONENT,
    Ints,
    NotLattice,
    Scaled,
    align,
    bf16_bits,
    multiply,
    require,
    round_bf16,
    running_sum,
    significant_bits,
    trailing_zeros,
)

__all__ = ["NotLattice", "lattice_y"]

CHAIN_BITS = 13
"""|partial sums| of a tensor-core chain stay below 2^13 units."""
LEAST_GATE = 32
CODE_UNIT = -9
"""E4M3 values are multiples of 2^-9."""
ROWS = 1024
"""Weight rows decoded at a time: bounds the memory."""
OTHER = 2
SIGNS = np.array([{0: 0, 512: 1, -512: -1}.get(units, OTHER) for units in UNITS.tolist()], dtype=np.int8)
"""code -> -1, 0, 1, or OTHER where its value is none of these."""


def lattice_y(
    x: Tensor,
    x_sf: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    weights: Weights,
    tokens: Tensor,
    columns: Tensor,
    clamp: float | None,
    granularity: int = 64,
) -> Tensor:
    """y of chosen tokens and columns, bit for bit: int16 [t, c], BF16 bit patterns (compare y.view(torch.int16)).

    x uint8 [T,H], x_sf float32 [T,H/128], topk_idx int64 [T,K] (-1 = masked), topk_weights float32 [T,K]: one rank's;
    tokens int64 [t] indexes T, columns int64 [c] indexes H; granularity 64 or 128 (columns of I that share a scale).
    `weights` is asked for the experts of the chosen tokens only, once each.
    Raises `NotLattice`, naming what broke, for an input on which some step would round.
    """
    require(granularity in (64, BLOCK), f"granularity = {granularity} must be 64 or {BLOCK}")
    x, x_sf, topk_idx, topk_weights, tokens, columns = host(x, x_sf, topk_idx, topk_weights, tokens, columns)
    check_tokens(x, x_sf, topk_idx, topk_weights)
    x, x_sf, topk_idx, topk_weights = x[tokens], x_sf[tokens], topk_idx[tokens], topk_weights[tokens]
    limit = _clamp(clamp)
    x_int, x_exp = _signs(x, "x"), _exponents(x_sf, "x_sf")
    topk_weights = topk_weights.masked_fill(topk_idx < 0, 0)

    slots: dict[tuple[int, int], Scaled] = {}
    for expert, pairs in by_expert(topk_idx):
        w1, w1_sf, w2, w2_sf = host(*weights(expert))
        check_expert((w1, w1_sf, w2, w2_sf), x.shape[1], f"expert {expert}")
        name = f"of expert {expert}"
        w1_exp, w2_exp = _exponents(w1_sf, f"w1_sf {name}"), _exponents(w2_sf, f"w2_sf {name}")
        w2_int = _signs(w2[columns], f"w2 {name}")
        down = w2_int, w2_exp[columns.numpy() // BLOCK]
        acc = np.concatenate([_block_sums(x_int[[row for row, _ in pairs]], part, name) for part in w1.split(ROWS)], 1)
        for sums, pair in zip(acc, pairs, strict=True):
            where = f"token {int(tokens[pair[0]])}, slot {pair[1]}, expert {expert}"
            gate, up = _gemm1(sums, x_exp[pair[0]], w1_exp, f"GEMM 1 of {where}")
            v = _swiglu(gate, up, limit, _weight(topk_weights[pair], where), where)
            codes, exponent = _quantise(v, granularity, where)
            slots[pair] = round_bf16(_gemm2(codes, exponent, *down, granularity, f"GEMM 2 of {where}"))

    y = np.zeros((len(x), columns.numel()), dtype=np.int16)
    for row in range(len(x)):
        active = [slots[pair] for pair in sorted(slots) if pair[0] == row]
        if active:
            terms = np.stack([slot.n for slot in active], axis=-1)
            exponents = np.array([slot.e for slot in active], dtype=np.int64)
            what = f"combine of token {int(tokens[row])}"
            y[row] = bf16_bits(round_bf16(running_sum(align(terms, exponents, what), what)))
    return torch.from_numpy(y)


def _signs(codes: Tensor, name: str) -> Ints:
    """E4M3 codes that may only be -1, 0 or 1 -> int64."""
    check_codes(codes, name)
    signs = SIGNS[codes.numpy()]
    require(signs != OTHER, f"{name} holds other values than -1, 0 and 1")
    return signs.astype(np.int64)


def _exponents(scales: Tensor, name: str) -> Ints:
    """Positive powers of two -> their exponents."""
    check_scales(scales, name)
    bits = scales.contiguous().view(torch.int32).numpy().astype(np.int64)
    require((bits > 0) & (bits & 0x7FFFFF == 0), f"{name} holds a value that is not a positive power of two")
    exponents = (bits >> 23) - 127
    require(np.abs(exponents) <= SAFE_EXPONENT // 2, f"{name} has an exponent outside +-{SAFE_EXPONENT // 2}")
    return exponents


def _weight(weight: Tensor, where: str) -> Scaled:
    """A routing weight: 0, or a power of two of either sign."""
    if weight == 0:
        return Scaled(np.zeros(1, dtype=np.int64), 0)
    exponent = _exponents(weight.abs().reshape(1), f"topk_weights of {where}")
    return Scaled(np.array([-1 if weight < 0 else 1]), int(exponent[0]))


def _clamp(clamp: float | None) -> Scaled | None:
    """None, or at least 32 and exact in float32."""
    if clamp is None or math.isinf(clamp):
        return None
    require(clamp >= LEAST_GATE, f"clamp = {clamp} must be None or >= {LEAST_GATE}")
    numerator, denominator = float(clamp).as_integer_ratio()
    require(numerator.bit_length() <= FP32_BITS, f"clamp = {clamp} is not exact in float32")
    return Scaled(np.array([numerator], dtype=np.int64), 1 - denominator.bit_length())


def _block_sums(x: Ints, w1: Tensor, name: str) -> Ints:
    """x [n, H], rows of w1 [rows, H] -> sums of each 128 columns [n, rows, H/128], at most 128 units: no cut bites."""
    blocks = _signs(w1, f"w1 {name}").reshape(len(w1), -1, BLOCK)
    return np.stack([np.einsum("nbk,bk->nb", blocks, row.reshape(-1, BLOCK)) for row in x])


def _gemm1(sums: Ints, x_exp: Ints, w1_exp: Ints, what: str) -> tuple[Scaled, Scaled]:
    """sums [2I, B], x_exp [B], w1_exp [2I/128, B] -> gate [I], up [I]."""
    total = running_sum(align(sums, x_exp + np.repeat(w1_exp, BLOCK, axis=0), what), what)
    gate, up = np.split(total.n, 2)
    return Scaled(gate, total.e), Scaled(up, total.e)


def _swiglu(gate: Scaled, up: Scaled, limit: Scaled | None, weight: Scaled, where: str) -> Scaled:
    """gate * up * weight [I], since silu(gate) = gate; the product is exact after each factor."""
    if limit is not None:
        gate = _clip(gate, limit, one_sided=True, what=f"gate of {where}")
        up = _clip(up, limit, one_sided=False, what=f"up of {where}")
    least = align(np.append(gate.n, LEAST_GATE), np.append(np.full(gate.n.shape, gate.e), 0), f"gate of {where}").n
    require((gate.n == 0) | (least[:-1] >= least[-1]), f"gate of {where}: neither 0 nor >= {LEAST_GATE}")
    return multiply(multiply(gate, up, f"gate * up of {where}"), weight, f"weighted activation of {where}")


def _clip(value: Scaled, limit: Scaled, one_sided: bool, what: str) -> Scaled:
    both = align(np.append(value.n, limit.n), np.append(np.full(value.n.shape, value.e), limit.e), what)
    n, c = both.n[:-1], both.n[-1]
    return Scaled(np.minimum(n, c) if one_sided else np.clip(n, -c, c), both.e)


def _quantise(v: Scaled, granularity: int, where: str) -> tuple[Ints, Ints]:
    """v [I] -> codes in units of 2^-9 [G, granularity], exponent of each group's scale factor [G]."""
    groups = v.n.reshape(-1, granularity)
    amax = np.abs(groups).max(axis=1)
    zeros = trailing_zeros(amax)
    require((amax == 0) | (amax >> zeros == 7), f"activation of {where}: an amax is not 0 or 448 * 2^j")
    exponent = np.where(amax == 0, 0, v.e + zeros - 6)  # 448 = 7 * 2^6
    require(np.abs(exponent) <= SAFE_EXPONENT, f"activation of {where}: scale 2^j outside +-{SAFE_EXPONENT}")
    shift = (v.e - exponent - CODE_UNIT)[:, None]  # units of 2^-9 of the scaled value
    exact = (groups == 0) | (trailing_zeros(groups) + shift >= 0)
    exact &= significant_bits(groups) <= E4M3_BITS
    require(exact, f"activation of {where}: a value is not an E4M3 code times its scale")
    return np.where(shift >= 0, groups << shift.clip(min=0), groups >> (-shift).clip(min=0)), exponent


def _gemm2(codes: Ints, exponent: Ints, w2: Ints, w2_exp: Ints, granularity: int, what: str) -> Scaled:
    """codes [G, granularity], exponent [G], w2 [c, I], w2_exp [c, I/128] -> a slot before its rounding, [c]."""
    grouped = w2.reshape(len(w2), *codes.shape)
    unit = np.where(codes == 0, np.int64(1) << 40, codes & -codes).min(axis=1)  # the smallest of a group
    size = np.einsum("cgk,gk->cg", np.abs(grouped), np.abs(codes))
    require(size < unit << CHAIN_BITS, f"{what}: a tensor-core chain reaches 2^{CHAIN_BITS} units")
    sums = np.einsum("cgk,gk->cg", grouped, codes)
    scales = exponent + CODE_UNIT + np.repeat(w2_exp, BLOCK // granularity, axis=1)
    return running_sum(align(sums, scales, what), what)
