"""The layer in float64, with a forward error bound that holds for every correct kernel.

y64 is what the recipe means in real arithmetic on the dequantised inputs: no rounding and no re-quantisation anywhere.
The bound follows the recipe stage by stage and adds up what each rounding may do at most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megaproof.reference.oracle.activation import Bounded, requantisation_error, scale_range, swiglu
from megaproof.reference.oracle.decode import (
    BLOCK,
    EXPONENTS,
    VALUES,
    Refused,
    Weights,
    by_expert,
    check_codes,
    check_expert,
    check_scales,
    check_tokens,
    host,
    look_up,
)
from megaproof.reference.oracle.gemm import gemm_bound
from megaproof.reference.oracle.gemm2 import gemm2
from megaproof.reference.oracle.rounding import OVERFLOW, UP, half_ulp_bf16, half_ulp_fp32

CHOICES = {
    "silu": ("fast", "precise"),
    "granularity": (64, 128),
    "activation_scale": ("ue8m0", "fp32"),
    "l1_rounding": ("none", "bf16"),
    "weight_fold": ("before_quantisation", "in_combine"),
}


def fp64_layer(
    x: Tensor,
    x_sf: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    weights: Weights,
    tokens: Tensor,
    columns: Tensor,
    *,
    clamp: float | None,
    silu: str,
    granularity: int = 64,
    activation_scale: str = "ue8m0",
    l1_rounding: str = "none",
    weight_fold: str = "before_quantisation",
) -> tuple[Tensor, Tensor]:
    """y of chosen tokens and columns in real arithmetic, and a bound on |y of a correct kernel - y64|.

    x uint8 [T,H], x_sf float32 [T,H/128], topk_idx int64 [T,K] (-1 = masked), topk_weights float32 [T,K]: one rank's;
    tokens int64 [t] indexes T, columns int64 [c] indexes H. clamp None or inf: none. The zero-group rule needs no
    argument: both rules are inside the bound. Returns (y64, bound), float64 [t, c] on the CPU; `weights` is asked only
    for the experts of the chosen tokens, once each.
    Raises `Refused` for NaN, infinity, values near float32's end, wrong shapes and unknown choices.
    """
    check_choices(
        silu=silu,
        granularity=granularity,
        activation_scale=activation_scale,
        l1_rounding=l1_rounding,
        weight_fold=weight_fold,
    )
    limit = checked_clamp(clamp)
    x, x_sf, topk_idx, topk_weights, tokens, columns = host(x, x_sf, topk_idx, topk_weights, tokens, columns)
    check_tokens(x, x_sf, topk_idx, topk_weights)
    x, x_sf, topk_idx, topk_weights = x[tokens], x_sf[tokens], topk_idx[tokens], topk_weights[tokens]
    topk_weights = topk_weights.masked_fill(topk_idx < 0, 0)
    check_scales(topk_weights, "topk_weights")
    fold_late = weight_fold == "in_combine"

    slots: dict[tuple[int, int], Bounded] = {}
    for expert, pairs in by_expert(topk_idx):
        w1, w1_sf, w2, w2_sf = host(*weights(expert))
        check_expert((w1, w1_sf, w2, w2_sf), x.shape[1], f"expert {expert}")
        check_codes(w2, f"w2 of expert {expert}")
        check_scales(w2_sf, f"w2_sf of expert {expert}")
        rows = [row for row, _ in pairs]
        value, error = (t.chunk(2, 1) for t in gemm_bound(x[rows], x_sf[rows], w1, w1_sf))
        weight = torch.stack([topk_weights[pair] for pair in pairs]).double().unsqueeze(1)
        v = swiglu(
            Bounded(value[0], error[0]),
            Bounded(value[1], error[1]),
            torch.ones_like(weight) if fold_late else weight,
            limit=limit,
            silu=silu,
            l1_rounding=l1_rounding,
        )
        sf_low, sf_high = scale_range(v, granularity, activation_scale)
        total = v.error + requantisation_error(v, granularity, sf_low, sf_high, activation_scale)
        down = look_up(VALUES, w2[columns]), look_up(EXPONENTS, w2[columns]), w2_sf[columns // BLOCK].double()
        for i, pair in enumerate(pairs):
            row = Bounded(v.value[i], total[i])
            slots[pair] = gemm2(row, sf_low[i], sf_high[i], *down, kind=activation_scale)
    return combine(topk_idx, topk_weights, slots, columns.numel(), fold_late)


def combine(
    topk_idx: Tensor, topk_weights: Tensor, slots: dict[tuple[int, int], Bounded], columns: int, fold_late: bool
) -> tuple[Tensor, Tensor]:
    """Active slots summed in ascending k in float32, one BF16 rounding: float64 [t, columns] each, value and bound."""
    tokens, topk = topk_idx.shape
    y, bound = torch.zeros(tokens, columns, dtype=torch.float64), torch.zeros(tokens, columns, dtype=torch.float64)
    for row in range(tokens):
        active = [slot for slot in range(topk) if (row, slot) in slots]
        for slot in active:
            weight = topk_weights[row, slot].double() if fold_late else 1.0
            term, error = (t * weight for t in slots[row, slot])
            y[row] += term
            bound[row] += error.abs() + (y[row].abs() + term.abs()) * 2.0**-51
            bound[row] += half_ulp_fp32(y[row].abs() + bound[row])
        if active:
            bound[row] += half_ulp_bf16(y[row].abs() + bound[row])
    bound *= UP
    if (y.abs() + bound > OVERFLOW).any():
        raise Refused(f"y reaches {OVERFLOW}: too near to the end of bfloat16")
    return y, bound


def check_choices(**choices: str | int) -> None:
    """Raises `Refused` for a recipe value that the bound does not cover."""
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise Refused(f"{name} = {value!r} must be one of {CHOICES[name]}")


def checked_clamp(clamp: float | None) -> float:
    """The clamp as the float32 that a kernel compares with; inf for none. Raises `Refused` unless it is >= 0."""
    limit = math.inf if clamp is None else torch.tensor(clamp, dtype=torch.float32).item()
    if not limit >= 0:
        raise Refused(f"clamp = {clamp} must be >= 0, or None")
    return limit


def relative_error(y: Tensor, y64: Tensor) -> float:
    """Root mean square of y - y64 over that of y64; y of any float dtype. For show, as calc_diff is, no verdict."""
    error = y.detach().cpu().double() - y64
    size = y64.square().mean().sqrt()
    return (error.square().mean().sqrt() / size).item() if size != 0 else 0.0


def headroom(y: Tensor, y64: Tensor, bound: Tensor) -> float:
    """max |y - y64| / bound: the share of the bound that was used. 0/0 is 0; a NaN or a missed zero is inf.

    y of any float dtype and the two results of `fp64_layer`, one shape. More than 1: y is wrong.
    """
    error = (y.detach().cpu().double() - y64).abs()
    share = torch.where(error == 0, 0.0, error / bound)
    return share.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if share.numel() else 0.0
