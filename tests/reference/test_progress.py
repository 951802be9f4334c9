"""Whatever order the roles of a rank go on in, no task waits for ever, and none finds another block's activations."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaproof.reference import scheduler
from megaproof.reference.scheduler import HALF_N, WAVE_BLOCKS, Task
from megaproof.tests.support.received import BLOCKS, COLUMNS, LEAST, MANY


class Race(AssertionError):
    """A tile found another block's activations where its own should be."""


class Machine:
    """The roles of a rank: dispatch warps, and of each block a producer and its math.

    Dispatch warps pull the rows of each pool block in turn, row n by warp n mod `pullers`. A producer that begins a
    tile takes its next one at the same time; it loads a tile as soon as its operands are there, at most `ahead` tiles
    before its math, which finishes what is loaded, in turn.
    """

    def __init__(
        self,
        counts: list[list[int]],
        hidden: int,
        intermediate: int,
        blocks: int,
        ring: int,
        ahead: int = 1,
        pullers: int = 3,
    ) -> None:
        plan = scheduler.make_plan(counts, hidden, blocks)
        self.tasks = scheduler.all_tasks(plan, hidden, intermediate)
        self.all_half_tiles = {
            False: scheduler.num_gemm1_half_tiles(intermediate),
            True: scheduler.num_gemm2_half_tiles(hidden),
        }
        """Half tiles of a pool block, by GEMM."""
        self.blocks, self.ring, self.ahead, self.pullers = blocks, ring, ahead, pullers
        self.forget: bool | None = None
        """The GEMM whose reading of the ring no role waits for; None: all wait."""
        self.roles = pullers + 2 * blocks
        self.taken = 0
        """Tiles given out by the counter."""
        self.tile = list(range(blocks))
        self.begun: list[Task | None] = [None] * blocks
        self.loaded: list[list[Task]] = [[] for _ in range(blocks)]
        self.done: set[Task] = set()
        self.pulled = [0] * pullers
        self.rows: Counter[int] = Counter()
        self.half_tiles = {l2: Counter[int]() for l2 in (False, True)}
        self.standing: dict[bool, dict[int, int]] = {l2: {} for l2 in (False, True)}
        """By GEMM: place in the ring -> the pool block whose inputs stand there."""
        sizes = [
            scheduler.num_rows_in_block(plan, scheduler.expert_of(plan, block), block)
            for block in range(plan.first_block[-1])
        ]
        self.first_row = list(accumulate(sizes, initial=0))

    def step(self, role: int) -> bool:
        """Whether this role could do something."""
        if role < self.pullers:
            return self.pull(role)
        block, is_math = divmod(role - self.pullers, 2)
        return self.finish(block) if is_math else self.load(block)

    def free(self, l2: bool, block: int) -> bool:
        """Whether this GEMM is done with the pool block that stood in a block's place before."""
        return (
            block < self.ring or self.forget is l2 or self.half_tiles[l2][block - self.ring] == self.all_half_tiles[l2]
        )

    def pull(self, warp: int) -> bool:
        block = self.pulled[warp]
        if block + 1 == len(self.first_row):
            return False
        first, end = self.first_row[block : block + 2]
        if own := len(range(first + (warp - first) % self.pullers, end, self.pullers)):
            if not self.free(False, block):
                return False
            self.standing[False][block % self.ring] = block
            self.rows[block] += own
        self.pulled[warp] += 1
        return True

    def load(self, block: int) -> bool:
        task = self.begun[block]
        if task is None:
            if self.tile[block] >= len(self.tasks):
                return False
            self.begun[block] = self.tasks[self.tile[block]]
            self.tile[block] = scheduler.next_task_idx(self.taken, self.blocks)
            self.taken += 1
            return True
        if len(self.loaded[block]) == self.ahead:
            return False
        if task.is_gemm2:
            ready = self.half_tiles[False][task.pool_block_idx] == self.all_half_tiles[False]
        else:
            ready = self.rows[task.pool_block_idx] == task.num_rows and self.free(True, task.pool_block_idx)
        if ready:
            self.loaded[block].append(task)
            self.begun[block] = None
        return ready

    def finish(self, block: int) -> bool:
        if not self.loaded[block]:
            return False
        task = self.loaded[block].pop(0)
        if self.standing[task.is_gemm2][task.pool_block_idx % self.ring] != task.pool_block_idx:
            raise Race(task)
        if not task.is_gemm2:
            self.standing[True][task.pool_block_idx % self.ring] = task.pool_block_idx
        self.half_tiles[task.is_gemm2][task.pool_block_idx] += task.num_columns // HALF_N
        assert task not in self.done
        self.done.add(task)
        return True

    def stuck(self, order: list[tuple[int, int]]) -> list[Task]:
        """Tasks that wait for ever when roles progress in `order`, (role, steps) each, and then whoever can."""
        for role, steps in order:
            for _ in range(steps):
                self.step(role % self.roles)
        while sum([self.step(role) for role in range(self.roles)]):
            pass
        return [task for task in self.tasks if task not in self.done]


ORDER = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), max_size=30)
RINGS = st.sampled_from([LEAST, LEAST + 1, 3 * WAVE_BLOCKS, 4 * WAVE_BLOCKS, 1000])


@given(MANY, COLUMNS, COLUMNS, BLOCKS, RINGS, st.integers(1, 4), st.integers(1, 20), ORDER)
def test_no_progress_of_roles_ends_in_a_deadlock_or_a_race(
    counts: list[list[int]],
    hidden: int,
    intermediate: int,
    blocks: int,
    ring: int,
    ahead: int,
    pullers: int,
    order: list[tuple[int, int]],
) -> None:
    assert Machine(counts, hidden, intermediate, blocks, ring, ahead, pullers).stuck(order) == []


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_deadlock_is_seen(blocks: int) -> None:
    """The same tasks from last to first: tiles of GEMM 2 stand before those that they wait for."""
    backwards = Machine([[300, 128]], 256, 256, blocks, LEAST)
    backwards.tasks = backwards.tasks[::-1]
    assert len(backwards.stuck([])) == len(backwards.tasks) == 12


@pytest.mark.parametrize(("blocks", "ring"), [(1, LEAST - 1), (1, WAVE_BLOCKS), (2, WAVE_BLOCKS), (9, WAVE_BLOCKS)])
def test_a_ring_of_less_than_two_waves_would_be_a_deadlock(blocks: int, ring: int) -> None:
    full = [[128 * 3 * WAVE_BLOCKS]]
    assert Machine(full, 256, 256, blocks, LEAST).stuck([]) == []
    assert Machine(full, 256, 256, blocks, ring).stuck([]) != []


@pytest.mark.parametrize("l2", [False, True], ids=["gemm_1", "gemm_2"])
@pytest.mark.parametrize("forget", [False, True], ids=["waits", "forgets"])
def test_a_wait_for_the_ring_that_is_left_out_is_seen(l2: bool, forget: bool) -> None:
    """One block pauses as it has begun its first tile of a GEMM; the others go as far as they can."""
    rank = Machine([[128 * 4 * WAVE_BLOCKS]], 256, 256, 4, LEAST)
    rank.forget = l2 if forget else None
    slow = None
    while slow is None:
        for role in range(rank.roles):
            rank.step(role)
        slow = next((block for block, task in enumerate(rank.begun) if task and task.is_gemm2 == l2), None)
    others = [role for role in range(rank.roles) if (role - rank.pullers) // 2 != slow]
    while sum([rank.step(role) for role in others]):
        pass
    if forget:
        with pytest.raises(Race):
            rank.stuck([])
    else:
        assert rank.stuck([]) == []
