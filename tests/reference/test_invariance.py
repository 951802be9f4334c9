"""What must not change y, and what must change it by exactly a power of two: properties, at smoke size, bit for bit.

The examples are hypothesis's, the same in each run of the gate; `--hypothesis-profile default` looks for others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.cases.inputs import Inputs, make
from megaproof.quant import twin
from megaproof.quant.recipe import RECIPES
from megaproof.quant.shapes import SHAPES
from megaproof.reference import dispatch, gemm
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.stages import SHOWN, STAGES
from megaproof.tests.support.bit_patterns import assert_same
from megaproof.tests.support.threads import threads

SHAPE = SHAPES["smoke"]
EXPERTS, TOPK = SHAPE.experts, SHAPE.topk
TOKENS = 13
"""Tokens of every example, before they are spread: one of each kind of the adversarial family."""
few = settings(max_examples=10)

cases = st.builds(
    lambda name, family, seed, masked: Case(SHAPE, (TOKENS,), RECIPES[name], family=family, seed=seed, masked=masked),
    st.sampled_from(list(RECIPES)),
    st.sampled_from(["mixed", "adversarial", "heavy_tail"]),
    st.integers(0, 2),
    st.sampled_from([0, 30]),
)
seeds = st.integers(0, 2**31)
"""Of torch's generator: they shuffle and choose, and decide no value of an input."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@functools.cache
def base(case: Case) -> tuple[Inputs, LayerResult]:
    """One rank's inputs, each expert made once, and the layer's result."""
    made = make(case)
    made = replace(made, weights=functools.cache(made.weights))
    return made, run(case, made)


def run(case: Case, made: Inputs, **options: object) -> LayerResult:
    options = {"experts": EXPERTS, "trace": True} | options
    return moe_layer(case.recipe, *made.arguments(), **options)


def rows_of(made: Inputs, order: Tensor | list[int], sizes: list[int] | None = None) -> Inputs:
    """Chosen tokens of one rank, in an order, spread over ranks of these sizes."""
    parts = [part[0][order] for part in made.arguments()[:4]]
    return Inputs(*(list(part.split(sizes or [len(part)])) for part in parts), made.weights)


def shuffled(seed: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@st.composite
def spreads(draw: st.DrawFn) -> list[int]:
    """Tokens of 1, 2, 4 or 8 ranks, uneven and idle ones among them."""
    ranks = draw(st.sampled_from([1, 2, 4, 8]))
    cuts = sorted(draw(st.lists(st.integers(0, TOKENS), min_size=ranks - 1, max_size=ranks - 1)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, TOKENS], strict=True)]


# --- where a token is -------------------------------------------------------------------------------------------------


@few
@given(cases, spreads(), seeds)
def test_ep_degree_rank_order_and_token_order(case: Case, sizes: list[int], seed: int) -> None:
    """Any order of the tokens on any number of ranks: every token keeps its bits, every expert its count."""
    made, whole = base(case)
    order = shuffled(seed, TOKENS)
    spread = run(case, rows_of(made, order, sizes))
    assert [len(y) for y in spread.y] == sizes
    assert_same(torch.cat(spread.y), whole.y[0][order])
    assert_same(torch.cat(spread.stats), whole.stats[0])


@few
@given(cases, spreads(), st.permutations(range(8)))
def test_ranks_in_another_order(case: Case, sizes: list[int], order: list[int]) -> None:
    """Ranks swap their tokens: each rank's y goes along."""
    made, whole = base(case)
    order = [rank for rank in order if rank < len(sizes)]
    starts = [0, *accumulate(sizes)]
    tokens = [i for rank in order for i in range(starts[rank], starts[rank + 1])]
    swapped = run(case, rows_of(made, tokens, [sizes[rank] for rank in order]))
    parts = whole.y[0].split(sizes)
    for place, rank in enumerate(order):
        assert_same(swapped.y[place], parts[rank])


@few
@given(cases, spreads())
def test_batches_and_their_statistics(case: Case, sizes: list[int]) -> None:
    """One call after the other: the same y as in one batch, and counts that add up to its counts."""
    made, whole = base(case)
    stats, y, start = [torch.zeros(EXPERTS, dtype=torch.int32)], [], 0
    for size in sizes:
        part = run(case, rows_of(made, list(range(start, start + size))), stats=stats)
        stats, start = part.stats, start + size
        y += part.y
    assert_same(torch.cat(y), whole.y[0])
    assert_same(stats[0], whole.stats[0])


