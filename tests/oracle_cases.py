"""Small cases of one rank for the oracle's tests: [x, x_sf, topk_idx, topk_weights, weights]."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quant.recipe import Recipe
from reference.layer import moe_layer
from tests.inputs import code_lut
from tests.lattice import make_lattice

HIDDEN, INTER, EXPERTS, TOPK = 512, 256, 8, 4


def lattice_case(tokens: int = 5, hidden: int = HIDDEN, inter: int = INTER, seed: int = 3) -> list:
    """x, x_sf, topk_idx, topk_weights, weights of one rank; slot (1, 1) is masked."""
    idx = torch.stack([(torch.arange(TOPK) * 3 + t) % EXPERTS for t in range(tokens)])
    idx[1, 1] = -1
    x, x_sf, topk_weights, weights = make_lattice(hidden, inter, EXPERTS, TOPK, [tokens], [idx], seed)
    topk_weights[0][1, 1] = 1.0  # what a kernel that ignores the mask would add
    return [x[0], x_sf[0], idx, topk_weights[0], functools.cache(weights)]


def mixed_case(tokens: int = 6, seed: int = 1, code: str = "gaussian") -> list:
    """The same of random codes, scales that are no powers of two, gates far beyond +-10, a zero row."""
    g = torch.Generator().manual_seed(seed)

    def draw(lut: str, *shape: int) -> Tensor:
        return code_lut(lut)[torch.randint(0, 256, shape, generator=g)]

    def scale(low: float, *shape: int) -> Tensor:
        return low * (1 + torch.rand(shape, generator=g))

    x, x_sf = draw(code, tokens, HIDDEN), scale(2**-7, tokens, HIDDEN // 128)
    x_sf[0] *= 16
    x[2] = 0
    idx = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOPK] for _ in range(tokens)])
    idx[1, 1] = -1
    shapes = (2 * INTER, HIDDEN), (HIDDEN, INTER)
    experts = []
    for _ in range(EXPERTS):
        w1, w2 = (draw("gaussian", *shape) for shape in shapes)
        w1[64:128] = 0
        sf = [scale(2**-9, rows // 128, columns // 128) for rows, columns in shapes]
        experts.append((w1, sf[0], w2, sf[1]))
    return [x, x_sf, idx, torch.rand(tokens, TOPK, generator=g) - 0.3, experts.__getitem__]


def model_y(recipe: Recipe, case: list) -> Tensor:
    x, x_sf, idx, topk_weights, weights = case
    return moe_layer(recipe, [x], [x_sf], [idx], [topk_weights], weights, experts=EXPERTS).y[0]


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
