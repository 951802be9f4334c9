// What a math warpgroup does with a task: GEMM 1, SwiGLU and re-quantisation, or GEMM 2 and scatter.
#pragma once
#include "phase.cuh"
#include "scatter.cuh"
#include "storage.cuh"

namespace math {

using barrier::wait_stage;
using gemm::kBlockM, gemm::kBlockN, gemm::kTurnN;

// The sums of this warpgroup's share of a tile. GEMM 1's tile has one scale for its gate and one for its up columns.
template <bool kL1>
__device__ __forceinline__ bool multiply(const layout::Rank& r, gemm::Ring& ring, gemm::Place& place, const scheduler::Task& task,
                                         const gemm::Share& share, float (&sum)[2][gemm::kSums]) {
    const Shape& shape = r.p.shape;
    const u32 blocks = (kL1 ? shape.hidden : shape.intermediate) / gemm::kBlockK;
    const auto wait = [&](u64* full, u32 parity) { return wait_stage(r, full, parity); };
    if (share.turns == 0) return gemm::pass(ring, place, blocks, wait);
    const u32 n = (kL1 ? 2 * shape.intermediate : shape.hidden) / kTurnN;  // rows of weight scales of an expert
    const u32 first = kL1 ? task.first_column / kBlockN : (task.first_column + share.first_column) / kTurnN;
    const float* w_sf = (kL1 ? r.own.w1_sf : r.own.w2_sf) + static_cast<u64>(task.expert * n + first) * blocks;
    const u32 second = (kL1 ? n / 2 : share.turns - 1) * blocks;
    return gemm::multiply<kL1, kGroup<kL1>>(sum, ring, place, share, blocks, wait, [&](float (&scales)[2], u32 b) {
        scales[0] = __ldg(w_sf + b), scales[1] = __ldg(w_sf + second + b);
    });
}

// What the epilogue will want to know of this warp's 16 rows: one line of L1 each, there by the time it does.
__device__ __forceinline__ void prefetch_rows(const layout::Rank& r, const scheduler::Task& task, u32 first_row) {
    if (threadIdx.x % 32 != 0) return;
    const u64 row = static_cast<u64>(task.block) * kBlockM + first_row + gemm::row_of_64();
    if (task.l2) ptx::prefetch_l1(r.mine<uint2>(r.p.layout.pool_source) + row);
    else ptx::prefetch_l1(r.mine<float>(r.p.layout.pool_weight) + row);
}

template <bool kFast>
__device__ __forceinline__ void math_role(const layout::Rank& r, SharedStorage& s) {
    const u32 warpgroup = gemm::math_warpgroup(), row_of_64 = gemm::row_of_64();
    gemm::Place place;
    float sum[2][gemm::kSums];
    const auto share_of = [&](const scheduler::Task& task) {
        const bool whole_rows = !task.l2 && kTurnsPerScale == 2;  // their maximum stays in the warpgroup
        return gemm::share_of(warpgroup, task.rows, task.columns, whole_rows);
    };
    for (u32 i = 0;; ++i) {
        // Read from shared memory where it is needed: registers are for the sums.
        const volatile scheduler::Task& shared = s.tasks[i % kTasks];
        const auto read = [&] {
            return scheduler::Task{shared.l2, shared.block, shared.expert, shared.first_column, shared.columns, shared.rows};
        };
        if (!wait_stage(r, &s.ring.full[place.index], place.parity)) return;
        phase::mark(r.p, phase::kWait);
        if (shared.rows == 0) return;
        prefetch_rows(r, read(), share_of(read()).first_row);
        if (!(shared.l2 ? multiply<false>(r, s.ring, place, read(), share_of(read()), sum)
                        : multiply<true>(r, s.ring, place, read(), share_of(read()), sum)))
            return;
        const scheduler::Task task = read();
        const gemm::Share share = share_of(task);
        phase::mark(r.p, task.l2 ? phase::kL2 : phase::kL1);
        const u32 row_in_block = share.first_row + row_of_64;
        const u64 row = static_cast<u64>(task.block) * kBlockM + row_in_block;
#pragma unroll
        for (u32 turn = 0; turn < 2; ++turn) {
            if (turn >= share.turns) break;
            const u32 column = task.first_column + share.first_column + turn * kTurnN;
            if (task.l2) {
                scatter::to_slot(r, sum[turn], row, row_in_block, task.rows, column);
                continue;
            }
            if (turn % kTurnsPerScale != 0) continue;
            const float* pool_weight = r.mine<float>(r.p.layout.pool_weight);
            const float weight[2] = {pool_weight[row], pool_weight[row + 8]};
            swiglu::requantise_tile<kFast, kTurnsPerScale>(
                sum + turn, weight, r.p.swiglu, r.mine<u8>(r.p.layout.l2_acts), r.mine<float>(r.p.layout.l2_acts_sf),
                r.ring_row(task.block, row_in_block), column / kTurnN, r.p.shape.ring_rows, r.p.shape.intermediate);
        }
        phase::mark(r.p, task.l2 ? phase::kL2Epilogue : phase::kL1Epilogue);
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&s.finished[i % kTasks]);
    }
}

}  // namespace math
