"""A layer that a person can follow: H = I = 128, and every number exact.

Column j of a token says bit j of the token's number, column SENTINEL is 1 for all. A gate row listens to the sentinel
(gate = GATE), an up row i to column i, so an L2 activation is GATE * weight times a bit. Row h of expert e's w2 listens
to column (h + e + 1) mod 128, its scale is 2^-e: an output tells token, expert and slot apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof.quant.formats import E4M3
from megaproof.quant.recipe import RECIPES, Recipe
from megaproof.reference.operands import ExpertWeights, Weights, e4m3

H = 128
SENTINEL = 96
GATE = 64.0
"""silu(64) = 64, exactly, in both modes; no clamp."""
RECIPE: Recipe = RECIPES["no_clamp"]


@dataclass(frozen=True)
class Layer:
    """Arguments of `moe_layer`, lists by rank."""

    x: list[Tensor]
    x_sf: list[Tensor]
    topk_idx: list[Tensor]
    topk_weights: list[Tensor]
    weights: Weights

    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Weights]:
        return self.x, self.x_sf, self.topk_idx, self.topk_weights, self.weights


def codes(values: Tensor) -> Tensor:
    return E4M3.encode(values.to(torch.float32))


def token(number: int) -> Tensor:
    """float32 [H]: bits of number + 1 in columns 0..31, and the sentinel."""
    row = torch.zeros(H)
    for j in range(32):
        row[j] = number + 1 >> j & 1
    row[SENTINEL] = 1
    return row


def expert(e: int, gate: float = GATE) -> ExpertWeights:
    """[2H, H] and [H, H]."""
    gates = torch.zeros(H, H)
    gates[:, SENTINEL] = gate
    down = torch.eye(H).roll(e + 1, dims=1)  # row h listens to column h + e + 1
    w1 = codes(torch.cat([gates, torch.eye(H)]))
    return e4m3(w1, torch.ones(2, 1), codes(down), torch.full((1, 1), 2.0**-e))


def layer(topk_idx: list[list[list[int]]], topk_weights: list[list[list[float]]], weights: Weights = expert) -> Layer:
    """Lists rank -> token -> slot; tokens are numbered over all ranks."""
    counts = [len(tokens) for tokens in topk_idx]
    slots = len(next(tokens[0] for tokens in topk_idx if tokens))
    first = [sum(counts[:rank]) for rank in range(len(counts))]
    x = [
        torch.stack([token(f + t) for t in range(n)]) if n else torch.zeros(0, H)
        for f, n in zip(first, counts, strict=True)
    ]
    return Layer(
        [codes(part) for part in x],
        [torch.ones(n, 1) for n in counts],
        [torch.tensor(idx, dtype=torch.int64).reshape(-1, slots) for idx in topk_idx],
        [torch.tensor(w, dtype=torch.float32).reshape(-1, slots) for w in topk_weights],
        weights,
    )


def naive(topk_idx: list[list[list[int]]], topk_weights: list[list[list[float]]]) -> list[list[list[float]]]:
    """y by rank, in plain loops over Python floats, which hold every sum of this layer exactly."""
    y, number = [], 0
    for idx, weights in zip(topk_idx, topk_weights, strict=True):
        rows = []
        for experts, w in zip(idx, weights, strict=True):
            up = token(number).tolist()
            number += 1
            row = [0.0] * H
            for e, weight in zip(experts, w, strict=True):
                if e < 0:
                    continue
                for h in range(H):
                    row[h] += GATE * weight * up[(h + e + 1) % H] * 2.0**-e
            rows.append([bf16(v) for v in row])
        y.append(rows)
    return y


def bf16(value: float) -> float:
    """Eight significant bits, nearest even; Python's round is."""
    if value == 0:
        return 0.0
    scale = 1.0
    while abs(value) * scale >= 256:
        scale /= 2
    while abs(value) * scale < 128:
        scale *= 2
    return round(value * scale) / scale
