"""Every tile exactly once, in an order that ends, and the kernel's closed form of it."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaproof import HOME
from megaproof.kernel.host import sizes
from megaproof.kernel.host.params import KernelShape
from megaproof.kernel.programs.moe import moe
from megaproof.reference import layout, scheduler
from megaproof.reference.scheduler import BLOCK_M, BLOCK_N, HALF_N, WAVE_BLOCKS, Plan, Task
from megaproof.tests.support.received import BLOCKS, COLUMNS, COUNTS, LEAST, MANY
from megaproof.toolchain import build


def test_a_plan_by_hand() -> None:
    plan = scheduler.make_plan([[0, 130, 0, 1], [0, 126, 0, 2]], hidden=128, num_ctas=4)
    assert plan == Plan((0, 0, 2, 2, 3), (0, 256, 0, 3), ((0, 0), (0, 130), (0, 0), (0, 1)), gemm2_tile_n=128)
    assert [scheduler.expert_of(plan, block) for block in range(3)] == [1, 1, 3]
    assert [scheduler.num_rows_in_block(plan, e, block) for block, e in enumerate([1, 1, 3])] == [128, 128, 3]
    assert (scheduler.num_gemm1_half_tiles(256), scheduler.num_gemm2_half_tiles(384)) == (4, 3)
    assert [scheduler.task_of(plan, 128, 256, tile) for tile in (1, 2, 5, 6, 9)] == [
        Task(False, 1, 1, 0, 256, 128),
        Task(False, 0, 1, 256, 256, 128),
        Task(False, 2, 3, 256, 256, 3),
        Task(True, 0, 1, 0, 128, 128),
        None,
    ]


@given(COUNTS)
def test_pool_blocks_hold_the_rows_of_the_layout(counts: list[list[int]]) -> None:
    plan, sent = scheduler.make_plan(counts, hidden=128, num_ctas=1), torch.tensor(counts)
    inside: Counter[int] = Counter()
    found = []
    for block in range(plan.first_block[-1]):
        e = scheduler.expert_of(plan, block)
        rows = scheduler.num_rows_in_block(plan, e, block)
        assert plan.first_block[e] <= block < plan.first_block[e + 1], "an expert without rows owns no block"
        assert 0 < rows <= BLOCK_M
        inside[e] += rows
        found += [(block * BLOCK_M + i, e) for i in range(rows)]
    assert [inside[e] for e in range(len(plan.num_rows))] == list(plan.num_rows) == sent.sum(0).tolist()
    row, expert = layout.pool_rows(sent.sum(0))
    assert found == list(zip(row.tolist(), expert.tolist(), strict=True))
    begin = torch.tensor(plan.first_block[:-1])[:, None] * BLOCK_M + torch.tensor(plan.first_row)
    assert torch.equal(begin.t(), layout.first_rows(sent))


@pytest.mark.parametrize(
    ("pool_blocks", "hidden", "blocks", "width"),
    [
        (6, 4096, 132, 256),  # 96 tiles of 132: a round, as two of half as much
        (12, 4096, 132, 128),  # 192 are two rounds, 384 halves are three of half as much
        (6, 7168, 132, 128),
        (6, 4096, 78, 128),
        (20, 4096, 132, 256),  # many: the gaps are small
        (1, 128, 1, 128),  # there is but half a tile
        (0, 4096, 132, 256),
    ],
)
def test_the_width_of_gemm_2(pool_blocks: int, hidden: int, blocks: int, width: int) -> None:
    assert scheduler.gemm2_tile_n(hidden, pool_blocks, blocks) == width


@pytest.mark.parametrize(
    ("pool_blocks", "hidden", "inter", "once"),
    [
        (0, 4096, 2048, True),
        (6, 4096, 2048, True),
        (13, 4096, 2048, True),
        (14, 4096, 2048, False),  # 336 MiB
        (6826, 128, 128, True),  # 48 KiB each
        (6827, 128, 128, False),
        (5, 7168, 3072, True),  # 315 MiB
        (6, 7168, 3072, False),
        (1 << 20, 1 << 20, 1 << 20, False),  # beyond 2^32, and 2^64 / 16
    ],
)
def test_whose_weights_leave_the_cache_first(
    compiled: ctypes.CDLL, pool_blocks: int, hidden: int, inter: int, once: bool
) -> None:
    assert scheduler.evicts_weights_first(hidden, inter, pool_blocks) == once
    shape = KernelShape(hidden=hidden, intermediate=inter)
    assert bool(compiled.once(ctypes.byref(shape), pool_blocks)) == once


@given(COUNTS | MANY, COLUMNS, COLUMNS, BLOCKS)
def test_every_tile_is_a_task_once(counts: list[list[int]], hidden: int, intermediate: int, blocks: int) -> None:
    plan = scheduler.make_plan(counts, hidden, blocks)
    done: Counter[tuple[bool, int, int]] = Counter()
    for task in scheduler.all_tasks(plan, hidden, intermediate):
        assert task.expert_idx == scheduler.expert_of(plan, task.pool_block_idx)
        assert task.num_rows == scheduler.num_rows_in_block(plan, task.expert_idx, task.pool_block_idx)
        assert task.num_columns in (HALF_N, BLOCK_N)
        halves = range(task.first_column // HALF_N, (task.first_column + task.num_columns) // HALF_N)
        done.update((task.is_gemm2, task.pool_block_idx, half) for half in halves)
    halves = {False: scheduler.num_gemm1_half_tiles(intermediate), True: scheduler.num_gemm2_half_tiles(hidden)}
    pool_blocks = range(plan.first_block[-1])
    assert done == Counter((l2, block, half) for l2 in halves for block in pool_blocks for half in range(halves[l2]))


@given(COUNTS | MANY, COLUMNS, COLUMNS)
def test_gemm_2_of_a_wave_follows_gemm_1_of_the_next(counts: list[list[int]], hidden: int, intermediate: int) -> None:
    order = scheduler.all_tasks(scheduler.make_plan(counts, hidden, 4), hidden, intermediate)
    phases = [phase for phase, _ in groupby((task.is_gemm2, task.pool_block_idx // WAVE_BLOCKS) for task in order)]
    waves = len(phases) // 2
    wanted = sorted(((l2, j) for l2 in (False, True) for j in range(waves)), key=lambda p: (p[1] + 1.5 * p[0], p[0]))
    assert phases == wanted


@given(COUNTS | MANY, COLUMNS, COLUMNS)
def test_an_experts_weights_are_read_once_a_wave(counts: list[list[int]], hidden: int, intermediate: int) -> None:
    """Tiles of one wave that take the same weights follow each other."""

    def weights(task: Task) -> tuple[bool, int, int, int]:
        return task.is_gemm2, task.pool_block_idx // WAVE_BLOCKS, task.expert_idx, task.first_column

    order = scheduler.all_tasks(scheduler.make_plan(counts, hidden, 4), hidden, intermediate)
    read = [key for key, _ in groupby(map(weights, order))]
    assert len(read) == len(set(read))


@given(MANY, COLUMNS, COLUMNS, st.integers(LEAST, 5 * WAVE_BLOCKS))
def test_what_a_task_waits_for_stands_before_it(
    counts: list[list[int]], hidden: int, intermediate: int, ring: int
) -> None:
    order = scheduler.all_tasks(scheduler.make_plan(counts, hidden, 4), hidden, intermediate)
    first, last = ({l2: {} for l2 in (False, True)} for _ in range(2))
    for place, task in enumerate(order):
        first[task.is_gemm2].setdefault(task.pool_block_idx, place)
        last[task.is_gemm2][task.pool_block_idx] = place
    for block in first[False]:
        assert last[False][block] < first[True][block], "GEMM 2 reads what GEMM 1 has written"
        if block >= ring:
            assert last[True][block - ring] < first[False][block], "GEMM 1 writes where GEMM 2 has read"


# --- the kernel's closed form -----------------------------------------------------------------------------------------

HOST = """
// The thread block of a rank that asks: the functions below read nothing of it but the shape.
struct Asker {
    emu::Machine machine;
    emu::Block block{};
    emu::Fiber fiber{};
    Params params{};

