"""Eq. (8): each token sums its active slots in fp32, in ascending k, and rounds once.

Predicts kernel/combine.cuh.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megaproof.quant.host_state import guarded
from megaproof.quant.recipe import Recipe
from megaproof.reference.dispatch import Routes


@guarded
def combine(
    recipe: Recipe, slots: Tensor, where: Routes, weight: Tensor, tokens: tuple[int, ...], topk: int, arith: ModuleType
) -> list[Tensor]:
    """Eq. (8): returns y, bfloat16 [T_r, H] by rank. A token without an active slot gives +0.

    slots: bfloat16 [n, H], the output row of each active slot. weight: float32 [n], the routing weights, which are read
    if the recipe folds them in here. tokens: T_r by rank.
    """
    total = torch.zeros(sum(tokens), slots.shape[1], dtype=torch.float32, device=slots.device)
    for k in range(topk):
        active = (where.slot == k).nonzero().squeeze(1)
        row, value = where.row[active], arith.decode_bf16(slots[active])
        if recipe.weight_fold == "in_combine":
            total[row] = arith.fma(weight[active, None], value, total[row])
        else:
            total[row] = total[row] + value
    return [part.clone() for part in arith.encode_bf16(total).split(list(tokens))]
