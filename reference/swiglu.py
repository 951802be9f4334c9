"""Eq. (4), Eq. (5): clamped SwiGLU times the routing weight, then re-quantisation. In fp32, each operation rounded."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from megaproof.quant.atoms import fmax, fmin
from megaproof.quant.cast import quantise_activation
from megaproof.quant.recipe import Recipe


def clamp(recipe: Recipe, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """gate = min(gate, c) only; up = min(max(up, -c), c). fminf and fmaxf drop a NaN: it becomes c, and -c."""
    if recipe.clamp is None:
        return gate, up
    c = gate.new_full((), recipe.clamp)
    return fmin(gate, c), fmin(fmax(up, -c), c)


def activate(recipe: Recipe, gate: Tensor, up: Tensor, weight: Tensor, arith: ModuleType) -> Tensor:
    """Eq. (4): v = fl(fl(silu(gate) * up) * weight), float32 [m, I]; weight float32 [m]."""
    gate, up = clamp(recipe, gate, up)
    v = arith.silu(gate, recipe.silu == "fast") * up
    return v * weight[:, None] if recipe.weight_fold == "before_quantisation" else v


def requantise(recipe: Recipe, v: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (5): (E4M3 codes uint8 [m, I], scale factors float32 [m, I/granularity])."""
    return quantise_activation(v, recipe.activation_granularity, recipe.activation_scale, recipe.zero_group)
