"""Which rows an expert has in the pool, and which tile a block computes next. Predicts kernel/scheduler.cuh."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise

from megaproof.reference.layout import BLOCK_M

BLOCK_N = 256
"""Columns of a tile; the last one of GEMM 2 may be half as wide, and with few pool blocks all of them are."""
HALF_N = 128
"""Half a tile: in these the counters of a pool block count."""
WAVE_BLOCKS = 24
"""Pool blocks of a group: GEMM 2 of a group comes after GEMM 1 of the next."""
FEW_BLOCKS = 16
"""Up to so many pool blocks tiles of GEMM 2 may all be half as wide."""
ONCE_BYTES = 320 << 20
"""Up to so many bytes of weights, an expert's counted for each of its blocks, L2 gives up their lines before others."""


@dataclass(frozen=True)
class Plan:
    """What every block of a rank derives from the received counts, on its own and alike."""

    first_block: tuple[int, ...]
    """[E_loc + 1]: first pool block of each local expert; the end."""
    rows: tuple[int, ...]
    """[E_loc]: rows of each local expert."""
    first_row: tuple[tuple[int, ...], ...]
    """[E_loc][R]: rows of an expert from the ranks before."""
    gemm2_tile_n: int
    """Columns of a tile of GEMM 2."""


@dataclass(frozen=True)
class Task:
    """One tile of GEMM 1, or of GEMM 2 where l2."""

    l2: bool
    block: int
    """Pool block."""
    expert: int
    """Local expert."""
    first_column: int
    """Of 2I (interleaved), or of H."""
    columns: int
    rows: int
    """Rows of the pool block."""


def num_blocks_of(rows: int) -> int:
    """Pool blocks of an expert with so many rows."""
    return -(-rows // BLOCK_M)


def gemm2_tile_n(hidden: int, pool_blocks: int, blocks: int) -> int:
    """Columns of a tile of GEMM 2 for so many pool blocks and thread blocks.

    Half a tile where the pool blocks are few and that saves half a round of the thread blocks. Elsewhere tiles are
    wide: half a tile keeps fewer bytes on their way.
    """
    wide, halves = (-(-pool_blocks * -(-hidden // width) // blocks) for width in (BLOCK_N, HALF_N))
    return HALF_N if pool_blocks <= FEW_BLOCKS and halves < 2 * wide else BLOCK_N


def evicts_weights_first(hidden: int, intermediate: int, pool_blocks: int) -> bool:
    """Whether L2 is told that nobody reads the weights again. No bit depends on it, only when a line leaves L2."""
    return pool_blocks * 3 * hidden * intermediate <= ONCE_BYTES


def make_plan(counts: Sequence[Sequence[int]], hidden: int, blocks: int) -> Plan:
    """counts [R][E_loc]: rows that each source rank sends to each local expert. blocks: thread blocks of the rank."""
    by_expert = list(zip(*counts, strict=True))
    rows = tuple(map(sum, by_expert))
    first_block = tuple(accumulate(map(num_blocks_of, rows), initial=0))
    first_row = tuple(tuple(accumulate(sent[:-1], initial=0)) for sent in by_expert)
    return Plan(first_block, rows, first_row, gemm2_tile_n(hidden, first_block[-1], blocks))


def expert_of(plan: Plan, block: int) -> int:
    """The local expert of a pool block: the last one that begins at or before it, which therefore has rows."""
    return bisect_right(plan.first_block, block) - 1


def num_rows_in_block(plan: Plan, expert: int, block: int) -> int:
    """Rows of a pool block of this expert: BLOCK_M, but for its last block."""
    return min(BLOCK_M, plan.rows[expert] - (block - plan.first_block[expert]) * BLOCK_M)


def num_gemm1_half_tiles(intermediate: int) -> int:
    """What the counter of GEMM 1 comes to for a pool block: turns of HALF_N columns."""
    return 2 * intermediate // HALF_N


def num_gemm2_half_tiles(hidden: int) -> int:
    """What the counter of GEMM 2 comes to for a pool block."""
    return hidden // HALF_N


def next_task_idx(taken: int, blocks: int) -> int:
    """The next tile for a thread block of `blocks` that has one, where `taken` were given out like this before.

    The first tile of a block is its own number; then whoever asks gets the next, so that blocks which got long tasks
    take fewer.
    """
    return blocks + taken


def task_of(plan: Plan, hidden: int, intermediate: int, tile: int) -> Task | None:
    """Task `tile` = 0, 1, ... of a rank; None: no more.

    A task waits only for tasks that stand before it. Blocks take them in this order, so the first one that is not done
    waits for nothing.
    """
    tasks = all_tasks(plan, hidden, intermediate)
    return tasks[tile] if tile < len(tasks) else None


@lru_cache(maxsize=8)
def all_tasks(plan: Plan, hidden: int, intermediate: int) -> tuple[Task, ...]:
    """Every task of a rank in order.

    GEMM 1 of the first group of pool blocks; of each further group GEMM 1, then GEMM 2 of the group before; at the end
    GEMM 2 of the last. So a group's inputs of GEMM 2 are complete and still in L2, and two groups are under way at
    most: a ring of two groups is enough for their activations.
    """
    pool_blocks = plan.first_block[-1]
    first, last = (2 * intermediate, BLOCK_N), (hidden, plan.gemm2_tile_n)
    groups = [range(pool_blocks)[begin : begin + WAVE_BLOCKS] for begin in range(0, pool_blocks, WAVE_BLOCKS)]
    tasks = [*_of_group(plan, groups[0], False, *first)] if groups else []
    for before, group in pairwise(groups):
        tasks += _of_group(plan, group, False, *first)
        tasks += _of_group(plan, before, True, *last)
    return (*tasks, *_of_group(plan, groups[-1], True, *last)) if groups else ()


def _of_group(plan: Plan, group: range, l2: bool, columns: int, width: int) -> Iterator[Task]:
    """One GEMM of a group: expert after expert; all its blocks take a tile column before the next, so that each of its
    weights is read once."""
    for expert, run in groupby(group, lambda block: expert_of(plan, block)):
        blocks = list(run)
        for column in range(0, columns, width):
            for block in blocks:
                yield Task(
                    l2, block, expert, column, min(width, columns - column), num_rows_in_block(plan, expert, block)
                )
