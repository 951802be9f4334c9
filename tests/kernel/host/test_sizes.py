"""The kernel's constants and its shared memory."""

from __future__ import annotations

import re

import pytest

from megaproof.kernel.host import sizes
from megaproof.quant.recipe import RECIPES, Recipe, RecipeError
from megaproof.tests.support.runs import ROOT
from megaproof.toolchain.gate import SHARED_LIMIT


def test_shared_memory_fits_a_block() -> None:
    assert (sizes.ring_bytes(), sizes.shared_bytes()) == (201_728, 227_328)
    assert sizes.shared_bytes() + 1024 <= SHARED_LIMIT


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("params.cuh", "kMaxRanks", sizes.MAX_RANKS),
        ("params.cuh", "kMaxExperts", sizes.MAX_EXPERTS),
        ("scheduler.cuh", "kBoxRows", sizes.BOX_ROWS),
        ("scheduler.cuh", "kWaveBlocks", sizes.GROUP_BLOCKS),
        ("dispatch.cuh", "kStagingBytes", sizes.TRANSIT_BYTES),
        ("dispatch.cuh", "kFewSlots", sizes.FEW_SLOTS),
        ("storage.cuh", "kNumDispatchWarps", sizes.DISPATCH_WARPS),
        ("storage.cuh", "kNumTasks", sizes.TASKS),
        ("gemm.cuh", "kNumMathWarps", (sizes.THREADS - 128) // 32),
        ("gemm.cuh", "kBlockM", sizes.BLOCK_M),
        ("gemm.cuh", "kBlockN", sizes.BLOCK_N),
        ("gemm.cuh", "kBlockK", sizes.BLOCK_K),
        ("gemm.cuh", "kNumStages", sizes.STAGES),
        ("gemm.cuh", "kHalfN", sizes.TURN_N),
    ],
)
def test_host_and_kernel_have_the_same_constants(file: str, name: str, value: int) -> None:
    assert re.findall(rf"\b{name} = (\d+)[,;]", (ROOT / "kernel" / file).read_text()) == [str(value)]


def test_recipes() -> None:
    for silu in ("fast", "precise"):
        for granularity in sizes.GRANULARITIES:
            assert sizes.check_recipe(recipe := Recipe(None, silu, activation_granularity=granularity)) is recipe
    with pytest.raises(RecipeError, match="field activation_granularity = 128 is not one that the kernel"):
        sizes.check_recipe(Recipe(activation_granularity=128), (sizes.GROUP,))
    for name in ("fp32_scales", "unfused", "pr323_small", "weight_in_combine"):
        field = next(field for field in RECIPES[name].diff(Recipe()) if field != "activation_granularity")
        with pytest.raises(RecipeError, match=f"recipe field {field} = "):
            sizes.check_recipe(RECIPES[name])
