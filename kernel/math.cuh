// The math role, run by two warpgroups: for each task GEMM 1, SwiGLU and re-quantisation, or GEMM 2 and scatter.
// Inputs: tasks and operands in shared memory, the scales of the weights. Outputs: l2_acts and l2_acts_sf in the ring,
// or slots of the source ranks.
#pragma once
#include "phase.cuh"
#include "scatter.cuh"
#include "storage.cuh"

namespace math {

using barrier::wait_mbarrier;
using gemm::kBlockM, gemm::kBlockN, gemm::kHalfN;

// Computes the sums of this warpgroup's share of a tile. A tile of GEMM 1 has two scales at each K block, one for its
// gate and one for its up columns; a tile of GEMM 2 has one for each half tile. Returns false if the launch has failed.
template <bool kIsGemm1>
__device__ __forceinline__ bool multiply(const layout::Rank& rank, gemm::Pipeline& pipeline, gemm::PipelineState& state,
                                         const scheduler::Task& task, const gemm::Share& share,
                                         float (&sum)[2][gemm::kNumSums]) {
    const Shape& shape = rank.params.shape;
    const u32 num_k_blocks = (kIsGemm1 ? shape.hidden : shape.intermediate) / gemm::kBlockK;
    const auto wait = [&](u64* full_barrier, u32 parity) { return wait_mbarrier(rank, full_barrier, parity); };
    if (share.num_half_tiles == 0) return gemm::pass(pipeline, state, num_k_blocks, wait);
    // An expert has num_sf_rows rows of weight scales, one for each 128 weight rows.
    const u32 num_sf_rows = (kIsGemm1 ? 2 * shape.intermediate : shape.hidden) / kHalfN;
    const u32 first_sf_row = kIsGemm1 ? task.first_column / kBlockN : (task.first_column + share.first_column) / kHalfN;
    const float* sf_ptr = (kIsGemm1 ? rank.own.weights.w1_sf_ptr : rank.own.weights.w2_sf_ptr) +
                          static_cast<u64>(task.expert_idx * num_sf_rows + first_sf_row) * num_k_blocks;
    const u32 second = (kIsGemm1 ? num_sf_rows / 2 : share.num_half_tiles - 1) * num_k_blocks;
    return gemm::multiply<kIsGemm1, kScaleK<kIsGemm1>>(
        sum, pipeline, state, share, num_k_blocks, wait, [&](float (&w_sf)[2], u32 k_block_idx) {
            w_sf[0] = __ldg(sf_ptr + k_block_idx), w_sf[1] = __ldg(sf_ptr + second + k_block_idx);
        });
}

// Brings what the epilogue will read about this warp's 16 rows, one line, into the L1 cache while the GEMM runs.
__device__ __forceinline__ void prefetch_rows(const layout::Rank& rank, const scheduler::Task& task, u32 first_row) {
    if (threadIdx.x % 32 != 0) return;
    const Offsets& offset = rank.params.layout.offset;
    const u64 pool_row = static_cast<u64>(task.pool_block_idx) * kBlockM + first_row + gemm::row_of_64();
    if (task.is_gemm2) ptx::prefetch_l1(rank.own_ptr<uint2>(offset.pool_source) + pool_row);
    else ptx::prefetch_l1(rank.own_ptr<float>(offset.pool_weight) + pool_row);
}

template <bool kFast>
__device__ __forceinline__ void math_role(const layout::Rank& rank, SharedStorage& storage) {
    const u32 warpgroup_idx = gemm::math_warpgroup_idx(), row_of_64 = gemm::row_of_64();
    const Offsets& offset = rank.params.layout.offset;
    gemm::PipelineState state;
    float sum[2][gemm::kNumSums];
    const auto share_of = [&](const scheduler::Task& task) {
        // The maximum over the columns that share a scale has to stay in a warpgroup.
        const bool keep_rows_whole = !task.is_gemm2 && kHalfTilesPerScale == 2;
        return gemm::share_of(warpgroup_idx, task.num_rows, task.num_columns, keep_rows_whole);
    };
    for (u32 task_idx = 0;; ++task_idx) {
        // The task is read from shared memory wherever it is needed, because the registers are taken by the sums.
        const volatile scheduler::Task& shared = storage.queue.tasks[task_idx % kNumTasks];
        const auto read = [&] {
            return scheduler::Task{shared.is_gemm2,     shared.pool_block_idx, shared.expert_idx,
                                   shared.first_column, shared.num_columns,    shared.num_rows};
        };
        if (!wait_mbarrier(rank, &storage.pipeline.full_barriers[state.stage_idx], state.parity)) return;
        phase::mark(rank.params, phase::kWait);
        if (shared.num_rows == 0) return;
        prefetch_rows(rank, read(), share_of(read()).first_row);
        if (!(shared.is_gemm2 ? multiply<false>(rank, storage.pipeline, state, read(), share_of(read()), sum)
                              : multiply<true>(rank, storage.pipeline, state, read(), share_of(read()), sum)))
            return;
        const scheduler::Task task = read();
        const gemm::Share share = share_of(task);
        phase::mark(rank.params, task.is_gemm2 ? phase::kL2 : phase::kL1);
        const u32 row_in_block = share.first_row + row_of_64;
        const u64 pool_row = static_cast<u64>(task.pool_block_idx) * kBlockM + row_in_block;
#pragma unroll
        for (u32 half_idx = 0; half_idx < 2; ++half_idx) {
            if (half_idx >= share.num_half_tiles) break;
            const u32 column = task.first_column + share.first_column + half_idx * kHalfN;
            if (task.is_gemm2) {
                scatter::to_slot(rank, sum[half_idx], pool_row, row_in_block, task.num_rows, column);
                continue;
            }
            if (half_idx % kHalfTilesPerScale != 0) continue;
            const float* weight_ptr = rank.own_ptr<float>(offset.pool_weight);
            const float weight[2] = {weight_ptr[pool_row], weight_ptr[pool_row + 8]};
            swiglu::requantise_tile<kFast, kHalfTilesPerScale>(
                sum + half_idx, weight, rank.params.swiglu, rank.own_ptr<u8>(offset.l2_acts),
                rank.own_ptr<float>(offset.l2_acts_sf), rank.ring_row(task.pool_block_idx, row_in_block),
                column / kHalfN, rank.params.shape.num_ring_rows, rank.params.shape.intermediate);
        }
        phase::mark(rank.params, task.is_gemm2 ? phase::kL2Epilogue : phase::kL1Epilogue);
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&storage.queue.finished[task_idx % kNumTasks]);
    }
}

}  // namespace math
