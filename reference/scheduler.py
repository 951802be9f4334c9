"""Which rows an expert has in the pool, and which tile a thread block computes next. Predicts kernel/scheduler.cuh.

The pool is the list of all rows that a rank receives, expert after expert, in pool blocks of 128 rows of one expert.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise

from megaproof.reference.layout import BLOCK_M

BLOCK_N = 256
"""Columns of a tile. The last tile of GEMM 2 may be half as wide, and with few pool blocks all of them are."""
HALF_N = 128
"""Columns of a half tile; the counters of a pool block count these."""
WAVE_BLOCKS = 24
"""Pool blocks of a wave: GEMM 2 of a wave comes after GEMM 1 of the next one."""
FEW_BLOCKS = 16
"""Up to this many pool blocks, the tiles of GEMM 2 may all be half as wide."""
EVICT_FIRST_BYTES = 320 << 20
"""Up to this many bytes of weights, counted for each pool block, the L2 cache evicts the weights' lines first."""


@dataclass(frozen=True)
class Plan:
    """What every thread block of a rank derives from the received counts; all of them come to the same plan."""

    first_block: tuple[int, ...]
    """[E_loc + 1]: the first pool block of each local expert, then the number of pool blocks."""
    num_rows: tuple[int, ...]
    """[E_loc]: rows of each local expert."""
    first_row: tuple[tuple[int, ...], ...]
    """[E_loc][R]: rows that an expert has from the ranks before."""
    gemm2_tile_n: int
    """Columns of a tile of GEMM 2."""


@dataclass(frozen=True)
class Task:
    """One tile of GEMM 1 or of GEMM 2."""

    is_gemm2: bool
    pool_block_idx: int
    expert_idx: int
    """Local expert."""
    first_column: int
    """Among the 2I interleaved columns of GEMM 1, or the H columns of GEMM 2."""
    num_columns: int
    num_rows: int
    """Rows of the pool block."""


def num_blocks_of(num_rows: int) -> int:
    """Returns the number of pool blocks of an expert."""
    return -(-num_rows // BLOCK_M)


def gemm2_tile_n(hidden: int, num_pool_blocks: int, num_ctas: int) -> int:
    """Returns the columns of a tile of GEMM 2. num_ctas: thread blocks of the rank.

    They are HALF_N where there are few pool blocks and that saves half a round of the thread blocks, else BLOCK_N: a
    half tile keeps fewer bytes on their way.
    """
    wide, halves = (-(-num_pool_blocks * -(-hidden // width) // num_ctas) for width in (BLOCK_N, HALF_N))
    return HALF_N if num_pool_blocks <= FEW_BLOCKS and halves < 2 * wide else BLOCK_N


def evicts_weights_first(hidden: int, intermediate: int, num_pool_blocks: int) -> bool:
    """Returns whether the L2 cache evicts the lines of weights before all others. No bit depends on it."""
    return num_pool_blocks * 3 * hidden * intermediate <= EVICT_FIRST_BYTES


def make_plan(counts: Sequence[Sequence[int]], hidden: int, num_ctas: int) -> Plan:
    """Returns the plan of a rank.

    counts: [R][E_loc], the rows that each source rank sends to each local expert. num_ctas: thread blocks of the rank.
    """
    by_expert = list(zip(*counts, strict=True))
    num_rows = tuple(map(sum, by_expert))
    first_block = tuple(accumulate(map(num_blocks_of, num_rows), initial=0))
    first_row = tuple(tuple(accumulate(sent[:-1], initial=0)) for sent in by_expert)
    return Plan(first_block, num_rows, first_row, gemm2_tile_n(hidden, first_block[-1], num_ctas))


def expert_of(plan: Plan, pool_block_idx: int) -> int:
    """Returns the local expert of a pool block: the last one that begins at or before it, which therefore has rows."""
    return bisect_right(plan.first_block, pool_block_idx) - 1


def num_rows_in_block(plan: Plan, expert_idx: int, pool_block_idx: int) -> int:
    """Returns the rows of a pool block of this expert: BLOCK_M, unless it is the expert's last one."""
    return min(BLOCK_M, plan.num_rows[expert_idx] - (pool_block_idx - plan.first_block[expert_idx]) * BLOCK_M)


def num_gemm1_half_tiles(intermediate: int) -> int:
    """Returns the half tiles that GEMM 1 has in a pool block; the block's counter of GEMM 1 grows to this number."""
    return 2 * intermediate // HALF_N


def num_gemm2_half_tiles(hidden: int) -> int:
    """Returns the half tiles that GEMM 2 has in a pool block; the block's counter of GEMM 2 grows to this number."""
    return hidden // HALF_N


def next_task_idx(num_taken: int, num_ctas: int) -> int:
    """Returns the number of a thread block's next task, if the counter of the rank has given out `num_taken` before.

    The first task of a thread block is its own number. After that a counter gives out the numbers, so that thread
    blocks with long tasks take fewer.
    """
    return num_ctas + num_taken


def task_of(plan: Plan, hidden: int, intermediate: int, task_idx: int) -> Task | None:
    """Returns task number `task_idx` of a rank, or None if there is none.

    A task only waits for tasks before it. Thread blocks take tasks in this order, so the first one that is not done
    waits for nothing.
    """
    tasks = all_tasks(plan, hidden, intermediate)
    return tasks[task_idx] if task_idx < len(tasks) else None


@lru_cache(maxsize=8)
def all_tasks(plan: Plan, hidden: int, intermediate: int) -> tuple[Task, ...]:
    """Returns every task of a rank, in order.

    GEMM 1 of the first wave of pool blocks; for each further wave its GEMM 1, then GEMM 2 of the wave before; at the
    end GEMM 2 of the last wave. So the inputs of a wave's GEMM 2 are complete and still in the L2 cache, and at most
    two waves are under way: a ring of two waves is enough for their activations.
    """
    num_pool_blocks = plan.first_block[-1]
    gemm1, gemm2 = (False, 2 * intermediate, BLOCK_N), (True, hidden, plan.gemm2_tile_n)
    waves = [range(num_pool_blocks)[begin : begin + WAVE_BLOCKS] for begin in range(0, num_pool_blocks, WAVE_BLOCKS)]
    tasks = [*_of_wave(plan, waves[0], *gemm1)] if waves else []
    for before, wave in pairwise(waves):
        tasks += _of_wave(plan, wave, *gemm1)
        tasks += _of_wave(plan, before, *gemm2)
    return (*tasks, *_of_wave(plan, waves[-1], *gemm2)) if waves else ()


def _of_wave(plan: Plan, wave: range, is_gemm2: bool, num_columns: int, tile_n: int) -> Iterator[Task]:
    """One GEMM of a wave, expert after expert.

    All pool blocks of an expert take a tile column before the next column, so that its weights are read once.
    """
    for expert, run in groupby(wave, lambda pool_block: expert_of(plan, pool_block)):
        pool_blocks = list(run)
        for column in range(0, num_columns, tile_n):
            for block in pool_blocks:
                width = min(tile_n, num_columns - column)
                yield Task(is_gemm2, block, expert, column, width, num_rows_in_block(plan, expert, block))
