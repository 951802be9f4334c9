// Which rows an expert has in the pool, and which tile a thread block computes next. Every thread block derives the
// same plan from the received counts; then its scout turns task numbers into tiles. Predicted by
// reference/scheduler.py.
//
// The pool is the list of all rows that a rank receives, expert after expert, in pool blocks of 128 rows of one expert
// each.
#pragma once
#include "layout.cuh"

namespace scheduler {

using gemm::kBlockM, gemm::kBlockN, gemm::kHalfN;
// Activation rows of one TMA box. Of a part-filled pool block only the boxes that hold rows are loaded.
constexpr u32 kBoxRows = BOX_ROWS;

// Pool blocks of a wave. GEMM 2 of a wave comes after GEMM 1 of the next wave: by then its inputs are complete, and
// still in the L2 cache. 24 were 0.5 % faster than 16 from 1,024 tokens up; 32 were 0.3 to 0.4 % faster still, but the
// ring of activations holds two waves at least, which would be more than small layers fill.
constexpr u32 kWaveBlocks = WAVE_BLOCKS;

// Columns of a tile of GEMM 2: kHalfN where there are few pool blocks and that saves half a round of the thread blocks,
// else kBlockN. A half tile keeps fewer bytes on their way, so with more pool blocks it was slower.
constexpr u32 kFewBlocks = 16;
__device__ __forceinline__ u32 gemm2_tile_n(const Shape& shape, u32 num_pool_blocks, u32 num_ctas) {
    const u32 num_wide = num_pool_blocks * ((shape.hidden + kBlockN - 1) / kBlockN);
    const u32 num_halves = num_pool_blocks * (shape.hidden / kHalfN);
    const bool saves_half_a_round = (num_halves + num_ctas - 1) / num_ctas < 2 * ((num_wide + num_ctas - 1) / num_ctas);
    return num_pool_blocks <= kFewBlocks && saves_half_a_round ? kHalfN : kBlockN;
}

// Whether the L2 cache evicts the lines of weights before all others: where the weights of all pool blocks are at most
// 320 MiB. That gained 2 to 4 % with one or two tokens. Of more bytes the cache itself chooses better what to keep. No
// bit depends on it.
constexpr u64 kEvictFirstBytes = 320 << 20;
__device__ __forceinline__ bool evicts_weights_first(const Shape& shape, u32 num_pool_blocks) {
    return static_cast<u64>(num_pool_blocks) * 3 * shape.hidden * shape.intermediate <= kEvictFirstBytes;
}

// What every thread block of a rank derives from the received counts and keeps in shared memory.
struct Plan {
    u32 first_block[kMaxExperts + 1];  // [E_loc + 1]: first pool block of each local expert, then their number
    u32 num_rows[kMaxExperts];         // [E_loc]: rows of each local expert
    u32 first_row[kMaxExperts];        // [E_loc][R]: rows that an expert has from the ranks before; see receive()
    u32 gemm2_tile_n;                  // columns of a tile of GEMM 2
};

__device__ __forceinline__ u32 num_blocks_of(u32 num_rows) { return (num_rows + kBlockM - 1) / kBlockM; }

// Fills num_rows and first_row of the plan from the counts that the source ranks have published. Each thread takes an
// expert; all threads are synchronised at the end. Where thread blocks count for themselves (dispatch::count_locally)
// there is no first_row.
__device__ __forceinline__ void receive(const layout::Rank& rank, Plan& plan) {
    const u32 num_experts = rank.params.shape.num_local_experts, num_ranks = rank.params.shape.num_ranks;
    for (u32 expert_idx = threadIdx.x; expert_idx < num_experts; expert_idx += blockDim.x) {
        u32 counts[kMaxRanks];
#pragma unroll
        for (u32 source_idx = 0; source_idx < kMaxRanks; ++source_idx)  // all loads are under way at once
            counts[source_idx] =
                source_idx < num_ranks ? ptx::load_volatile(&rank.recv_count(rank.idx, source_idx)[expert_idx]) : 0;
        u32 num_rows = 0;
#pragma unroll
        for (u32 source_idx = 0; source_idx < kMaxRanks; ++source_idx) {
            if (source_idx < num_ranks) plan.first_row[expert_idx * num_ranks + source_idx] = num_rows;
            num_rows += counts[source_idx];
        }
        plan.num_rows[expert_idx] = num_rows;
    }
    __syncthreads();
}

// Fills first_block and gemm2_tile_n of the plan from num_rows: a prefix sum by one warp, 32 experts at a time. All
// threads are synchronised at the end.
__device__ __forceinline__ void make_plan(const layout::Rank& rank, Plan& plan) {
    const u32 num_experts = rank.params.shape.num_local_experts;
    if (threadIdx.x < 32) {
        u32 num_before = 0;  // pool blocks of the experts before these 32
        for (u32 first = 0; first < num_experts; first += 32) {
            const u32 expert_idx = first + threadIdx.x;
            u32 sum = expert_idx < num_experts ? num_blocks_of(plan.num_rows[expert_idx]) : 0;
#pragma unroll
            for (u32 distance = 1; distance < 32; distance *= 2) {
                const u32 left = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
                if (threadIdx.x >= distance) sum += left;
            }
            if (expert_idx < num_experts) plan.first_block[expert_idx + 1] = num_before + sum;
            num_before += __shfl_sync(0xFFFFFFFFu, sum, 31);
        }
        if (threadIdx.x == 0) {
            plan.first_block[0] = 0;
            plan.gemm2_tile_n = gemm2_tile_n(rank.params.shape, num_before, rank.num_ctas);
        }
    }
    __syncthreads();
}

// The local expert of a pool block: the last one that begins at or before it, which therefore has rows.
__device__ __forceinline__ u32 expert_of(const Plan& plan, u32 num_experts, u32 pool_block_idx) {
    u32 low = 0, high = num_experts;  // first_block[low] <= pool_block_idx < first_block[high]
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (plan.first_block[middle] <= pool_block_idx) low = middle;
        else high = middle;
    }
    return low;
}