@few
@given(cases, seeds)
def test_the_order_in_which_rows_reach_an_expert(case: Case, seed: int) -> None:
    """Dispatch may deliver in any order: every stage of every row is the same."""
    made, whole = base(case)
    plain = dispatch.Routes.of_expert

    def in_any_order(self: dispatch.Routes, e: int) -> Tensor:
        rows = plain(self, e)
        return rows[shuffled(seed + e, len(rows))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.Routes, "of_expert", in_any_order)
        other = run(case, made)
    for stage in STAGES:
        assert_same(other.trace[stage], whole.trace[stage])


@pytest.mark.parametrize("family", ["mixed", "adversarial"])
def test_one_and_two_threads(family: str) -> None:
    case = Case(SHAPE, (9, 4), family=family, masked=30)
    made = make(case)
    alone = run(case, made)
    with threads(2):
        both = run(case, made)
    for stage in STAGES:
        assert_same(both.trace[stage], alone.trace[stage])


# --- slots and experts ------------------------------------------------------------------------------------------------


@few
@given(cases, seeds, st.sampled_from([float("nan"), float("inf"), -1e30]))
def test_masked_slots_are_inert(case: Case, seed: int, garbage: float) -> None:
    """Padding of a buffer, and single masked slots: whatever their bytes, scales and weights, nobody else changes."""
    made, _ = base(case)
    chance = torch.rand(TOKENS, TOPK, generator=torch.Generator().manual_seed(seed))
    made = replace(made, topk_idx=[torch.where(chance < 0.3, -1, made.topk_idx[0])])
    clean = run(case, made)

    order = shuffled(seed, TOKENS + 3)
    padded = [torch.cat([part[0], part[0][:3]])[order] for part in made.arguments()[:4]]
    x, x_sf, idx, weight = padded
    padding = order >= TOKENS
    x[padding], x_sf[padding], idx[padding] = 0x7F, garbage, -1
    weight[idx < 0] = garbage
    result = run(case, Inputs([x], [x_sf], [idx], [weight], made.weights))
    assert_same(result.y[0][~padding], clean.y[0][order[~padding]])
    assert result.y[0][padding].view(torch.int16).count_nonzero() == 0
    assert_same(result.stats[0], clean.stats[0])


@few
@given(cases, seeds)
def test_a_weight_of_zero_is_as_good_as_a_mask(case: Case, seed: int) -> None:
    """Of either sign: its slot is +0, and y that of the masked slot. Statistics still count it."""
    made, _ = base(case)
    chance = torch.rand(TOKENS, TOPK, generator=torch.Generator().manual_seed(seed))
    zero = torch.where(chance < 0.15, 0.0, torch.where(chance > 0.85, -0.0, made.topk_weights[0]))
    hit = (chance < 0.15) | (chance > 0.85)
    weighted = run(case, replace(made, topk_weights=[zero]))
    masked = run(case, replace(made, topk_idx=[torch.where(hit, -1, made.topk_idx[0])]))
    assert_same(weighted.y[0], masked.y[0])
    assert int(weighted.stats[0].sum()) == len(weighted.trace["rows"])
    if case.recipe.weight_fold == "before_quantisation":
        _, token, slot = weighted.trace["rows"].unbind(1)
        assert weighted.trace["slots"][hit[token, slot]].view(torch.int16).count_nonzero() == 0


@few
@given(cases, st.permutations(range(TOPK)))
def test_a_token_may_name_its_experts_in_another_order(case: Case, order: list[int]) -> None:
    """Each slot keeps its bits and goes along; only the sum over the slots may round another way."""
    made, whole = base(case)
    idx, weight = made.topk_idx[0][:, order].contiguous(), made.topk_weights[0][:, order].contiguous()
    other = run(case, replace(made, topk_idx=[idx], topk_weights=[weight]))
    place = {tuple(row): i for i, row in enumerate(whole.trace["rows"].tolist())}
    at = [place[rank, token, order[slot]] for rank, token, slot in other.trace["rows"].tolist()]
    for stage in SHOWN:
        assert_same(other.trace[stage], whole.trace[stage][at])


