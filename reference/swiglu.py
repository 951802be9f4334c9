"""Eq. (4), Eq. (5): clamped SwiGLU times the routing weight, then re-quantisation. Each fp32 operation rounds once.

Predicts kernel/swiglu.cuh.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from megaproof.quant.atoms import fmax, fmin
from megaproof.quant.cast import quantise_activation
from megaproof.quant.host_state import guarded
from megaproof.quant.recipe import Recipe


@guarded
def clamp(recipe: Recipe, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns gate = min(gate, c), without a lower clamp, and up = min(max(up, -c), c); float32 [m, I] each.

    fminf and fmaxf return the other operand of a NaN: a NaN gate becomes c, a NaN up becomes -c.
    """
    if recipe.clamp is None:
        return gate, up
    c = gate.new_full((), recipe.clamp)
    return fmin(gate, c), fmin(fmax(up, -c), c)


@guarded
def activate(recipe: Recipe, gate: Tensor, up: Tensor, weight: Tensor, arith: ModuleType) -> Tensor:
    """Eq. (4): returns v = fl(fl(silu(gate) * up) * weight), float32 [m, I].

    gate, up: float32 [m, I], not clamped yet. weight: float32 [m]; it is left out if the recipe folds it into combine.
    """
    gate, up = clamp(recipe, gate, up)
    v = arith.silu(gate, recipe.silu == "fast") * up
    return v * weight[:, None] if recipe.weight_fold == "before_quantisation" else v


@guarded
def requantise(recipe: Recipe, v: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (5): returns v, float32 [m, I], as E4M3 codes uint8 [m, I] and scales float32 [m, I/granularity]."""
    return quantise_activation(v, recipe.activation_granularity, recipe.activation_scale, recipe.zero_group)
