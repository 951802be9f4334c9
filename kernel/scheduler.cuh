// Which rows an expert has in the pool, and which tile a block computes next.
#pragma once
#include "layout.cuh"

namespace scheduler {

constexpr u32 kBlockM = BLOCK_M, kBlockN = 128;  // the host chooses BLOCK_M, see config.py
constexpr u32 kBoxRows = 32;  // activation rows of one TMA box: a part-filled block loads only the boxes that hold rows

// What every block of a rank derives from the received counts, in shared memory.
struct Plan {
    u32 first_block[kMaxExperts + 1];  // [E_loc + 1]: first pool block of each local expert; the end
    u32 rows[kMaxExperts];             // [E_loc]: rows of each local expert
    u32 first_row[kMaxExperts];        // [E_loc][R]: rows of an expert from the ranks before
};

__device__ __forceinline__ u32 blocks_of(u32 rows) { return (rows + kBlockM - 1) / kBlockM; }

// A thread an expert, then one warp for the running sum; ends with all threads synchronised.
__device__ __forceinline__ void make_plan(const layout::Rank& r, Plan& plan) {
    const u32 experts = r.p.shape.experts_local, ranks = r.p.shape.ranks;
    for (u32 e = threadIdx.x; e < experts; e += blockDim.x) {
        u32 counts[kMaxRanks];
#pragma unroll
        for (u32 source = 0; source < kMaxRanks; ++source)  // all loads under way at once
            counts[source] = source < ranks ? ptx::load_volatile(&r.recv_count(r.rank, source)[e]) : 0;
        u32 rows = 0;
#pragma unroll
        for (u32 source = 0; source < kMaxRanks; ++source) {
            if (source < ranks) plan.first_row[e * ranks + source] = rows;
            rows += counts[source];
        }
        plan.rows[e] = rows;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        u32 before = 0;  // blocks of the experts before these 32
        for (u32 first = 0; first < experts; first += 32) {
            const u32 e = first + threadIdx.x;
            u32 sum = e < experts ? blocks_of(plan.rows[e]) : 0;
#pragma unroll
            for (u32 distance = 1; distance < 32; distance *= 2) {
                const u32 left = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
                if (threadIdx.x >= distance) sum += left;
            }
            if (e < experts) plan.first_block[e + 1] = before + sum;
            before += __shfl_sync(0xFFFFFFFFu, sum, 31);
        }
        if (threadIdx.x == 0) plan.first_block[0] = 0;
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
    u32 block, column, expert, rows;  // pool block, tile column, local expert, rows of the block
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
    task.rows = rows_in_block(plan, task.expert, task.block);
    return true;
}

}  // namespace scheduler
