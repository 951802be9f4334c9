"""The fused kernel on silicon: all ranks of a case in one launch, every stage against the reference, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernel import api
from kernel.adapters import Prepared
from kernel.adapters.megaproof import MegaproofAdapter
from kernel.config import TILES, Tile
from quant.recipe import SHAPES, Recipe
from reference.layer import LayerResult, moe_layer
from tests import inputs
from tests.cases import GATE, SMOKE, Case
from tests.compare import same
from tests.kernel_proof import prove

KERNEL_CASES = [case for case in (*SMOKE, *GATE) if MegaproofAdapter().claims(case.recipe) is None]


def prepared(case: Case) -> tuple[Prepared, LayerResult]:
    made = inputs.make(case, "cuda")
    expected = moe_layer(case.recipe, *made.arguments(), trace=True, experts=case.shape.experts)
    return Prepared(case, made, torch.device("cuda")), expected


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"m{tile.block_m}")
def test_the_cubin_passes_the_gate(tile: Tile) -> None:
    assert set(api.compile_moe(tile).report.entries) == set(api.ENTRIES)


def test_recipes_that_the_kernel_does_not_compute_are_named() -> None:
    assert MegaproofAdapter().claims(Recipe(clamp=None, silu="precise")) is None
    reason = MegaproofAdapter().claims(Recipe(activation_granularity=128))
    assert reason == "recipe field activation_granularity = 128 is not one that the kernel computes"


@pytest.mark.gpu
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.id)
def test_every_stage_equals_the_reference(case: Case) -> None:
    adapter = MegaproofAdapter()
    print(f"{case.id}: {prove(adapter, *prepared(case))}")
    adapter.close()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"m{tile.block_m}")
@pytest.mark.parametrize("case", [*KERNEL_CASES[:12], *KERNEL_CASES[-6:]], ids=lambda case: case.id)
def test_every_tile_whatever_the_shape_would_choose(case: Case, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kernel.api", "kernel.adapters.megaproof"):
        monkeypatch.setattr(f"{module}.choose_tile", lambda problem, tokens: tile)
    adapter = MegaproofAdapter()
    print(f"{case.id}: {prove(adapter, *prepared(case))}")
    adapter.close()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [(1,), (127,), (128,), (129,), (1000,), (8192,)], ids=lambda tokens: f"t{tokens[0]}")
def test_one_rank_of_full_size(tokens: tuple[int]) -> None:
    """The load of one of eight ranks: 32 experts, top-6."""
    flash = SHAPES["dsv4_flash"]
    local = dataclasses.replace(flash, name="dsv4_flash_local", experts=32)
    print(prove(MegaproofAdapter(), *prepared(Case(local, tokens))))


@pytest.mark.gpu
def test_repeats_are_equal() -> None:
    problem, expected = prepared(dataclasses.replace(SMOKE[3], tokens=(33, 0, 64, 1, 7, 128, 129, 65)))
    adapter = MegaproofAdapter()
    adapter.prepare(problem)
    for _ in range(300):
        adapter.launch()
        for rank, y in enumerate(adapter.y()):
            same("y", expected.y[rank], y)
