// Which rows an expert has in the pool, and which tile a block computes next.
#pragma once
#include "layout.cuh"

namespace scheduler {

using gemm::kBlockM, gemm::kBlockN, gemm::kTurnN;
constexpr u32 kBoxRows = 32;  // activation rows of one TMA box: a part-filled block loads only the boxes that hold rows

// Pool blocks of a group. GEMM 2 of a group comes after GEMM 1 of the next: its inputs are there, and still in L2.
constexpr u32 kGroupBlocks = 24;

// Columns of a tile of GEMM 2: half of kBlockN where the pool blocks are few and that saves half a round of the thread blocks,
// else kBlockN. Half a tile keeps fewer bytes on their way, so it pays only there.
constexpr u32 kFewBlocks = 16;
__device__ __forceinline__ u32 l2_width(const Shape& s, u32 pool_blocks, u32 blocks) {
    const u32 wide = pool_blocks * ((s.hidden + kBlockN - 1) / kBlockN), halves = pool_blocks * (s.hidden / kTurnN);
    const bool fewer = (halves + blocks - 1) / blocks < 2 * ((wide + blocks - 1) / blocks);
    return pool_blocks <= kFewBlocks && fewer ? kTurnN : kBlockN;
}

// Whether L2 gives up the lines of weights before all others: where the weights of all pool blocks are few bytes. Of more it
// chooses better itself (kernel/results/log.md).
constexpr u64 kOnceBytes = 320 << 20;
__device__ __forceinline__ bool weights_once(const Shape& s, u32 pool_blocks) {
    return static_cast<u64>(pool_blocks) * 3 * s.hidden * s.intermediate <= kOnceBytes;
}

// What every block of a rank derives from the received counts, in shared memory.
struct Plan {
    u32 first_block[kMaxExperts + 1];  // [E_loc + 1]: first pool block of each local expert; the end
    u32 rows[kMaxExperts];             // [E_loc]: rows of each local expert
    u32 first_row[kMaxExperts];        // [E_loc][R]: rows of an expert from the ranks before; not where a rank counts alone
    u32 l2_width;                      // columns of a tile of GEMM 2
};

__device__ __forceinline__ u32 blocks_of(u32 rows) { return (rows + kBlockM - 1) / kBlockM; }

// The rows of each expert, from what the sources have told; a thread an expert.
__device__ __forceinline__ void receive(const layout::Rank& r, Plan& plan) {
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
}

// The pool blocks of each expert, by the running sum of one warp; ends with all threads synchronised.
__device__ __forceinline__ void make_plan(const layout::Rank& r, Plan& plan) {
    const u32 experts = r.p.shape.experts_local;
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
        if (threadIdx.x == 0) plan.first_block[0] = 0, plan.l2_width = l2_width(r.p.shape, before, r.blocks);
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
    u32 l2;                     // whether GEMM 2
    u32 block, expert;          // pool block, local expert
    u32 first_column, columns;  // of 2I (interleaved), or of H
    u32 rows;                   // of the pool block; 0: no task any more
};

// What the counters of a pool block come to, in turns: kTurnN columns each.
__device__ __forceinline__ u32 l1_turns(const Shape& s) { return 2 * s.intermediate / kTurnN; }
__device__ __forceinline__ u32 l2_turns(const Shape& s) { return s.hidden / kTurnN; }

// Tasks of a rank: GEMM 1 of group 0; then, for each further group, its GEMM 1 and GEMM 2 of the group before; then GEMM 2
// of the last. Blocks take them as they come, so a task only waits for tasks that running blocks have already taken. In a
// group, the pool blocks of one expert take each tile column one after the other: its weights are read once.
// Task `tile` of this order.
__device__ __forceinline__ void task_of(const layout::Rank& r, const Plan& plan, u32 tile, Task& task) {
    const u32 experts = r.p.shape.experts_local, pool_blocks = plan.first_block[experts];
    task.rows = 0;
    if (pool_blocks == 0) return;
    const u32 l1 = 2 * r.p.shape.intermediate / kBlockN, l2 = (r.p.shape.hidden + plan.l2_width - 1) / plan.l2_width;
    const u32 last = (pool_blocks - 1) / kGroupBlocks, in_last = pool_blocks - last * kGroupBlocks;
    u32 group = 0;
    task.l2 = 0;
    const u32 first = (last == 0 ? in_last : kGroupBlocks) * l1;
    if (tile >= first) {
        tile -= first;
        const u32 pair = kGroupBlocks * (l1 + l2);
        const u32 pairs = last == 0 ? 0 : min(tile / pair, last - 1);  // of GEMM 1 of group pairs + 1, GEMM 2 of group pairs
        tile -= pairs * pair;
        group = pairs + 1;
        const u32 l1_tiles = last == 0 ? 0 : (group == last ? in_last : kGroupBlocks) * l1;
        const u32 l2_tiles = last == 0 ? 0 : kGroupBlocks * l2;
        if (tile >= l1_tiles) {
            tile -= l1_tiles, group = pairs, task.l2 = 1;
            if (tile >= l2_tiles) tile -= l2_tiles, group = last;
            if (group == last && tile >= in_last * l2) return;
        }
    }
    const u32 columns = task.l2 ? l2 : l1, width = task.l2 ? plan.l2_width : kBlockN;
    const u32 begin = group * kGroupBlocks, end = min(pool_blocks, begin + kGroupBlocks);
    task.expert = expert_of(plan, experts, begin + tile / columns);
    const u32 run = max(begin, plan.first_block[task.expert]), run_end = min(end, plan.first_block[task.expert + 1]);
    tile -= (run - begin) * columns;
    task.first_column = tile / (run_end - run) * width;
    task.columns = min(width, (task.l2 ? r.p.shape.hidden : 2 * r.p.shape.intermediate) - task.first_column);
    task.block = run + tile % (run_end - run);
    task.rows = rows_in_block(plan, task.expert, task.block);
}

// The next tile for a block that has one: the first is its own number.
__device__ __forceinline__ u32 next_tile(const layout::Rank& r) {
    return r.blocks + ptx::atomic_add(&r.workspace().tiles_taken, 1);
}

}  // namespace scheduler
