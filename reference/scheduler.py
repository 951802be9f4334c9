"""Which rows an expert has in the pool, and which tile a block computes next. Predicts kernel/scheduler.cuh."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from reference.layout import BLOCK_M

BLOCK_N = 128
"""Columns of a tile."""


@dataclass(frozen=True)
class Plan:
    """What every block of a rank derives from the received counts, on its own and alike."""

    first_block: tuple[int, ...]
    """[E_loc + 1]: first pool block of each local expert; the end."""
    rows: tuple[int, ...]
    """[E_loc]: rows of each local expert."""
    first_row: tuple[tuple[int, ...], ...]
    """[E_loc][R]: rows of an expert from the ranks before."""


@dataclass(frozen=True)
class Task:
    """One tile of GEMM 1, or of GEMM 2 where l2."""

    l2: bool
    block: int
    """Pool block."""
    column: int
    """Tile column: BLOCK_N columns of 2I (interleaved), or of H."""
    expert: int
    """Local expert."""
    rows: int
    """Rows of the pool block."""


def make_plan(counts: Sequence[Sequence[int]]) -> Plan:
    """counts [R][E_loc]: rows that each source rank sends to each local expert."""
    by_expert = list(zip(*counts, strict=True))
    rows = tuple(map(sum, by_expert))
    first_block = tuple(accumulate((-(-n // BLOCK_M) for n in rows), initial=0))
    return Plan(first_block, rows, tuple(tuple(accumulate(sent[:-1], initial=0)) for sent in by_expert))


def expert_of(plan: Plan, block: int) -> int:
    """The local expert of a pool block: the last one that begins at or before it, which therefore has rows."""
    return bisect_right(plan.first_block, block) - 1


def rows_in_block(plan: Plan, expert: int, block: int) -> int:
    """Rows of a pool block of this expert: BLOCK_M, but for its last block."""
    return min(BLOCK_M, plan.rows[expert] - (block - plan.first_block[expert]) * BLOCK_M)


def next_task(plan: Plan, hidden: int, intermediate: int, block: int, blocks: int, index: int) -> Task | None:
    """The task of a rank's block at its turn `index` = 0, 1, ...; None: no more.

    Every tile of GEMM 1 comes first, pool block after pool block, column after column, then those of GEMM 2; the
    `blocks` thread blocks take them in turn. So a tile of GEMM 2 waits only for tiles that were taken before it, and
    whoever took them waits for nothing that comes later.
    """
    pool_blocks = plan.first_block[-1]
    l1_columns, l2_columns = 2 * intermediate // BLOCK_N, hidden // BLOCK_N
    tile = block + index * blocks
    l2 = tile >= pool_blocks * l1_columns
    pool_block, column = divmod(tile - l2 * pool_blocks * l1_columns, l2_columns if l2 else l1_columns)
    if pool_block >= pool_blocks:
        return None
    expert = expert_of(plan, pool_block)
    return Task(l2, pool_block, column, expert, rows_in_block(plan, expert, pool_block))
