"""Legal shapes without a GPU: the small ones under the emulator, the smallest with the reference as ranks."""

from __future__ import annotations

import pytest
import torch

from megaproof.cases.cases import Case
from megaproof.cases.pairwise import met, possible_pairs
from megaproof.kernel import emulator
from megaproof.kernel.host.sizes import BLOCK_N, MAX_EXPERTS
from megaproof.proof.adapters.reference import ReferenceAdapter
from megaproof.proof.guards import GuardedEmulatedAdapter
from megaproof.quant.recipe import RecipeError
from megaproof.quant.shapes import Shape
from megaproof.tests.support.legal_shapes import (
    AXES,
    EMULATED,
    RECYCLED,
    REPEATED,
    ROWS,
    SMALL,
    SWEEP,
    Repeating,
    allowed,
    made,
    prove_with_spare,
    size_of,
    sweep_id,
    work,
)


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler is on PATH (g++ or clang++)")
@pytest.mark.parametrize("case, spare", EMULATED, ids=sweep_id)
def test_the_emulated_kernel_passes_the_same_proof(case: Case, spare: int) -> None:
    adapter = GuardedEmulatedAdapter()
    print(f"{case.id}: {prove_with_spare(adapter, case, spare, 'cpu')}")
    assert adapter.buffer.size.capacity == max(1, max(case.tokens) + spare)


@pytest.mark.parametrize("case, spare", (*SMALL, *REPEATED), ids=sweep_id)
def test_the_reference_passes_the_same_proof(case: Case, spare: int) -> None:
    assert prove_with_spare(ReferenceAdapter(), case, spare, "cpu").launches == 3


def test_the_sweep_is_what_it_says() -> None:
    cases, ids = [case for case, _ in SWEEP], {(case.id, spare) for case, spare in SWEEP}
    assert len(ids) == len(SWEEP) <= 72
    assert set().union(*(met(row, AXES) for row in ROWS)) >= set(possible_pairs(AXES, allowed))
    sizes = [size_of(*entry) for entry in SWEEP]
    half_wide = sum(one.hidden % BLOCK_N == BLOCK_N // 2 for one in sizes)
    assert half_wide >= 5, "the last tile column of GEMM 2"
    assert len(SWEEP) - half_wide >= 5
    assert len(RECYCLED) >= 5
    assert {one.experts_local for one in sizes} >= {1, 2, 33, MAX_EXPERTS}
    assert {one.topk for one in sizes} >= {1, 31, 32}
    assert max(map(work, cases)) < 4e9
    per_128 = [case for case in cases if case.recipe.activation_granularity == 128]
    assert 20 <= len(per_128) <= len(cases) - 20
    assert {case.shape.intermediate // 128 % 2 for case in per_128} == {0, 1}, "pairs of groups, and one more"


def test_experts_repeat_where_they_should() -> None:
    """As no model of a shape allows, and as the kernel's own rules do."""
    assert {entry for entry in REPEATED if entry in EMULATED} == set(REPEATED), "all are proven without a GPU too"
    more = 0
    for case, spare in REPEATED:
        assert size_of(case, spare).topk == case.shape.topk
        more += case.shape.topk > case.shape.experts
        topk_idx = torch.cat(made(case, "cpu").topk_idx)
        repeats = [len(row) - len(set(row)) for row in ([e for e in row if e >= 0] for row in topk_idx.tolist())]
        assert max(repeats) > 0
        assert bool((topk_idx < 0).any()) == bool(case.masked)
        assert int(topk_idx.max()) < case.shape.experts
    assert more >= 5
    with pytest.raises(RecipeError, match="topk = 5 must be in"):
        Shape("two", 128, 128, 2, 5)
    with pytest.raises(RecipeError, match="hidden = 100 must be"):
        Repeating("odd", 100, 128, 2, 5)