    explicit Asker(const Shape& shape) {
        fiber.block = &block, machine.current = &fiber, emu::machine = &machine;
        params.shape = shape, params.grid.num_ctas_per_rank = 1;
    }
    ~Asker() { emu::machine = nullptr; }
};
extern "C" u32 tasks(const Shape* shape, const u32* num_rows, u32 num_ctas, u32* out) {
    const Asker asker(*shape);
    const layout::Rank rank(asker.params);
    scheduler::Plan plan{};
    for (u32 e = 0; e < shape->num_local_experts; ++e) {
        plan.num_rows[e] = num_rows[e];
        plan.first_block[e + 1] = plan.first_block[e] + scheduler::num_blocks_of(num_rows[e]);
    }
    plan.gemm2_tile_n = scheduler::gemm2_tile_n(*shape, plan.first_block[shape->num_local_experts], num_ctas);
    scheduler::Task task{};
    u32 idx = 0;
    for (; scheduler::task_of(rank, plan, idx, task), task.num_rows; ++idx)
        for (u32 field : {task.is_gemm2, task.pool_block_idx, task.expert_idx, task.first_column, task.num_columns,
                          task.num_rows})
            *out++ = field;
    for (u32 more = 1; more < 1000; ++more)
        if (scheduler::task_of(rank, plan, idx + more, task), task.num_rows) return ~0u;
    return idx;
}
extern "C" u32 once(const Shape* shape, u32 num_pool_blocks) {
    return scheduler::evicts_weights_first(*shape, num_pool_blocks);
}
extern "C" void share(u32 warpgroup_idx, u32 num_rows, u32 num_columns, u32* out) {
    const gemm::Share found = gemm::share_of(warpgroup_idx, num_rows, num_columns);
    out[0] = found.first_row, out[1] = found.first_column, out[2] = found.num_half_tiles;
}
"""


def host_source() -> str:
    """The kernel's scheduler on the emulator's machine, with functions that a test calls behind it."""
    kernel = HOME / "kernel"
    macros = "".join(f"#define {name} {value}\n" for name, value in moe().defines.items())
    machine = build.joined([kernel / "emulator" / "ptx.hpp"])
    return macros + machine + build.joined([kernel / "scheduler.cuh"], without=[kernel / "ptx.cuh"]) + HOST


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel's task_of and share_of, by the host's compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ on PATH: the kernel's closed form is not compiled for the host")
    folder: Path = tmp_path_factory.mktemp("scheduler")
    source, library = folder / "scheduler.cpp", folder / "scheduler.so"
    source.write_text(host_source(), encoding="utf-8")
    command = [compiler, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-o", library, source]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(library))


def by_the_kernel(compiled: ctypes.CDLL, plan: Plan, hidden: int, intermediate: int, blocks: int) -> tuple[Task, ...]:
    """What `all_tasks` says, by the kernel's own text."""
    shape = KernelShape(num_local_experts=len(plan.num_rows), hidden=hidden, intermediate=intermediate)
    rows = (ctypes.c_uint32 * len(plan.num_rows))(*plan.num_rows)
    out = (ctypes.c_uint32 * (6 * plan.first_block[-1] * 2 * (hidden + intermediate) // 128))()
    count = compiled.tasks(ctypes.byref(shape), rows, blocks, out)
    assert count >= 0, "a task after the last"
    fields = iter(out[: 6 * count])
    return tuple(Task(bool(l2), *rest) for l2, *rest in zip(*[fields] * 6, strict=True))


@given(counts=COUNTS | MANY, hidden=COLUMNS, intermediate=COLUMNS, blocks=BLOCKS)
def test_the_kernels_order_is_the_references(
    compiled: ctypes.CDLL, counts: list[list[int]], hidden: int, intermediate: int, blocks: int
) -> None:
    plan = scheduler.make_plan(counts, hidden, blocks)
    wanted = scheduler.all_tasks(plan, hidden, intermediate)
    assert by_the_kernel(compiled, plan, hidden, intermediate, blocks) == wanted


def test_the_kernels_order_of_many_experts(compiled: ctypes.CDLL) -> None:
    """Hundreds of plans, of up to the most experts: waves begin and end anywhere inside them."""
    draw = random.Random(1)
    for _ in range(500):
        largest = draw.choice([1, 128, 300, 5000])
        experts = draw.choice([1, 2, 7, 33]) if draw.random() < 0.98 else sizes.MAX_EXPERTS
        shape, blocks = (128 * draw.randint(1, 3), 128 * draw.randint(1, 2)), draw.randint(1, 140)
        plan = scheduler.make_plan([[draw.randrange(largest + 1) for _ in range(experts)]], shape[0], blocks)
        assert by_the_kernel(compiled, plan, *shape, blocks) == scheduler.all_tasks(plan, *shape)


@pytest.mark.parametrize("columns", [128, 256])
def test_the_math_warpgroups_share_out_a_tile(compiled: ctypes.CDLL, columns: int) -> None:
    """Each 64 rows that are not all padding are multiplied once by each 128 columns."""
    for rows in range(1, BLOCK_M + 1):
        done: Counter[tuple[int, int]] = Counter()
        for warpgroup in range(2):
            out = (ctypes.c_uint32 * 3)()
            compiled.share(warpgroup, rows, columns, out)
            first_row, first_column, halves = out
            done.update((first_row, first_column + half * sizes.HALF_N) for half in range(halves))
        assert done == Counter((r, c) for r in range(0, rows, 64) for c in range(0, columns, sizes.HALF_N))
