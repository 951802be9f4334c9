"""Both grouped GEMMs with their epilogues on silicon against the reference's rooms: codes, scales, BF16 rows."""

from __future__ import annotations

import ctypes

import pytest
import torch

from megaproof.cases.cases import Case
from megaproof.cases.compare import same
from megaproof.cases.run import run_case
from megaproof.kernel.host.weights import w1_rows
from megaproof.kernel.programs import grouped
from megaproof.quant import twin
from megaproof.quant.recipe import RECIPES, Recipe, RecipeError
from megaproof.quant.shapes import SHAPES
from megaproof.reference import dispatch

RECIPES_OF_THE_KERNEL = {
    f"clamp{clamp}-{silu}": Recipe(clamp=clamp, silu=silu)
    for clamp in (None, 0.0, 0.5, 1.0, 10.0)
    for silu in ("fast", "precise")
}


def test_the_cubin_passes_the_gate() -> None:
    assert set(grouped.PROGRAM.compile().report.entries) == set(grouped.PROGRAM.entries)
    assert ctypes.sizeof(grouped.GroupedParams) % 64 == 0


def test_a_pool_gives_each_expert_whole_blocks() -> None:
    expert = torch.tensor([3, 0, 3, 3, 0] + [5] * 130)
    pool = grouped.make_pool(expert)
    assert pool.block_expert.tolist() == [0, 3, 5, 5]
    assert pool.rows[:5].tolist() == [128, 0, 129, 130, 1]
    assert pool.rows[5:].tolist() == list(range(256, 386))


@pytest.mark.parametrize(
    "name", [name for name, recipe in RECIPES.items() if recipe.diff(Recipe(clamp=recipe.clamp, silu=recipe.silu))]
)
def test_other_recipes_are_refused_by_field(name: str) -> None:
    field = next(iter(RECIPES[name].diff(Recipe(clamp=RECIPES[name].clamp, silu=RECIPES[name].silu))))
    with pytest.raises(RecipeError, match=f"recipe field {field} ="):
        grouped.check_recipe(RECIPES[name])


def compare(case: Case) -> int:
    """Runs one rank's rows through both kernels and compares them with the layer's trace; returns bytes compared."""
    run = run_case(case, "cuda")
    made, trace = run.inputs, run.trace
    where = dispatch.routes(made.topk_idx)
    pool = grouped.make_pool(where.expert)
    experts = int(where.expert.max()) + 1
    four = (made.weights(e).tensors() for e in range(experts))
    w1, w1_sf, w2, w2_sf = (torch.stack(part) for part in zip(*four, strict=True))

    def in_pool(rows: torch.Tensor) -> torch.Tensor:
        out = torch.full((pool.size, *rows.shape[1:]), 0x55, dtype=torch.uint8, device="cuda").to(rows.dtype)
        out[pool.rows] = rows
        return out

    weight = torch.cat(made.topk_weights)[where.row, where.slot]
    acts, acts_sf = in_pool(trace["l1_acts"]), in_pool(trace["l1_acts_sf"]).t().contiguous()
    q, q_sf = grouped.gemm1(case.recipe, pool, acts, acts_sf, in_pool(weight), w1[:, w1_rows(w1.shape[1])], w1_sf)
    compared = same("l2_acts", trace["l2_acts"], q[pool.rows], trace["rows"])
    compared += 4 * same("l2_acts_sf", trace["l2_acts_sf"], q_sf.t()[pool.rows].contiguous(), trace["rows"])
    out = grouped.gemm2(pool, q, q_sf, w2, w2_sf)
    return compared + 2 * same("slots", trace["slots"], out[pool.rows], trace["rows"])


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES_OF_THE_KERNEL.values(), ids=RECIPES_OF_THE_KERNEL)
def test_small_layers(recipe: Recipe) -> None:
    assert compare(Case(SHAPES["smoke"], (97, 300), recipe, masked=30)) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("silu", ["fast", "precise"])
@pytest.mark.parametrize("clamp", [None, 10.0])
@pytest.mark.parametrize("family", ["mixed", "lattice"])
def test_full_size_rows_of_one_rank(clamp: float | None, silu: str, family: str) -> None:
    flash = SHAPES["dsv4_flash"]
    local = type(flash)("dsv4_flash_local", flash.hidden, flash.intermediate, experts=32, topk=flash.topk)
    clamp = 64.0 if clamp and family == "lattice" else clamp
    case = Case(local, (200,), Recipe(clamp=clamp, silu=silu), routing="zipf", family=family)
    compared = compare(case)
    print(f"{case.id}: {compared:,} bytes compared, 0 mismatches ({twin.describe('cuda')})")
    assert compared > 1_000_000
