"""The fused kernel on silicon: all ranks of a case in one launch, every stage against the reference, bit for bit.

The matrix with 64 columns a scale is proven in test_gate.py; here are the dsv4_flash cases at 8 ranks with 128, and the
load of one of eight ranks at full size. One adapter goes through them all: what a case leaves in the buffer, the next
one finds. Guards lie between the fields and around the outputs, as proof/guards.py says.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import closing

import pytest

from megaproof.cases import inputs
from megaproof.cases.cases import CASES, SMOKE, Case
from megaproof.cases.compare import same
from megaproof.cases.pairwise import Row, met, possible_pairs, table
from megaproof.kernel.host import sizes
from megaproof.kernel.programs import moe
from megaproof.proof import exact
from megaproof.proof.adapters.megaproof import MegaproofAdapter
from megaproof.proof.guards import GuardedAdapter
from megaproof.proof.prove import Proof, prove
from megaproof.quant.recipe import RECIPES, Recipe
from megaproof.quant.shapes import SHAPES, Shape
from megaproof.tests.support import problems
from megaproof.tests.support.problems import prepared

G128 = RECIPES["granularity_128"]
FLASH = SHAPES["dsv4_flash"]


def local(name: str) -> Shape:
    """The load of one of eight ranks: an eighth of the experts, all of top-k."""
    return dataclasses.replace(SHAPES[name], name=f"{name}_local", experts=SHAPES[name].experts // 8)


LOCAL = local("dsv4_flash")
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
    Case(FLASH, (9, 0, 1, 7, 3, 0, 2, 5), G128.replace(clamp=1.0, silu="precise"), routing="zipf", masked=30),
)
"""Of 128 columns a scale, beside the one in SMOKE: up to 64 rows an expert and more, an odd number of groups."""
FLASH_8 = tuple(case for case in CASES if case.shape == FLASH and case.ranks == 8)
"""The gate's cases: 64 columns a scale."""
FLASH_8_PER_128 = tuple(
    dataclasses.replace(case, recipe=case.recipe.replace(activation_granularity=128))
    for case in sorted(FLASH_8, key=lambda case: max(case.tokens))  # so that a buffer is as large as its first case
)
RECIPES_OF_SIZE, RECIPE_IDS = (Recipe(), G128), ("g64", "g128")
KERNEL_CASES = [case for case in (*SMOKE, *PER_128) if MegaproofAdapter().claims(case.recipe) is None]

ONE_RANK = {
    "tokens": (0, 1, 7, 64, 65, 127, 128, 129, 341, 342, 682, 683, 1000, 2048, 8192),
    "routing": tuple(inputs.ROUTINGS),
    "clamp": (None, 0.5, 1.0, 10.0),
    "entry": tuple(itertools.product(("fast", "precise"), sizes.GRANULARITIES)),
}
"""entry: silu and granularity, which choose one of four kernels: every other value meets all of them. On one rank the
routing one_rank is uniform; it is here so that no routing is missing."""
NO_TOKEN = (("tokens", 0),)


def _one_rank(row: Row) -> Case:
    silu, granularity = row["entry"]
    recipe = Recipe(clamp=row["clamp"], silu=silu, activation_granularity=granularity)
    return Case(LOCAL, (row["tokens"],), recipe, routing=row["routing"])


ONE_RANK_ROWS = sorted(table(ONE_RANK, inert=NO_TOKEN), key=lambda row: row["tokens"])
OTHER_PRESETS = (
    Case(local("dsv4_pro"), (2048,), Recipe(), routing="zipf"),
    Case(local("mimo_pro"), (2048,), G128.replace(silu="precise", clamp=0.5)),
    Case(local("glm"), (2048,), Recipe(clamp=None), routing="few_experts"),
)
ONE_RANK_CASES = (*map(_one_rank, ONE_RANK_ROWS), *OTHER_PRESETS)


def proven(adapter: MegaproofAdapter, case: Case) -> Proof:
    """The proof on a GPU, of lattice cases by integers too."""
    if reason := adapter.claims(case.recipe):  # of --recipe
        pytest.skip(f"not claimed by {adapter.name}: {reason}")
    problem, expected = prepared(case, "cuda")
    integers = exact.of_case(case, problem.inputs) if exact.on_lattice(case) else None
    proof = prove(adapter, problem, expected, integers=integers)
    print(f"{case.id}: {proof}")
    return proof


@pytest.fixture
def adapter() -> Iterator[MegaproofAdapter]:
    with closing(GuardedAdapter()) as adapter:
        yield adapter


