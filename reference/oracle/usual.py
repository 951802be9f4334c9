"""What the field compares a MegaMoE kernel with, rebuilt to be shown beside ours: FP32 matmuls over dequantised values.

Modelled on the public SM90 tests (deepseek-ai/DeepGEMM pull requests 323 and 383): routing weight before the
quantisation, one amax / 448 scale in FP32 for 64 columns where the kernel has a power of two, torch's silu and cast,
slots and their sum in BF16. It predicts no kernel's bits and is no verdict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megaproof.reference.oracle.decode import (
    BLOCK,
    VALUES,
    Weights,
    by_expert,
    check_expert,
    check_tokens,
    host,
    look_up,
)

E4M3_MAX = 448.0
LEAST_AMAX = 1e-4
"""The public tests' floor under an amax."""


def usual_reference(
    x: Tensor,
    x_sf: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    weights: Weights,
    *,
    clamp: float | None,
    granularity: int = 64,
    weight_fold: str = "before_quantisation",
) -> Tensor:
    """y as the public tests expect it: bfloat16 [T, H], on the CPU.

    x uint8 [T,H], x_sf float32 [T,H/128], topk_idx int64 [T,K], topk_weights float32 [T,K]: any number of tokens, so
    the ranks of a layer may be concatenated. weight_fold 'in_combine' multiplies the rows after GEMM 2 instead. Bits
    depend on the machine's matmul.
    """
    x, x_sf, topk_idx, topk_weights = host(x, x_sf, topk_idx, topk_weights)
    check_tokens(x, x_sf, topk_idx, topk_weights)
    (tokens, hidden), topk = x.shape, topk_idx.shape[1]
    tokens_f32 = _dequantise(x, x_sf.repeat_interleave(BLOCK, 1))
    slots = torch.zeros(tokens, topk, hidden, dtype=torch.bfloat16)
    for expert, pairs in by_expert(topk_idx):
        w1, w1_sf, w2, w2_sf = host(*weights(expert))
        check_expert((w1, w1_sf, w2, w2_sf), hidden, f"expert {expert}")
        rows, slot = (torch.tensor(part) for part in zip(*pairs, strict=True))
        gate, up = (tokens_f32[rows] @ _dequantise_block(w1, w1_sf).t()).chunk(2, 1)
        if clamp is not None and math.isfinite(clamp):
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        v = torch.nn.functional.silu(gate) * up
        weight = topk_weights[rows, slot].unsqueeze(1)
        if weight_fold == "before_quantisation":
            v = v * weight
        grouped = v.unflatten(1, (-1, granularity))
        scale = grouped.abs().amax(-1, keepdim=True).clamp(LEAST_AMAX) / E4M3_MAX
        # The clamp keeps torch's cast away from overflow, where its versions differ.
        codes = (grouped / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        row = (codes.float() * scale).flatten(1) @ _dequantise_block(w2, w2_sf).t()
        slots[rows, slot] = (row * weight if weight_fold == "in_combine" else row).to(torch.bfloat16)
    return slots.sum(1).to(torch.bfloat16)


def calc_diff(a: Tensor, b: Tensor) -> float:
    """1 - 2<a,b> / (<a,a> + <b,b>) in float64: the field's global figure of likeness. 0 for two zeros."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    size = (a * a + b * b).sum()
    return (1 - 2 * (a * b).sum() / size).item() if size != 0 else 0.0


def _dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    return look_up(VALUES.float(), codes) * scales


def _dequantise_block(codes: Tensor, scales: Tensor) -> Tensor:
    return _dequantise(codes, scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1))
