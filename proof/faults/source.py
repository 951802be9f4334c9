"""Faults in the kernel's sources: one place each, there exactly once, so that the kernel itself has no switch for them.

Each is compiled for the CPU and convicted under the emulator (tests/kernel/test_emulator.py); those that write too far,
by the guards (tests/proof/test_guards.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from megaproof.cases.cases import SMOKE, Case
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape
from megaproof.toolchain.errors import BuildError

PUBLIC, OURS = "the public history of this kernel family", "made up for this kernel"
"""Where a fault comes from."""


def replaced(text: str, old: str, new: str) -> str:
    """`text` with `new` in the one place that reads `old`. Raises BuildError unless there is exactly one."""
    if text.count(old) != 1:
        raise BuildError(f"{text.count(old)} places read {old!r}; a fault needs one")
    return text.replace(old, new)


def narrow(experts: int, tokens: tuple[int, ...], topk: int = 2, **recipe: object) -> Case:
    """H = I = 128: one K block a tile, where roles hand over most often."""
    shape = Shape("narrow", hidden=128, intermediate=128, experts=experts, topk=topk)
    return Case(shape, tokens, recipe=Recipe(**recipe))


@dataclass(frozen=True)
class Source:
    """What is changed in the sources, where it has to show, and the layer that shows it."""

    id: str
    room: str
    """The file of kernel/ that it is in, without its ending."""
    origin: str
    """PUBLIC or OURS."""
    old: str
    """The text in its one place; `new` stands there instead."""
    new: str
    check: str
    """A pattern of how the conviction begins: `Convicted.check`, what the emulator or the adapter says, or 'behind'
    and the field whose guard is written."""
    case: Case = SMOKE[1]
    ring: int | None = None
    """Pool blocks that have a place at a time; None: all."""
    seeds: tuple[int, ...] = (0,)
    """Of the interleavings that are tried, until one shows it."""
    also: tuple[str, str] | None = None
    """Another place that has to change with it."""
    timeout_steps: int = 1_000_000
    """Of a role that waits in vain; below the emulator's limit, so that it says so."""

    def change(self, text: str) -> str:
        """The sources with the fault. Raises BuildError where its place is not there."""
        for old, new in filter(None, ((self.old, self.new), self.also)):
            text = replaced(text, old, new)
        return text


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
EDGES = {
    silu: Case(
        Shape("edges", hidden=384, intermediate=256, experts=4, topk=4),
        (7, 6),
        recipe=Recipe(clamp=None, silu=silu),
        family="adversarial",
    )
    for silu in ("fast", "precise")
}
"""Where y depends on the order of the slots, and codes on the last bit of an activation."""
FIRST_LOOKUP = "if (first_slot == 0) units.expert_idx = units.expert_of(unit_idx + units.step);\n#pragma unroll\n"
ASCENDING = f"{FIRST_LOOKUP}            for (u32 k = 0; k < kSlotsInFlight; ++k) {{"
PRECISE = "return x * ptx::rcp_rn(1.0f + exp_steps(-x));"
ANY_STAGE = "l1_acts|l2_acts|slots|y|written"
NO_END = "deadlock|no end|rank "
LONG = Case(Shape("long", hidden=8320, intermediate=128, experts=2, topk=1), (3, 2))
"""Rows that travel in two steps."""
LAST_CHAIN = "half_idx == kNumHalfTiles - 1 && scale_idx == kNumScales - 1"
RELEASE = f"""                if ({LAST_CHAIN})
                    release(&pipeline.empty_barriers[stage_idx]);
"""
FAULTS = (
    Source("group-size", "swiglu", PUBLIC, "factor = pow2(-e)", "factor = pow2(-e - 1)", "l2_acts"),
    Source("scale-stride", "producer", PUBLIC, "scale_idx) * shape.num_ring_rows", "scale_idx) * kBlockM", "l2_acts"),
    Source(
        "half-tiles-apart",
        "layout",
        OURS,
        "k_block_idx * num_side_by_side + half_idx % 2;",
        "k_block_idx + half_idx % 2 * num_k_blocks;",
        "l2_acts",
    ),
    Source(
        "odd-half-lost",
        "layout",
        OURS,
        "num_halves = num_weight_rows / gemm::kHalfN;",
        "num_halves = num_weight_rows / gemm::kBlockN * 2;",
        "slots",
        narrow(2, (60,)),
    ),
    Source("scale-kind", "swiglu", PUBLIC, "((scaled & 0x7FFFFF) != 0 ? 1 : 0)", "0", "l2_acts"),
    Source(
        "clamp-form",
        "swiglu",
        PUBLIC,
        "gate = fminf(gate, clamp);",
        "gate = fmaxf(fminf(gate, clamp), -clamp);",
        "l2_acts",
    ),
    Source(
        "weight-slot",
        "dispatch",
        PUBLIC,
        "rank.peer_ptr<float>(source_idx, offset.topk_weights)[entry]",
        "1.0f",
        "l2_acts",
    ),
    Source(
        "mask", "layout", PUBLIC, "static_cast<u64>(topk_idx) <", "static_cast<u64>(topk_idx) - 1 <", "a routed row"
    ),
    Source(
        "metadata",
        "layout",
        PUBLIC,
        "return slot_idx * params.shape.capacity + token_idx;",
        "return slot_idx * params.shape.capacity;",
        "a routed row",
    ),
    Source(
        "tail-row",
        "scatter",
        PUBLIC,
        "row_in_block + 8 * row_half >= num_rows",
        "row_in_block + 8 * row_half + 1 >= num_rows",
        "slots",
    ),
    Source(
        "stats", "stats", PUBLIC, "stats_ptr[expert_idx] += ", "stats_ptr[expert_idx] = ", "stats of the second launch"
    ),
    Source("combine", "combine", PUBLIC, "sum[i][j] += __uint", "sum[i][j] = sum[i][j] * 0.5f + __uint", "y"),
    Source(
        "slot-order",
        "combine",
        OURS,
        ASCENDING,
        ASCENDING.replace("k = 0; k < kSlotsInFlight; ++k", "k = kSlotsInFlight; k-- > 0;"),
        "y",
        EDGES["fast"],
    ),
    Source(
        "silu-association",
        "swiglu",
        OURS,
        "return silu * up * weight;",
        "return gate * up * silu * weight;",
        "l2_acts",
        EDGES["fast"],
        also=("return x * ptx::rcp_approx(", "return ptx::rcp_approx("),
    ),
    Source(
        "silu-divides",
        "special",
        OURS,
        PRECISE,
        "return __fdiv_rn(x, 1.0f + exp_steps(-x));",
        "l2_acts",
        EDGES["precise"],
    ),
    Source(
        "approximate-rcp",
        "special",
        OURS,
        PRECISE,
        PRECISE.replace("rcp_rn", "rcp_approx"),
        "l2_acts",
        EDGES["precise"],
    ),
    Source(
        "approximate-exp",
        "special",
        OURS,
        PRECISE,
        PRECISE.replace("exp_steps(-x)", "ptx::ex2_approx(-x * kLog2E)"),
        "l2_acts",
        EDGES["precise"],
    ),
    Source(
        "expert-tail",
        "dispatch",
        PUBLIC,
        "expert_of(plan, num_experts, pool_block_idx);",
        "expert_of(plan, num_experts - 1, pool_block_idx);",
        "a routed row",
    ),
    Source("no-promotion", "gemm", PUBLIC, "acc[i], sum[i]);", "acc[i], acc[i]);", "l2_acts"),
    Source(
        "dirty-workspace", "moe_sm90", PUBLIC, "if (first == 0) rank.workspace().num_tasks_taken = 0;", "", ANY_STAGE
    ),
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
        "rest-of-row",
        "dispatch",
        OURS,
        "if ((first += num_bytes) >= shape.hidden) break;",
        "break;",
        "l1_acts|a routed row",
        LONG,
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
        "other-rows-entry", "dispatch", OURS, "        row_idx -= num_found;\n", "", "a routed row", narrow(2, (60,))
    ),
    Source(
        "other-experts-entry",
        "dispatch",
        OURS,
        "expert_of_entry[first + lane_idx] == expert_idx",
        "true",
        "a routed row",
        narrow(2, (60,)),
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
"""Faults that change what is computed, or end it."""
ALONE = narrow(1, (33,), topk=1)

COUNT, SENT, SCALES = (
    "rank.own.outputs.stats_ptr[expert_idx] += static_cast<int>(plan.num_rows[expert_idx]);",
    "rank.recv_count(expert_idx / num_local_experts, rank.idx)[expert_idx % num_local_experts] = count;",
    "i < shape.hidden / 128; i += 32)",
)
MORE = "rank.own.outputs.stats_ptr[rank.params.shape.num_local_experts]"
ROW = "            if (is_inside[i])\n                *reinterpret_cast<uint4*>(y_ptr + i * 32 * kLaneColumns)"
OVERWRITES = (
    Source("one-count-more", "stats", OURS, COUNT, f"{COUNT} if (!threadIdx.x) {MORE} = 7;", "behind stats", ALONE),
    Source("one-scale-more", "dispatch", OURS, SCALES, SCALES.replace("<", "<="), "behind l1_acts_sf", ALONE),
    Source(
        "one-count-sent-more",
        "dispatch",
        OURS,
        SENT,
        f"{SENT} rank.recv_count(expert_idx / num_local_experts, rank.idx)[num_local_experts] = 0;",
        "behind recv_count",
        narrow(1, (1025,), topk=1),
    ),
    Source(
        "columns-more",
        "combine",
        OURS,
        ROW,
        f"*reinterpret_cast<uint4*>(y_ptr + shape.hidden * (i + 1)) = {{}};\n{ROW}",
        "behind y",
        ALONE,
    ),
)
"""Writes too far, and behind what they show; all numbers of the layer stay right. One expert of one block, so that what
stands behind a field is a gap. Counts are sent where there are more slots than a block counts alone."""
