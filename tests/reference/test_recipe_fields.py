"""No field of the recipe is dead, and what each input family can see of it: the first stage that a flip changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megaproof.cases.cases import GATE, Case
from megaproof.cases.inputs import FAMILIES, Inputs, make
from megaproof.quant.recipe import CHOICES, RECIPES, Recipe
from megaproof.quant.shapes import SHAPES
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.stages import STAGES
from megaproof.tests.support.bit_patterns import assert_same
from megaproof.tests.support.threads import threads

SMOKE = SHAPES["smoke"]

FIRST_STAGE: dict[tuple[str, Any], str] = {
    ("clamp", None): "l2_acts",
    ("clamp", 1.0): "l2_acts",
    ("silu", "precise"): "l2_acts",
    ("activation_scale", "fp32"): "l2_acts",
    ("activation_granularity", 128): "l2_acts",
    ("l1_rounding", "bf16"): "l2_acts",
    ("weight_fold", "in_combine"): "l2_acts",
    ("zero_group", "public"): "l2_acts_sf",
}
"""The first stage that each flip of a field of the default recipe changes, where the inputs show it."""

SILU, ZERO, L1 = ("silu", "precise"), ("zero_group", "public"), ("l1_rounding", "bf16")
EXCEPT: dict[str, dict[tuple[str, Any], str | None]] = {
    "mixed": {SILU: None},  # an ulp of silu is lost in re-quantisation: the adversarial family is there for it
    "adversarial": {},
    "gaussian": {SILU: None, ZERO: None, ("clamp", None): None},  # what a harness of normal numbers cannot see
    "heavy_tail": {ZERO: None},
    "lattice": {SILU: None, L1: None, ("activation_granularity", 128): "l2_acts_sf"},
    "position": {SILU: None, L1: None, ZERO: None, ("weight_fold", "in_combine"): "l2_acts_sf"},
}
"""Where a family shows a flip in another stage, or (None) in no stage at all."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def first_difference(one: LayerResult, other: LayerResult) -> str | None:
    assert one.trace is not None
    assert other.trace is not None
    for stage in STAGES:
        a, b = one.trace[stage], other.trace[stage]
        if a.shape != b.shape or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return stage
    return None


def flips(made: Inputs, experts: int) -> dict[tuple[str, Any], str | None]:
    """First stage that each flip changes."""

    def run(recipe: Recipe) -> LayerResult:
        return moe_layer(recipe, *made.arguments(), experts=experts, trace=True)

    ours = run(Recipe())
    return {flip: first_difference(ours, run(Recipe().replace(**{flip[0]: flip[1]}))) for flip in FIRST_STAGE}


def test_the_table_of_flips_is_whole() -> None:
    built = {(name, value) for name, (values, _) in CHOICES.items() for value in values[1:]}
    assert built | {("clamp", None), ("clamp", 1.0)} == set(FIRST_STAGE)
    single = {name for name, (built, _) in CHOICES.items() if len(built) == 1}
    assert single == {"accumulation", "combine_payload", "weight_format", "dispatch_payload"}
    assert {field.name for field in dataclasses.fields(Recipe)} == single | {name for name, _ in FIRST_STAGE}
    assert set(EXCEPT) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_alive(family: str) -> None:
    """Every family at smoke size: which flips show, and where first; the adversarial one sees them all."""
    seen = flips(make(Case(SMOKE, (8, 4), family=family)), SMOKE.experts)
    for (name, value), stage in seen.items():
        print(f"{family:12} {name} = {value}: {stage or 'nothing changes'}")
    assert seen == FIRST_STAGE | EXCEPT[family]
    assert not EXCEPT["adversarial"], "no field is out of sight"


@pytest.mark.parametrize("family", ["mixed", "adversarial"])
def test_every_field_is_alive_at_full_size(family: str) -> None:
    """The gate's first case, the expert with most rows alone."""
    case = dataclasses.replace(GATE[0], family=family)
    assert case.recipe == Recipe()
    made, experts = make(case), case.shape.experts
    routed = torch.cat(made.topk_idx)
    e = int(torch.bincount(routed[routed >= 0], minlength=experts).argmax())
    own = [torch.where(idx == e, idx, -1) for idx in made.topk_idx]
    kept = made.weights(e)
    seen = flips(dataclasses.replace(made, topk_idx=own, weights=lambda _: kept), experts)
    print(f"{case.id}, expert {e}, {int((routed == e).sum())} rows: {seen}")
    assert seen == FIRST_STAGE | EXCEPT[family]


def test_the_public_zero_rule_never_reaches_y() -> None:
    made = make(Case(SMOKE, (8, 4)))
    ours, public = (
        moe_layer(RECIPES[name], *made.arguments(), experts=16, trace=True) for name in ("default", "pr323_small")
    )
    assert ours.trace is not None
    assert public.trace is not None
    changed = ours.trace["l2_acts_sf"] != public.trace["l2_acts_sf"]
    assert int(changed.sum()) > 0
    assert set(public.trace["l2_acts_sf"][changed].tolist()) == {0.0}
    for stage in ("l2_acts", "slots", "y"):
        assert_same(public.trace[stage], ours.trace[stage])