__device__ __forceinline__ u32 num_rows_in_block(const Plan& plan, u32 expert_idx, u32 pool_block_idx) {
    return min(kBlockM, plan.num_rows[expert_idx] - (pool_block_idx - plan.first_block[expert_idx]) * kBlockM);
}

// One tile of GEMM 1 or of GEMM 2.
struct Task {
    u32 is_gemm2;
    u32 pool_block_idx, expert_idx;  // the expert is a local one
    u32 first_column, num_columns;   // among the 2I interleaved columns of GEMM 1, or the H columns of GEMM 2
    u32 num_rows;                    // of the pool block; 0 means that there is no task any more
};

// The half tiles (kHalfN columns) of a pool block: its counters gemm1_done and gemm2_done grow to these numbers.
__device__ __forceinline__ u32 num_gemm1_half_tiles(const Shape& shape) { return 2 * shape.intermediate / kHalfN; }
__device__ __forceinline__ u32 num_gemm2_half_tiles(const Shape& shape) { return shape.hidden / kHalfN; }

// Writes task number `task_idx` of a rank to `task`. The order is GEMM 1 of wave 0; then for each further wave its GEMM
// 1 and GEMM 2 of the wave before; at the end GEMM 2 of the last wave. Thread blocks take the numbers in order, so a
// task only waits for tasks that running thread blocks have already taken. In a wave, all pool blocks of an expert take
// a tile column before the next column, so that the expert's weights are read once.
__device__ __forceinline__ void task_of(const layout::Rank& rank, const Plan& plan, u32 task_idx, Task& task) {
    const Shape& shape = rank.params.shape;
    const u32 num_experts = shape.num_local_experts, num_pool_blocks = plan.first_block[num_experts];
    task.num_rows = 0;
    if (num_pool_blocks == 0) return;
    // Tiles of a pool block in either GEMM; the last wave and its pool blocks.
    const u32 gemm1_tiles = 2 * shape.intermediate / kBlockN;
    const u32 gemm2_tiles = (shape.hidden + plan.gemm2_tile_n - 1) / plan.gemm2_tile_n;
    const u32 last_wave = (num_pool_blocks - 1) / kWaveBlocks,
              last_wave_blocks = num_pool_blocks - last_wave * kWaveBlocks;
    u32 tile = task_idx;  // becomes the number of the tile in its GEMM of its wave
    u32 wave = 0;
    task.is_gemm2 = 0;
    const u32 first_tiles = (last_wave == 0 ? last_wave_blocks : kWaveBlocks) * gemm1_tiles;
    if (tile >= first_tiles) {
        tile -= first_tiles;
        // A pair is GEMM 1 of a wave and GEMM 2 of the wave before. Pair p is of the waves p + 1 and p.
        const u32 pair_tiles = kWaveBlocks * (gemm1_tiles + gemm2_tiles);
        const u32 pair = last_wave == 0 ? 0 : min(tile / pair_tiles, last_wave - 1);
        tile -= pair * pair_tiles;
        wave = pair + 1;
        const u32 pair_gemm1_tiles =
            last_wave == 0 ? 0 : (wave == last_wave ? last_wave_blocks : kWaveBlocks) * gemm1_tiles;
        const u32 pair_gemm2_tiles = last_wave == 0 ? 0 : kWaveBlocks * gemm2_tiles;
        if (tile >= pair_gemm1_tiles) {
            tile -= pair_gemm1_tiles, wave = pair, task.is_gemm2 = 1;
            if (tile >= pair_gemm2_tiles) tile -= pair_gemm2_tiles, wave = last_wave;
            if (wave == last_wave && tile >= last_wave_blocks * gemm2_tiles) return;
        }
    }
    const u32 tile_columns = task.is_gemm2 ? gemm2_tiles : gemm1_tiles,
              tile_n = task.is_gemm2 ? plan.gemm2_tile_n : kBlockN;
    const u32 begin = wave * kWaveBlocks, end = min(num_pool_blocks, begin + kWaveBlocks);
    task.expert_idx = expert_of(plan, num_experts, begin + tile / tile_columns);
    // The run of pool blocks that this expert has in the wave.
    const u32 run = max(begin, plan.first_block[task.expert_idx]);
    const u32 run_end = min(end, plan.first_block[task.expert_idx + 1]);
    tile -= (run - begin) * tile_columns;
    task.first_column = tile / (run_end - run) * tile_n;
    task.num_columns = min(tile_n, (task.is_gemm2 ? shape.hidden : 2 * shape.intermediate) - task.first_column);
    task.pool_block_idx = run + tile % (run_end - run);
    task.num_rows = num_rows_in_block(plan, task.expert_idx, task.pool_block_idx);
}

// The number of the next task of this thread block. Its first task is number cta_idx; after that a counter of the rank
// gives out the numbers, so that thread blocks with long tasks take fewer.
__device__ __forceinline__ u32 next_task_idx(const layout::Rank& rank) {
    return rank.num_ctas + ptx::atomic_add(&rank.workspace().num_tasks_taken, 1);
}

}  // namespace scheduler
