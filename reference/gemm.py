"""Eq. (2), Eq. (3), Eq. (6): GEMM 1 and GEMM 2, in which each scale block of K is promoted into an fp32 sum.

Predicts kernel/gemm.cuh.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megaproof.quant.cast import BLOCK
from megaproof.quant.host_state import guarded
from megaproof.quant.recipe import Recipe
from megaproof.reference.operands import Operand


@guarded
def promoted(a: Tensor, a_sf: Tensor, w: Operand, group: int, arith: ModuleType) -> Tensor:
    """Returns a @ w^T, scaled, float32 [m, N]: sum = fma(fl(s_a[b] * s_w[b]), acc_b, sum), b ascending from sum = 0.

    acc_b is the chain of k32 steps from 0 over scale block b. a: uint8 [m, K]. a_sf: float32 [m, K/group]. w: [N, K].
    group: the columns of K that share an activation scale.
    """
    w_sf = w.scales.repeat_interleave(BLOCK, dim=0)  # [N, K/128]
    total = torch.zeros(a.shape[0], w.codes.shape[0], dtype=torch.float32, device=a.device)
    for b in range(a.shape[1] // group):
        columns = slice(b * group, (b + 1) * group)
        acc = arith.wgmma_chain(a[:, columns], w.codes[:, columns])
        scale = a_sf[:, b, None] * w_sf[None, :, b * group // BLOCK]
        total = arith.fma(scale, acc, total)
    return total


@guarded
def gemm1(recipe: Recipe, acts: Tensor, acts_sf: Tensor, w: Operand, arith: ModuleType) -> tuple[Tensor, Tensor]:
    """Eq. (2), Eq. (3): returns gate and up, float32 [m, I] each.

    acts: uint8 [m, H]. acts_sf: float32 [m, H/128]. w: W1 of an expert, [2I, H], gate rows then up rows.
    """
    h = promoted(acts, acts_sf, w, BLOCK, arith)
    if recipe.l1_rounding == "bf16":
        h = arith.decode_bf16(arith.encode_bf16(h))
    gate, up = h.chunk(2, dim=1)
    return gate.contiguous(), up.contiguous()


@guarded
def gemm2(recipe: Recipe, acts: Tensor, acts_sf: Tensor, w: Operand, arith: ModuleType) -> Tensor:
    """Eq. (6): returns the output rows, float32 [m, H].

    acts: uint8 [m, I]. acts_sf: float32 [m, I/granularity]. w: W2 of an expert, [H, I].
    """
    return promoted(acts, acts_sf, w, recipe.activation_granularity, arith)
