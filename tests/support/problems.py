"""A case for a kernel test: its inputs, and what the reference makes of them.

Cases of one shape and seed share the weights of the mixed family, so that an adapter transforms them once.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.cases.inputs import Inputs
from megaproof.cases.run import run_case
from megaproof.proof.adapters import Prepared
from megaproof.quant.shapes import Shape
from megaproof.reference.layer import LayerResult
from megaproof.reference.operands import Weights

ONE = Case(Shape("one", 128, 128, 1, 1), (0,))
"""Of the default family, without a token."""
MOST_KEPT = 1 << 30
"""Bytes of a layer's weights up to which every expert is kept as it was made."""


@functools.lru_cache(maxsize=2)
def mixed_weights(shape: Shape, seed: int, device: torch.device) -> Weights:
    """Weights of every case of this shape and seed: the family makes them from these two alone."""
    weights = inputs.make(replace(ONE, shape=shape, seed=seed), device).weights
    kept = 3 * shape.experts * shape.hidden * shape.intermediate <= MOST_KEPT
    return functools.cache(weights) if kept else weights


def make(case: Case, device: torch.device | str) -> Inputs:
    """`inputs.make`, with weights that cases share where they are the same."""
    made = inputs.make(case, device)
    if case.family != ONE.family:
        return made
    return replace(made, weights=mixed_weights(case.shape, case.seed, torch.device(device)))


def prepared(case: Case, device: torch.device | str) -> tuple[Prepared, LayerResult]:
    """(the problem, the reference's traced result)."""
    made = make(case, device)
    return Prepared(case, made, torch.device(device)), run_case(case, made=made).result
