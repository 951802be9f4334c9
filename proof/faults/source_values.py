"""Faults of the sources that compute something else, or write too far.

Each is compiled for the CPU. The emulator convicts `FAULTS` (tests/kernel/test_emulator.py), the guards `OVERWRITES`
(tests/proof/test_guards.py).
"""

from __future__ import annotations

from megaproof.cases.cases import Case
from megaproof.proof.faults.source import ANY_STAGE, OURS, PUBLIC, Source, narrow
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape

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
LONG = Case(Shape("long", hidden=8320, intermediate=128, experts=2, topk=1), (3, 2))
"""Rows that travel in two steps."""

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
        "rest-of-row",
        "dispatch",
        OURS,
        "if ((first += num_bytes) >= shape.hidden) break;",
        "break;",
        "l1_acts|a routed row",
        LONG,
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
)
"""Faults that change what is computed."""

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
