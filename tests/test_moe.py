"""The fused kernel on silicon: all ranks of a case in one launch, every stage against the reference, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from kernel import api, config
from kernel.adapters import Prepared
from kernel.adapters.megaproof import MegaproofAdapter
from quant.recipe import RECIPES, SHAPES, Recipe
from reference.layer import LayerResult, moe_layer
from tests import inputs
from tests.cases import GATE, SMOKE, Case
from tests.compare import same
from tests.kernel_proof import prove

G128 = RECIPES["granularity_128"]
FLASH = SHAPES["dsv4_flash"]
LOCAL = dataclasses.replace(FLASH, name="dsv4_flash_local", experts=32)
"""The load of one of eight ranks: 32 experts, top-6."""
PER_128 = (
    Case(SHAPES["smoke"], (5,) * 8, G128, routing="zipf", masked=30),
    Case(SHAPES["smoke"], (33, 0, 64, 1, 7, 128, 129, 65), G128.replace(silu="precise")),
    Case(SHAPES["smoke"], (64,), G128.replace(clamp=None), routing="one_hot"),
    Case(SHAPES["smoke"], (65,), G128, routing="one_hot"),
    Case(SHAPES["smoke"], (129,), G128, routing="one_hot"),
    Case(SHAPES["smoke"], (33, 64, 1, 65), G128.replace(clamp=None), family="adversarial"),
    Case(SHAPES["smoke"], (129, 7), G128.replace(clamp=None), family="lattice", masked=30),
    Case(dataclasses.replace(SHAPES["smoke"], name="smoke_i128", intermediate=128), (40, 90), G128),
    Case(dataclasses.replace(SHAPES["smoke"], name="smoke_i384", intermediate=384), (40, 90), G128),
    Case(FLASH, (8,) * 8, G128),
    Case(FLASH, (9, 0, 1, 7, 3, 0, 2, 5), G128.replace(clamp=1.0, silu="precise"), routing="zipf", masked=30),
)
"""Of 128 columns a scale, beside the one in SMOKE: up to 64 rows an expert and more, an odd number of groups."""
RECIPES_OF_SIZE, RECIPE_IDS = (Recipe(), G128), ("g64", "g128")
KERNEL_CASES = [case for case in (*SMOKE, *GATE, *PER_128) if MegaproofAdapter().claims(case.recipe) is None]


def prepared(case: Case) -> tuple[Prepared, LayerResult]:
    made = inputs.make(case, "cuda")
    expected = moe_layer(case.recipe, *made.arguments(), trace=True, experts=case.shape.experts)
    return Prepared(case, made, torch.device("cuda")), expected


@pytest.fixture
def adapter() -> Iterator[MegaproofAdapter]:
    with closing(MegaproofAdapter()) as adapter:
        yield adapter


@pytest.mark.parametrize("granularity", config.GRANULARITIES)
def test_the_cubin_passes_the_gate(granularity: int) -> None:
    assert set(api.compile_moe(granularity).report.entries) == set(api.ENTRIES)


def test_recipes_that_the_kernel_does_not_compute_are_named() -> None:
    for granularity in config.GRANULARITIES:
        recipe = Recipe(clamp=None, silu="precise", activation_granularity=granularity)
        assert MegaproofAdapter().claims(recipe) is None
    reason = MegaproofAdapter().claims(RECIPES["unfused"])
    assert reason == "recipe field l1_rounding = 'bf16' is not one that the kernel computes"


@pytest.mark.gpu
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.id)
def test_every_stage_equals_the_reference(case: Case, adapter: MegaproofAdapter) -> None:
    print(f"{case.id}: {prove(adapter, *prepared(case))}")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES_OF_SIZE, ids=RECIPE_IDS)
@pytest.mark.parametrize("tokens", [(1,), (127,), (128,), (129,), (1000,), (8192,)], ids=lambda tokens: f"t{tokens[0]}")
def test_one_rank_of_full_size(tokens: tuple[int], recipe: Recipe, adapter: MegaproofAdapter) -> None:
    print(prove(adapter, *prepared(Case(LOCAL, tokens, recipe))))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES_OF_SIZE, ids=RECIPE_IDS)
@pytest.mark.parametrize(("tokens", "ring_blocks"), [(1000, 48), (1000, 49), (8192, 48), (8192, config.RING_BLOCKS)])
def test_one_rank_of_full_size_in_a_recycled_ring(tokens: int, ring_blocks: int, recipe: Recipe) -> None:
    """64 pool blocks and more, so that most activations stand where others stood before them."""
    with closing(MegaproofAdapter(ring_blocks)) as adapter:
        proof = prove(adapter, *prepared(Case(LOCAL, (tokens,), recipe)))
    print(proof)
    assert proof.shown == ("slots",)


@pytest.mark.gpu
def test_one_buffer_serves_both_granularities(adapter: MegaproofAdapter) -> None:
    both = [prepared(Case(SHAPES["smoke"], (33, 129), recipe)) for recipe in RECIPES_OF_SIZE]
    for problem, expected in (*both, *both):
        prove(adapter, problem, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES_OF_SIZE, ids=RECIPE_IDS)
def test_repeats_are_equal(recipe: Recipe, adapter: MegaproofAdapter) -> None:
    case = dataclasses.replace(SMOKE[3], recipe=recipe)
    problem, expected = prepared(dataclasses.replace(case, tokens=(33, 0, 64, 1, 7, 128, 129, 65)))
    adapter.prepare(problem)
    for _ in range(300):
        adapter.launch()
        for rank, y in enumerate(adapter.y()):
            same("y", expected.y[rank], y)
