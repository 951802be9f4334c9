// Which rows an expert has in the pool, and which tile a block computes next.
#pragma once
#include "layout.cuh"

namespace scheduler {

constexpr u32 kBlockM = 128, kBlockN = 128;

// What every block of a rank derives from the received counts, in shared memory.
struct Plan {
    u32 first_block[kMaxExperts + 1];  // [E_loc + 1]: first pool block of each local expert; the end
    u32 rows[kMaxExperts];             // [E_loc]: rows of each local expert
    u32 first_row[kMaxExperts];        // [E_loc][R]: rows of an expert from the ranks before
    u32 list_start[kMaxExperts];       // [R][E_loc]: where an expert's part of a source's list begins
};

// By one thread an expert or a source; ends with all threads synchronised.
__device__ __forceinline__ void make_plan(const layout::Rank& r, Plan& plan) {
    const u32 experts = r.p.shape.experts_local, ranks = r.p.shape.ranks;
    for (u32 e = threadIdx.x; e < experts; e += blockDim.x) {
        u32 rows = 0;
        for (u32 source = 0; source < ranks; ++source) {
            plan.first_row[e * ranks + source] = rows;
            rows += r.recv_count(r.rank, source)[e];
        }
        plan.rows[e] = rows;
    }
    for (u32 source = threadIdx.x; source < ranks; source += blockDim.x) {
        u32 start = 0;
        for (u32 e = 0; e < experts; ++e) {
            plan.list_start[source * experts + e] = start;
            start += r.recv_count(r.rank, source)[e];
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 block = 0;
        for (u32 e = 0; e < experts; ++e) {
            plan.first_block[e] = block;
            block += (plan.rows[e] + kBlockM - 1) / kBlockM;
        }
        plan.first_block[experts] = block;
    }
    __syncthreads();
}

// The local expert of a pool block: the last one that begins at or before it and has rows.
__device__ __forceinline__ u32 expert_of(const Plan& plan, u32 experts, u32 block) {
    u32 low = 0, high = experts;  // first_block[low] <= block < first_block[high]
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (plan.first_block[middle] <= block) low = middle;
        else high = middle;
    }
    return low;
}

__device__ __forceinline__ u32 rows_in_block(const Plan& plan, u32 expert, u32 block) {
    return min(kBlockM, plan.rows[expert] - (block - plan.first_block[expert]) * kBlockM);
}

struct Task {
    bool l2;
    u32 block, column, expert;  // pool block, tile column, local expert
};

// Tasks of a rank: every tile of GEMM 1, pool block after pool block, then every tile of GEMM 2. Blocks take them in turn,
// so a tile of GEMM 2 only waits for tiles that running blocks have already taken.
__device__ __forceinline__ bool next_task(const layout::Rank& r, const Plan& plan, u32 index, Task& task) {
    const u32 experts = r.p.shape.experts_local, pool_blocks = plan.first_block[experts];
    const u32 l1_columns = 2 * r.p.shape.intermediate / kBlockN, l2_columns = r.p.shape.hidden / kBlockN;
    u32 tile = r.block + index * r.blocks;
    task.l2 = tile >= pool_blocks * l1_columns;
    if (task.l2) tile -= pool_blocks * l1_columns;
    const u32 columns = task.l2 ? l2_columns : l1_columns;
    task.block = tile / columns;
    task.column = tile % columns;
    if (task.block >= pool_blocks) return false;
    task.expert = expert_of(plan, experts, task.block);
    return true;
}

}  // namespace scheduler