@pytest.fixture(scope="module")
def shared() -> Iterator[MegaproofAdapter]:
    """One adapter for cases that share weights and buffer."""
    with closing(GuardedAdapter()) as adapter:
        yield adapter


@pytest.fixture(scope="module", autouse=True)
def _no_weights_outlive_the_file() -> Iterator[None]:
    yield
    problems.mixed_weights.cache_clear()


@pytest.mark.parametrize("granularity", sizes.GRANULARITIES)
def test_the_cubin_passes_the_gate(granularity: int) -> None:
    assert set(moe.moe(granularity).compile().report.entries) == set(moe.ENTRIES)


def test_recipes_that_the_kernel_does_not_compute_are_named() -> None:
    for granularity in sizes.GRANULARITIES:
        recipe = Recipe(clamp=None, silu="precise", activation_granularity=granularity)
        assert MegaproofAdapter().claims(recipe) is None
    reason = MegaproofAdapter().claims(RECIPES["unfused"])
    assert reason == "recipe field l1_rounding = 'bf16' is not one that the kernel computes"


def test_every_case_of_the_gate_is_proven_per_128_too() -> None:
    assert len(FLASH_8) == 32
    assert len({case.id for case in FLASH_8_PER_128}) == len(FLASH_8)
    plain = {
        dataclasses.replace(case, recipe=case.recipe.replace(activation_granularity=64)) for case in FLASH_8_PER_128
    }
    assert plain == set(FLASH_8)
    assert {case.family for case in FLASH_8_PER_128} >= {"mixed", "lattice", "adversarial", "position"}
    assert not any(MegaproofAdapter().claims(case.recipe) for case in (*FLASH_8_PER_128, *ONE_RANK_CASES))


def test_every_two_values_of_one_rank_meet() -> None:
    pairs = set().union(*(met(row, ONE_RANK, NO_TOKEN) for row in ONE_RANK_ROWS))
    assert pairs == set(possible_pairs(ONE_RANK, lambda row: True))
    assert len({case.id for case in ONE_RANK_CASES}) == len(ONE_RANK_CASES) <= 90
    assert {case.shape.experts for case in ONE_RANK_CASES} == {32, 48, 36}


@pytest.mark.gpu
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.id)
def test_every_stage_equals_the_reference(case: Case, adapter: MegaproofAdapter) -> None:
    proof = proven(adapter, case)
    assert bool(proof.by_integers) == exact.on_lattice(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", FLASH_8_PER_128, ids=lambda case: case.id)
def test_every_case_of_the_gate_per_128(case: Case, shared: MegaproofAdapter) -> None:
    proof = proven(shared, case)
    assert bool(proof.by_integers) == exact.on_lattice(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ONE_RANK_CASES, ids=lambda case: case.id)
def test_one_rank_of_full_size(case: Case, shared: MegaproofAdapter) -> None:
    proven(shared, case)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES_OF_SIZE, ids=RECIPE_IDS)
@pytest.mark.parametrize(("tokens", "ring_blocks"), [(1000, 48), (1000, 49), (8192, 48), (8192, sizes.RING_BLOCKS)])
def test_one_rank_of_full_size_in_a_recycled_ring(tokens: int, ring_blocks: int, recipe: Recipe) -> None:
    """64 pool blocks and more, so that most activations stand where others stood before them."""
    with closing(GuardedAdapter(ring_blocks)) as adapter:
        proof = proven(adapter, Case(LOCAL, (tokens,), recipe))
    assert proof.shown == ("slots",)


@pytest.mark.gpu
def test_one_buffer_serves_both_granularities(adapter: MegaproofAdapter) -> None:
    both = [prepared(Case(SHAPES["smoke"], (33, 129), recipe), "cuda") for recipe in RECIPES_OF_SIZE]
    for problem, expected in (*both, *both):
        prove(adapter, problem, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES_OF_SIZE, ids=RECIPE_IDS)
def test_repeats_are_equal(recipe: Recipe, adapter: MegaproofAdapter) -> None:
    case = dataclasses.replace(SMOKE[3], recipe=recipe)
    problem, expected = prepared(dataclasses.replace(case, tokens=(33, 0, 64, 1, 7, 128, 129, 65)), "cuda")
    adapter.prepare(problem)
    compared = 0
    for _ in range(300):
        adapter.launch()
        for rank, y in enumerate(adapter.y()):
            compared += same("y", expected.y[rank], y)
    print(f"{compared:,} elements of y in 300 launches")
