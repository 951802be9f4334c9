"""Sizes of the symmetric buffer and of shared memory: pure, so every rule is tested without a GPU."""

from __future__ import annotations

import ctypes
import re

import pytest
from hypothesis import given

from megaproof import HOME
from megaproof.kernel.host import sizes
from megaproof.kernel.host.buffer import BufferSize
from megaproof.kernel.host.params import Params, RankParams
from megaproof.kernel.host.sizes import (
    GROUP_BLOCKS,
    MAX_EXPERTS,
    MAX_RANKS,
    RING_BLOCKS,
    ConfigError,
)
from megaproof.quant.recipe import RECIPES, Recipe, RecipeError
from megaproof.tests.support.sizes import SIZES
from megaproof.toolchain.gate import SHARED_LIMIT

GOOD = {"ranks": 8, "experts": 256, "topk": 6, "hidden": 4096, "intermediate": 2048, "capacity": 64}


def test_shared_memory_fits_a_block() -> None:
    assert (sizes.ring_bytes(), sizes.shared_bytes()) == (201_728, 227_328)
    assert sizes.shared_bytes() + 1024 <= SHARED_LIMIT


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("params.cuh", "kMaxRanks", sizes.MAX_RANKS),
        ("params.cuh", "kMaxExperts", sizes.MAX_EXPERTS),
        ("scheduler.cuh", "kBoxRows", sizes.BOX_ROWS),
        ("scheduler.cuh", "kGroupBlocks", sizes.GROUP_BLOCKS),
        ("dispatch.cuh", "kChunk", sizes.TRANSIT_BYTES),
        ("dispatch.cuh", "kFewSlots", sizes.FEW_SLOTS),
        ("storage.cuh", "kDispatchWarps", sizes.DISPATCH_WARPS),
        ("storage.cuh", "kTasks", sizes.TASKS),
        ("gemm.cuh", "kMathWarps", (sizes.THREADS - 128) // 32),
        ("gemm.cuh", "kBlockM", sizes.BLOCK_M),
        ("gemm.cuh", "kBlockN", sizes.BLOCK_N),
        ("gemm.cuh", "kBlockK", sizes.BLOCK_K),
        ("gemm.cuh", "kStages", sizes.STAGES),
        ("gemm.cuh", "kTurnN", sizes.TURN_N),
    ],
)
def test_host_and_kernel_have_the_same_constants(file: str, name: str, value: int) -> None:
    assert re.findall(rf"\b{name} = (\d+)[,;]", (HOME / "kernel" / file).read_text()) == [str(value)]


def test_the_workspace_has_its_size() -> None:
    (struct,) = re.findall(r"struct Workspace \{(.*?)\};", (HOME / "kernel" / "params.cuh").read_text(), re.DOTALL)
    names = ", ".join(re.findall(r"u32 ([^;]+);", struct)).split(", ")
    assert names[-1] == "send_count[kMaxExperts]"
    assert 4 * (len(names) - 1 + MAX_EXPERTS) == sizes.WORKSPACE_BYTES


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


def test_params_fit_the_argument_space() -> None:
    assert ctypes.sizeof(Params) == 2816
    assert ctypes.sizeof(RankParams) == 320


@given(SIZES)
def test_fields_do_not_overlap(problem: BufferSize) -> None:
    offsets, total = problem.offsets()
    local, slots = problem.experts_local, problem.ranks * problem.capacity * problem.topk
    rows = problem.pool_rows
    most = local * min(slots, 1) + (slots - local) // 128 if slots >= local else slots
    assert problem.pool_blocks >= most, "one row of each expert, then whole blocks"
    assert problem.pool_blocks == rows // 128
    assert problem.ring_blocks == min(problem.pool_blocks, problem.ring or RING_BLOCKS)
    assert problem.ring_rows == 128 * problem.ring_blocks
    starts = [*offsets.values(), total]
    assert starts == sorted(starts)
    assert all(start % 1024 == 0 for start in starts)
    assert starts[1] - starts[0] >= problem.capacity * problem.hidden
    assert total - offsets["pool_weight"] >= 4 * rows
    assert offsets["l1_acts_sf"] - offsets["l1_acts"] >= problem.ring_rows * problem.hidden
    assert offsets["l2_acts"] - offsets["workspace"] >= 4 * 3 * problem.pool_blocks


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("hidden", 4000, "hidden = 4000 must be a positive multiple of 128"),
        ("hidden", 0, "hidden = 0"),
        ("intermediate", 64, "intermediate_hidden = 64"),
        ("ranks", 0, "ranks = 0 must be in"),
        ("ranks", MAX_RANKS + 1, f"must be in \\[1, {MAX_RANKS}\\]"),
        ("experts", 255, "num_experts = 255 must be a multiple of ranks = 8"),
        ("experts", MAX_EXPERTS + 8, f"at most {MAX_EXPERTS}"),
        ("topk", 0, "num_topk = 0"),
        ("topk", 33, "num_topk = 33 must be in"),
        ("capacity", 0, "num_max_tokens_per_rank = 0"),
        ("capacity", 1 << 29, "below 2\\^31"),
        ("capacity", 90_000_000, "the ranks' slots must be below 2\\^32"),
        ("ring", 2 * GROUP_BLOCKS - 1, "ring_blocks = 47 must be at least 48"),
        ("ring", 0, "ring_blocks = 0 must be"),
    ],
    ids=str,
)
def test_illegal_sizes_are_refused_by_name(name: str, value: int, rule: str) -> None:
    BufferSize(**GOOD)
    with pytest.raises(ConfigError, match=rule):
        BufferSize(**{**GOOD, name: value})


def test_a_ring_for_all_blocks_is_never_too_small() -> None:
    few = BufferSize(**GOOD | {"experts": 8, "capacity": 1, "ring": 1})
    assert (few.pool_blocks, few.ring_blocks) == (1, 1)
    assert BufferSize(**GOOD | {"ring": 10**6}).ring_blocks == BufferSize(**GOOD).pool_blocks
