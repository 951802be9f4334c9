"""Faults of the sources in the order of things: a role that goes on too early, or waits in vain.

Each is compiled for the CPU and convicted under the emulator (tests/kernel/test_emulator.py). Only some interleavings
show a role that is early, so such a fault names seeds.
"""

from __future__ import annotations

from megaproof.proof.faults.source import ANY_STAGE, OURS, PUBLIC, Source, narrow

RACES = tuple(range(12))
"""Behind the seed that is known to convict, where there is one: another compiler's code may need another."""
SYNC = "    __syncthreads();\n    if (is_math)"
RECYCLED = {"case": narrow(76, (190,)), "ring": 48, "seeds": (15, 3, 7, 0, 11, 19, 23)}
GEMM_2_LATE = (
    "    const u32 wanted_at = num_k_blocks",
    """    if (task.is_gemm2 && rank.cta_idx == 0)
        for (const u64 late = ptx::global_timer(); ptx::global_timer() - late < 300'000'000;) {}
    const u32 wanted_at = num_k_blocks""",
)
"""Operands of GEMM 2 are read late in one block: 300,000 steps."""
NO_END = "deadlock|no end|rank "
LAST_CHAIN = "half_idx == kNumHalfTiles - 1 && scale_idx == kNumScales - 1"
RELEASE = f"""                if ({LAST_CHAIN})
                    release(&pipeline.empty_barriers[stage_idx]);
"""

FAULTS = (
    Source(
        "task-lost",
        "producer",
        OURS,
        "task_idx = scheduler::next_task_idx(rank);",
        "task_idx = 1 + scheduler::next_task_idx(rank);",
        NO_END,
    ),
    Source("parity", "producer", OURS, "&queue.wanted, i & 1, i,", "&queue.wanted, 0, i,", NO_END),
    Source(
        "registers",
        "moe_sm90",
        OURS,
        "more_registers<registers::kMath>",
        "more_registers<registers::kMath + 8>",
        "deadlock",
    ),
    Source(
        "registers-back-early",
        "moe_sm90",
        OURS,
        SYNC,
        "    if (is_math)",
        NO_END,
        narrow(2, (60,)),
        seeds=(17, 25, 33, *RACES),
    ),
    Source(
        "stage-early",
        "gemm",
        PUBLIC,
        f"finish_chain(acc);\n{RELEASE}",
        f"{RELEASE}finish_chain(acc);",
        ANY_STAGE,
        seeds=RACES,
    ),
    Source(
        "stage-twice",
        "gemm",
        OURS,
        RELEASE,
        RELEASE.replace(" && scale_idx == kNumScales - 1", ""),
        f"{ANY_STAGE}|{NO_END}",
        seeds=RACES,
    ),
    Source(
        "rows-early",
        "producer",
        OURS,
        "kRowsArrived, task.num_rows);",
        "kRowsArrived, 1);",
        ANY_STAGE,
        narrow(2, (60,)),
        seeds=RACES,
    ),
    Source(
        "columns-early",
        "producer",
        OURS,
        "scheduler::num_gemm1_half_tiles(shape));",
        "1);",
        ANY_STAGE,
        seeds=(1, *RACES),
    ),
    Source(
        "ring-acts-early",
        "dispatch",
        OURS,
        "if (pool_block_idx < shape.num_ring_blocks) return true;",
        "return true;",
        ANY_STAGE,
        **RECYCLED,
    ),
    Source(
        "ring-l2-early",
        "producer",
        OURS,
        "if (is_ready && task.pool_block_idx >= num_ring_blocks)",
        "if (0)",
        ANY_STAGE,
        **RECYCLED,
        also=GEMM_2_LATE,
        timeout_steps=3_000_000,
    ),
    Source(
        "finished-early",
        "storage",
        OURS,
        "ptx::mbarrier_init(&mbarrier, gemm::kNumMathWarps);",
        "ptx::mbarrier_init(&mbarrier, 1);",
        f"{ANY_STAGE}|{NO_END}",
        seeds=RACES,
    ),
    Source(
        "flip-early",
        "barrier",
        OURS,
        "kFlip - (rank.num_ctas - 1)",
        "kFlip",
        f"{ANY_STAGE}|{NO_END}",
        narrow(2, (60,)),
        seeds=(1, *RACES),
    ),
    Source(
        "flip-late", "barrier", OURS, "kFlip - (rank.num_ctas - 1)", "kFlip - rank.num_ctas", NO_END, narrow(2, (60,))
    ),
    Source(
        "last-by-count",
        "barrier",
        OURS,
        "& ~kFlip) == rank.num_ctas - 1",
        "& ~kFlip) == rank.num_ctas - 2",
        f"{ANY_STAGE}|{NO_END}|a routed",
        narrow(2, (513,)),
        seeds=(7, *RACES),
    ),
    Source(
        "report-lost",
        "producer",
        OURS,
        "return static_cast<void>(reporter.catch_up(i));",
        "return;",
        NO_END,
        narrow(2, (60,)),
    ),
    Source(
        "store-early",
        "dispatch",
        OURS,
        "ptx::bulk_store_wait();",
        "",
        ANY_STAGE,
        narrow(2, (60,)),
        seeds=(15, 23, 27, *RACES),
    ),
)
