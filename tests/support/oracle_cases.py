"""Small cases of one rank for the oracle's tests: [x, x_sf, topk_idx, topk_weights, weights]. The oracle knows none of
our types: its weights are four tensors an expert."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from megaproof.cases.inputs.draws import code_lut
from megaproof.cases.inputs.lattice import make_lattice
from megaproof.quant import philox
from megaproof.quant.recipe import Recipe
from megaproof.reference.layer import moe_layer
from megaproof.reference.operands import e4m3, plain

HIDDEN, INTER, EXPERTS, TOPK = 512, 256, 8, 4


def lattice_case(tokens: int = 5, hidden: int = HIDDEN, inter: int = INTER, seed: int = 3) -> list:
    """x, x_sf, topk_idx, topk_weights, weights of one rank; slot (1, 1) is masked."""
    idx = torch.stack([(torch.arange(TOPK) * 3 + t) % EXPERTS for t in range(tokens)])
    idx[1, 1] = -1
    x, x_sf, topk_weights, weights = make_lattice(hidden, inter, EXPERTS, TOPK, [tokens], [idx], seed)
    topk_weights[0][1, 1] = 1.0  # what a kernel that ignores the mask would add
    return [x[0], x_sf[0], idx, topk_weights[0], functools.cache(plain(weights))]


class Draw:
    """Random tensors of one seed, each from the next stream of the project's generator."""

    def __init__(self, seed: int) -> None:
        self.seed, self.streams = seed, itertools.count()

    def words(self, *shape: int) -> Tensor:
        """int64, 32 bits each."""
        return philox.words(self.seed, next(self.streams), math.prod(shape)).reshape(shape)

    def codes(self, kind: str, *shape: int) -> Tensor:
        """E4M3 codes, see `draws.code_lut`; 'sparse' is 'spread' with nine zeros in ten."""
        if kind == "sparse":
            return torch.where(self.words(*shape) % 10 > 0, 0, self.codes("spread", *shape))
        return code_lut(kind)[self.words(*shape) & 255]

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """float32 in [low, high)."""
        return low + (high - low) * (self.words(*shape) >> 8).to(torch.float32) * 2.0**-24


def mixed_case(tokens: int = 6, seed: int = 1, code: str = "gaussian") -> list:
    """The same of random codes, scales that are no powers of two, gates far beyond +-10, a zero row."""
    draw = Draw(seed)
    x, x_sf = draw.codes(code, tokens, HIDDEN), draw.uniform(2**-7, 2**-6, tokens, HIDDEN // 128)
    x_sf[0] *= 16
    x[2] = 0
    idx = draw.words(tokens, EXPERTS).argsort(1)[:, :TOPK].contiguous()
    idx[1, 1] = -1
    experts = []
    for _ in range(EXPERTS):
        w1, w2 = draw.codes("gaussian", 2 * INTER, HIDDEN), draw.codes("gaussian", HIDDEN, INTER)
        w1[64:128] = 0
        w1_sf, w2_sf = (draw.uniform(2**-9, 2**-8, w.shape[0] // 128, w.shape[1] // 128) for w in (w1, w2))
        experts.append((w1, w1_sf, w2, w2_sf))
    return [x, x_sf, idx, draw.uniform(-0.3, 0.7, tokens, TOPK), experts.__getitem__]


def model_y(recipe: Recipe, case: list) -> Tensor:
    x, x_sf, idx, topk_weights, weights = case
    return moe_layer(recipe, [x], [x_sf], [idx], [topk_weights], lambda e: e4m3(*weights(e)), experts=EXPERTS).y[0]


def choices(recipe: Recipe) -> dict:
    """The recipe as fp64_layer's plain arguments."""
    return {
        "clamp": recipe.clamp,
        "silu": recipe.silu,
        "granularity": recipe.activation_granularity,
        "activation_scale": recipe.activation_scale,
        "l1_rounding": recipe.l1_rounding,
        "weight_fold": recipe.weight_fold,
    }


def everything(case: list) -> tuple[Tensor, Tensor]:
    return torch.arange(len(case[0])), torch.arange(case[0].shape[1])


def replaced(case: list, at: int, where: tuple, value: float) -> list:
    case = list(case)
    case[at] = case[at].clone()
    case[at][where] = value
    return case


def with_weights(case: list, at: int, value: float) -> list:
    def weights(e: int) -> tuple[Tensor, ...]:
        tensors = [t.clone() for t in case[4](e)]
        tensors[at][0, 0] = value
        return tuple(tensors)

    return [*case[:4], weights]
