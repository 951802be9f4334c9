"""The load of one rank of eight on one GPU: shapes, routings, weights, and the call that is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof.bench.model.roofline import RANKS, Load
from megaproof.kernel import api
from megaproof.kernel.host.sizes import GROUP
from megaproof.kernel.host.weights import untiled, w1_rows, w2_rows
from megaproof.quant.recipe import Recipe
from megaproof.quant.scale import input_scale
from megaproof.quant.shapes import Shape
from megaproof.reference.operands import ExpertWeights, e4m3

Quantised = tuple[Tensor, Tensor]
"""Codes and their scales."""


def folded(tokens: int, experts: int, topk: int, seed: int) -> Tensor:
    """int64 [T, K], the peers' routing: top-K of the layer's experts by uniform scores, index modulo the local ones.

    A token may name an expert twice; every slot is one row all the same.
    """
    return _top(tokens, RANKS * experts, topk, seed) % experts


def distinct(tokens: int, experts: int, topk: int, seed: int) -> Tensor:
    """int64 [T, K]: K distinct local experts a token, uniform."""
    return _top(tokens, experts, topk, seed)


def _top(tokens: int, experts: int, topk: int, seed: int) -> Tensor:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(topk).indices


ROUTINGS = {"folded": folded, "distinct": distinct}


def quantised_rows(x: Tensor) -> Quantised:
    """(fp8 [T, H], scales [T, H/128]), one scale a token and 128 columns."""
    groups = x.unflatten(-1, (-1, 128))
    scale = input_scale(groups.abs().amax(-1))
    return (groups / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn), scale


def quantised_blocks(w: Tensor) -> Quantised:
    """(fp8 [N, K], scales [N/128, K/128]), one scale a block of 128 x 128."""
    blocks = w.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale = input_scale(blocks.abs().amax((1, 3)))
    return (blocks / scale[:, None, :, None]).reshape(w.shape).to(torch.float8_e4m3fn), scale


def random_weights(experts: int, rows: int, columns: int, generator: torch.Generator) -> Quantised:
    """0.05 times normal values, quantised one expert after the other: a layer in float32 would not fit."""
    codes = torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn, device=generator.device)
    scales = torch.empty(experts, rows // 128, columns // 128, device=generator.device)
    for expert in range(experts):
        w = torch.randn(rows, columns, generator=generator, device=generator.device).mul_(0.05)
        codes[expert], scales[expert] = quantised_blocks(w)
    return codes, scales


@dataclass(frozen=True)
class Work:
    """One point: what the rank has to do, the call that does it, and the call's arguments as a reference takes them."""

    load: Load
    call: Callable[[], None]
    y: Tensor
    """bfloat16 [T, H]: what the last call wrote."""
    arguments: tuple[Tensor, Tensor, Tensor, Tensor]
    """x uint8 [T, H], x_sf float32 [T, H/128], topk_idx int64 [T, K], topk_weights float32 [T, K]."""


class Layer:
    """One rank of a shape on the GPU: weights and a buffer, made once for all T.

    shape: of all eight ranks. clamp None is no clamp; fast_math chooses silu; granularity as in Recipe.
    """

    def __init__(
        self, shape: Shape, capacity: int, seed: int, clamp: float | None, fast_math: bool, granularity: int = GROUP
    ) -> None:
        self.shape, self.seed, self.experts = shape, seed, shape.experts_per_rank(RANKS)
        self.clamp, self.fast_math, self.granularity = clamp, fast_math, granularity
        self.generator = torch.Generator("cuda").manual_seed(seed)
        h, i, e = shape.hidden, shape.intermediate, self.experts
        l1, l2 = (random_weights(e, *size, self.generator) for size in ((2 * i, h), (h, i)))
        self.l1, self.l2 = api.transform_weights_for_mega_moe_sm90(l1, l2)
        self.buffer = api.get_symm_buffer_for_mega_moe(None, e, capacity, shape.topk, h, i)
        self.stats = torch.zeros(e, dtype=torch.int32, device="cuda")

    @property
    def recipe(self) -> Recipe:
        """What the calls compute."""
        silu = "fast" if self.fast_math else "precise"
        return Recipe(clamp=self.clamp, silu=silu, activation_granularity=self.granularity)

    def weights(self, expert: int) -> ExpertWeights:
        """An expert's weights as the reference takes them: bytes, gate rows then up rows."""
        (w1, w1_sf), (w2, w2_sf) = self.l1, self.l2
        matrices = (w1, w1_rows(w1.shape[1])), (w2, w2_rows(w2.shape[1]))
        w1, w2 = (untiled(w[expert : expert + 1].view(torch.uint8), rows)[0] for w, rows in matrices)
        return e4m3(w1, w1_sf[expert], w2, w2_sf[expert])

    def route(self, tokens: int, routing: str) -> Work:
        """Fills the buffer's inputs. The work of an earlier call must not be run any more."""
        shape, rank, generator = self.shape, self.buffer.rank(0), self.generator
        topk_idx = ROUTINGS[routing](tokens, self.experts, shape.topk, self.seed)
        x = torch.randn(tokens, shape.hidden, generator=generator, device="cuda")
        rank.x[:tokens], rank.x_sf[:tokens] = quantised_rows(x)
        rank.topk_idx[:tokens] = topk_idx.cuda()
        weights = torch.rand(tokens, shape.topk, generator=generator, device="cuda")
        rank.topk_weights[:tokens] = weights / weights.sum(-1, keepdim=True)
        y = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")
        recipe = self.recipe

        def call() -> None:
            api.fp8_mega_moe(y, self.l1, self.l2, self.buffer, self.stats, recipe=recipe)

        touched = topk_idx.unique().numel()
        load = Load(shape.hidden, shape.intermediate, tokens, topk_idx.numel(), touched, self.granularity)
        views = rank.x.view(torch.uint8), rank.x_sf, rank.topk_idx, rank.topk_weights
        x_bytes, x_sf, idx, weight = (view[:tokens] for view in views)
        return Work(load, call, y, (x_bytes, x_sf, idx, weight))
