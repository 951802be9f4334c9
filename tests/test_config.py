"""Sizes of the symmetric buffer and of shared memory: pure, so every rule is tested without a GPU."""

from __future__ import annotations

import ctypes
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel import api, config
from kernel.build import FOLDER
from kernel.config import MAX_EXPERTS, MAX_RANKS, SHARED_LIMIT, TILES, ConfigError, Problem, choose_tile

GOOD = {"ranks": 8, "experts": 256, "topk": 6, "hidden": 4096, "intermediate": 2048, "capacity": 64}


def test_shared_memory_fits_a_block() -> None:
    assert [tile.shared_bytes() for tile in TILES] == [222_208, 224_256]
    assert all(tile.shared_bytes() + 1024 <= SHARED_LIMIT for tile in TILES)


@pytest.mark.parametrize(("tokens", "block_m"), [(0, 128), (8, 128), (597, 128), (598, 256), (1024, 256)])
def test_the_tall_tile_is_for_many_rows_an_expert(tokens: int, block_m: int) -> None:
    assert choose_tile(Problem(**GOOD | {"capacity": 1024}), tokens).block_m == block_m


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("params.cuh", "kMaxRanks", config.MAX_RANKS),
        ("params.cuh", "kMaxExperts", config.MAX_EXPERTS),
        ("scheduler.cuh", "kBoxRows", config.BOX_ROWS),
        ("scheduler.cuh", "kBlockN", config.BLOCK_N),
        ("dispatch.cuh", "kChunk", config.TRANSIT_BYTES),
        ("storage.cuh", "kDispatchWarps", config.DISPATCH_WARPS),
        ("storage.cuh", "kMathWarps", (config.THREADS - 128) // 32),
        ("gemm.cuh", "kBlockK", config.BLOCK_K),
    ],
)
def test_host_and_kernel_have_the_same_constants(file: str, name: str, value: int) -> None:
    assert re.findall(rf"\b{name} = (\d+)[,;]", (FOLDER / file).read_text()) == [str(value)]


def test_params_fit_the_argument_space() -> None:
    assert ctypes.sizeof(api.Params) == 4864
    assert ctypes.sizeof(api.RankParams) == 576


@given(
    ranks=st.sampled_from([1, 2, 4, 8]),
    local=st.integers(1, 64),
    topk=st.integers(1, 32),
    capacity=st.integers(1, 200_000),
    hidden=st.integers(1, 56),
    intermediate=st.integers(1, 24),
)
def test_fields_do_not_overlap(
    ranks: int, local: int, topk: int, capacity: int, hidden: int, intermediate: int
) -> None:
    problem = Problem(ranks, ranks * local, topk, 128 * hidden, 128 * intermediate, capacity)
    offsets, total = problem.offsets()
    rows = problem.pool_rows
    assert rows % 256 == 0
    assert rows >= ranks * capacity * topk + local * 255
    assert problem.pool_blocks == rows // 128
    starts = [*offsets.values(), total]
    assert starts == sorted(starts)
    assert all(start % 1024 == 0 for start in starts)
    assert starts[1] - starts[0] >= capacity * problem.hidden
    assert total - offsets["pool_weight"] >= 4 * rows
    assert offsets["l1_acts_sf"] - offsets["l1_acts"] >= rows * problem.hidden


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("hidden", 4000, "hidden = 4000 must be a positive multiple of 128"),
        ("hidden", 0, "hidden = 0"),
        ("intermediate", 64, "intermediate = 64"),
        ("ranks", 0, "ranks = 0 must be in"),
        ("ranks", MAX_RANKS + 1, f"must be in \\[1, {MAX_RANKS}\\]"),
        ("experts", 255, "num_experts = 255 must be a multiple of ranks = 8"),
        ("experts", MAX_EXPERTS + 8, f"at most {MAX_EXPERTS}"),
        ("topk", 0, "num_topk = 0"),
        ("topk", 33, "num_topk = 33 must be in"),
        ("capacity", 0, "num_max_tokens_per_rank = 0"),
        ("capacity", 1 << 29, "below 2\\^31"),
    ],
    ids=str,
)
def test_illegal_sizes_are_refused_by_name(name: str, value: int, rule: str) -> None:
    Problem(**GOOD)
    with pytest.raises(ConfigError, match=rule):
        Problem(**{**GOOD, name: value})