@few
@given(cases, seeds, st.sampled_from([EXPERTS, 2 * EXPERTS, 3 * EXPERTS + 8]), st.sampled_from([1, 2, 4, 8]))
def test_names_of_experts_and_empty_experts(case: Case, seed: int, experts: int, ranks: int) -> None:
    """Experts get other numbers, on other ranks, with empty ones between them: y stays, counts move along."""
    made, whole = base(case)
    name = shuffled(seed, experts)[:EXPERTS]
    known = {int(new): old for old, new in enumerate(name)}
    idx = torch.where(made.topk_idx[0] >= 0, name[made.topk_idx[0]], -1)
    renamed = Inputs(*made.arguments()[:2], [idx], made.topk_weights, lambda e: made.weights(known[e]))
    result = run(case, rows_of(renamed, list(range(TOKENS)), [TOKENS] + [0] * (ranks - 1)), experts=experts)
    assert_same(result.y[0], whole.y[0])
    counts = torch.cat(result.stats)
    assert_same(counts[name], whole.stats[0])
    assert int(counts.sum()) == int(whole.stats[0].sum()), "empty experts count nothing"


# --- powers of two ----------------------------------------------------------------------------------------------------


@few
@given(st.sampled_from(["mixed", "heavy_tail"]), st.integers(0, 2), st.integers(0, EXPERTS - 1), st.integers(-40, 40))
def test_a_power_of_two_on_the_scales_of_x_scales_gate_and_up(family: str, seed: int, e: int, power: int) -> None:
    """Exactly, as on the scales of W1: no rounding of Eq. (2), (3) depends on it. And -x gives -gate and -up."""
    case = Case(SHAPE, (TOKENS,), family=family, seed=seed)
    made, arith = base(case)[0], twin.arith("cpu")
    x, x_sf, w1 = made.x[0], made.x_sf[0], made.weights(e).l1
    plain = gemm.gemm1(case.recipe, x, x_sf, w1, arith)
    by_x = gemm.gemm1(case.recipe, x, x_sf * 2.0**power, w1, arith)
    by_w = gemm.gemm1(case.recipe, x, x_sf, w1._replace(scales=w1.scales * 2.0**power), arith)
    negative = gemm.gemm1(case.recipe, x ^ 0x80, x_sf, w1, arith)
    for before, *after, minus in zip(plain, by_x, by_w, negative, strict=True):
        assert int((before != 0).sum()) > before.numel() // 2
        for value in after:
            assert_same(value, before * 2.0**power)
        assert_same(minus, 0.0 - before)  # +0 stays +0


@few
@given(cases.filter(lambda case: case.family != "adversarial"), st.integers(-3, 20), st.booleans())
def test_a_power_of_two_on_the_routing_weights_scales_y(case: Case, power: int, negate: bool) -> None:
    """The scale factors and slots take it whole and the codes keep theirs, but for the sign; so does y.

    As long as no exponent leaves its range: zero groups keep their scale, and the fp32 scale kind has a least one. The
    adversarial family is left out, since its tiny tokens stand at the end of the range.
    """
    made, whole = base(case)
    factor = -(2.0**power) if negate else 2.0**power
    scaled = run(case, replace(made, topk_weights=[made.topk_weights[0] * factor]))
    before, after, recipe = whole.trace, scaled.trace, case.recipe
    if recipe.weight_fold == "in_combine":
        for stage in SHOWN:
            assert_same(after[stage], before[stage])
    else:
        assert_same(after["l2_acts"], before["l2_acts"] ^ (0x80 if negate else 0))
        sf = before["l2_acts_sf"]
        live = (before["l2_acts"] & 0x7F > 0).unflatten(1, (sf.shape[1], -1)).any(2)
        assert int(live.sum()) > live.numel() // 4
        assert_same(after["l2_acts_sf"], torch.where(live, sf * 2.0**power, sf))
        assert_same(after["slots"], before["slots"] * factor + 0.0)
    assert_same(scaled.y[0], whole.y[0] * factor + 0.0)
