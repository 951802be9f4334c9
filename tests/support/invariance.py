"""What tests of invariance on silicon share: batches, a launch over garbage, and a comparison that is counted."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.cases.compare import same
from megaproof.cases.inputs import Inputs
from megaproof.kernel import api
from megaproof.kernel.host.sizes import BLOCK_M, GRANULARITIES, WAVE_BLOCKS, aligned
from megaproof.proof import tally as compared
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.megaproof import MegaproofAdapter
from megaproof.proof.guards import GuardedAdapter
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import SHAPES, Shape
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.tests.support import problems

CUDA = torch.device("cuda")
SMOKE = SHAPES["smoke"]
LOCAL = replace(SHAPES["dsv4_flash"], name="dsv4_flash_local", experts=32)
"""The load of one of eight ranks."""
TOKENS = 129
UNEVEN = (33, 0, 64, 1, 7, 128, 129, 65)
"""For 8 ranks: many rows an expert."""
LEAST = 2 * WAVE_BLOCKS
"""Blocks of the smallest ring."""
RECYCLING = {
    "smoke-r1": (SMOKE, (3000,)),
    "crowded-r8": (replace(SMOKE, name="smoke_crowded", experts=8 * (LEAST + 8)), UNEVEN),
    "flash-r1": (LOCAL, (1000,)),
}
"""Batches that fill more pool blocks of a rank than LEAST: of many rows an expert, of few, of real size."""
NAN = 0xFF
per_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda granularity: f"g{granularity}")
Tally = Counter[str]
"""Stage -> elements compared."""


def case_of(shape: Shape, sizes: tuple[int, ...], granularity: int, masked: int = 0) -> Case:
    return Case(shape, sizes, Recipe(activation_granularity=granularity), masked=masked)


@functools.lru_cache(maxsize=8)
def problem(case: Case) -> tuple[Inputs, LayerResult]:
    """A case's inputs, with weights that the cases of its shape share, and the reference's result."""
    made = problems.make(case, CUDA)
    return made, moe_layer(case.recipe, *made.arguments(), experts=case.shape.experts)


def recycled(wanted: LayerResult, ring_blocks: int) -> bool:
    """Whether some rank fills more pool blocks than its ring has."""
    return any(sum(aligned(n, BLOCK_M) for n in counts.tolist()) > ring_blocks * BLOCK_M for counts in wanted.stats)


def chosen(made: Inputs, rows: Sequence[Tensor | slice]) -> Inputs:
    """These tokens of each rank."""
    parts = [[tensor[r] for tensor, r in zip(part, rows, strict=True)] for part in made.arguments()[:4]]
    return Inputs(*parts, made.weights)


def spread(made: Inputs, sizes: Sequence[int]) -> Inputs:
    """One rank's tokens over ranks of these sizes."""
    return Inputs(*(list(part[0].split(list(sizes))) for part in made.arguments()[:4]), made.weights)


def prepare(adapter: GuardedAdapter, case: Case, made: Inputs) -> None:
    """Every byte that the launch has to write is a NaN's before it."""
    adapter.prepare(Prepared(replace(case, tokens=tuple(map(len, made.x))), made, CUDA))
    adapter.fill(NAN)


def run(adapter: GuardedAdapter, case: Case, made: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """(y, stats) of one launch, by rank."""
    prepare(adapter, case, made)
    adapter.launch()
    return adapter.y(), adapter.stats()


def enqueue(adapter: GuardedAdapter, case: Case) -> None:
    """A launch that nobody waits for."""
    l1, l2 = zip(*adapter.weights, strict=True)
    if adapter.buffer is None:
        raise ValueError("adapter.buffer is None: prepare the adapter first")
    api.fp8_mega_moe(adapter.outputs, l1, l2, adapter.buffer, adapter.counts, recipe=case.recipe)


def assert_same(
    tally: Tally, stage: str, wanted: Sequence[Tensor] | Tensor, found: Sequence[Tensor] | Tensor, when: str = ""
) -> None:
    """The same bits, of one tensor or of one a rank."""
    pairs = [(wanted, found)] if isinstance(wanted, Tensor) else zip(wanted, found, strict=True)
    for rank, (a, b) in enumerate(pairs):
        elements = same(f"{stage} of rank {rank}{when and f', {when}'}", a, b)
        tally[stage] += elements
        compared.add(MegaproofAdapter.name, {stage: elements}, 0)
