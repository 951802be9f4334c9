"""Every tile exactly once, and no schedule of blocks in which all of them wait."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import layout, scheduler
from reference.scheduler import BLOCK_M, BLOCK_N, Plan, Task
from tests.test_layout import COUNTS

COLUMNS = st.integers(1, 3).map(lambda n: n * 128)
BLOCKS = st.integers(1, 9)


def tasks(plan: Plan, hidden: int, intermediate: int, blocks: int) -> list[list[Task]]:
    """By block, in the order in which it takes them."""
    taken: list[list[Task]] = [[] for _ in range(blocks)]
    for block, own in enumerate(taken):
        while (task := scheduler.next_task(plan, hidden, intermediate, block, blocks, len(own))) is not None:
            own.append(task)
    return taken


def test_a_plan_by_hand() -> None:
    plan = scheduler.make_plan([[0, 130, 0, 1], [0, 126, 0, 2]])
    assert plan == Plan((0, 0, 2, 2, 3), (0, 256, 0, 3), ((0, 0), (0, 130), (0, 0), (0, 1)))
    assert [scheduler.expert_of(plan, block) for block in range(3)] == [1, 1, 3]
    assert [scheduler.rows_in_block(plan, e, block) for block, e in enumerate([1, 1, 3])] == [128, 128, 3]
    assert tasks(plan, 128, 128, 4)[1] == [Task(False, 0, 1, 1, 128), Task(False, 2, 1, 3, 3)]
    assert tasks(plan, 128, 128, 4)[2] == [Task(False, 1, 0, 1, 128), Task(True, 0, 0, 1, 128)]


@given(COUNTS)
def test_pool_blocks_hold_the_rows_of_the_layout(counts: list[list[int]]) -> None:
    plan, sent = scheduler.make_plan(counts), torch.tensor(counts)
    inside: Counter[int] = Counter()
    found = []
    for block in range(plan.first_block[-1]):
        e = scheduler.expert_of(plan, block)
        rows = scheduler.rows_in_block(plan, e, block)
        assert plan.first_block[e] <= block < plan.first_block[e + 1], "an expert without rows owns no block"
        assert 0 < rows <= BLOCK_M
        inside[e] += rows
        found += [(block * BLOCK_M + i, e) for i in range(rows)]
    assert [inside[e] for e in range(len(plan.rows))] == list(plan.rows) == sent.sum(0).tolist()
    row, expert = layout.pool_rows(sent.sum(0))
    assert found == list(zip(row.tolist(), expert.tolist(), strict=True))
    begin = torch.tensor(plan.first_block[:-1])[:, None] * BLOCK_M + torch.tensor(plan.first_row)
    assert torch.equal(begin.t(), layout.first_rows(sent))


@given(COUNTS, COLUMNS, COLUMNS, BLOCKS)
def test_every_tile_is_taken_once(counts: list[list[int]], hidden: int, intermediate: int, blocks: int) -> None:
    plan = scheduler.make_plan(counts)
    taken = [task for own in tasks(plan, hidden, intermediate, blocks) for task in own]
    columns = {False: 2 * intermediate // BLOCK_N, True: hidden // BLOCK_N}
    pool_blocks = range(plan.first_block[-1])
    wanted = [(l2, block, column) for l2 in columns for block in pool_blocks for column in range(columns[l2])]
    assert sorted((task.l2, task.block, task.column) for task in taken) == wanted
    for task in taken:
        assert task.expert == scheduler.expert_of(plan, task.block)
        assert task.rows == scheduler.rows_in_block(plan, task.expert, task.block)


@given(COUNTS, COLUMNS, COLUMNS, BLOCKS)
def test_what_a_task_waits_for_is_taken_no_later(
    counts: list[list[int]], hidden: int, intermediate: int, blocks: int
) -> None:
    last: dict[int, int] = {}  # pool block -> the turn at which its last tile of GEMM 1 is taken
    by_block = tasks(scheduler.make_plan(counts), hidden, intermediate, blocks)
    turns = [(turn, task) for own in by_block for turn, task in enumerate(own)]
    for turn, task in turns:
        if not task.l2:
            last[task.block] = max(turn, last.get(task.block, 0))
    assert all(last[task.block] <= turn for turn, task in turns if task.l2)


# --- no deadlock ------------------------------------------------------------------------------------------------------


def stuck(by_block: list[list[Task]], l1_columns: int, ahead: int, order: list[tuple[int, int]]) -> list[Task]:
    """Tasks that wait for ever when roles progress in `order`, (role, steps) each, and then whoever can.

    Each block has two roles. Its producer loads its tasks in turn, each as soon as its operands are there, at most
    `ahead` tasks before its math, which finishes what is loaded, in turn.
    """
    loaded, done = [0] * len(by_block), [0] * len(by_block)
    l1_tiles: Counter[int] = Counter()

    def step(role: int) -> bool:
        block, is_math = divmod(role, 2)
        own = by_block[block]
        if is_math:
            if moves := done[block] < loaded[block]:
                task = own[done[block]]
                l1_tiles[task.block] += not task.l2
                done[block] += 1
        elif moves := loaded[block] < min(len(own), done[block] + ahead):
            task = own[loaded[block]]
            moves = not task.l2 or l1_tiles[task.block] == l1_columns
            loaded[block] += moves
        return moves

    roles = 2 * len(by_block)
    for role, steps in order:
        for _ in range(steps):
            step(role % roles)
    while any(step(role) for role in range(roles)):
        pass
    return [own[i] for own, i in zip(by_block, done, strict=True) if i < len(own)]


ORDER = st.lists(st.tuples(st.integers(0, 17), st.integers(1, 12)), max_size=30)


@given(COUNTS, COLUMNS, COLUMNS, BLOCKS, st.integers(1, 4), ORDER)
def test_no_progress_of_blocks_ends_in_a_deadlock(
    counts: list[list[int]], hidden: int, intermediate: int, blocks: int, ahead: int, order: list[tuple[int, int]]
) -> None:
    by_block = tasks(scheduler.make_plan(counts), hidden, intermediate, blocks)
    assert stuck(by_block, 2 * intermediate // BLOCK_N, ahead, order) == []


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_a_deadlock_is_seen(blocks: int) -> None:
    """The same tasks from last to first: tiles of GEMM 2 stand before those that they wait for."""
    by_block = [own[::-1] for own in tasks(scheduler.make_plan([[300, 128]]), 256, 128, blocks)]
    assert len(stuck(by_block, 2, 1, [])) == blocks
