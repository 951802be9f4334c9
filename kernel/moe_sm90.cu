// The fused layer: one persistent launch. Read top to bottom; the rooms do the work.
//
//   all threads      announce the routed rows, meet all ranks, plan                    dispatch, barrier, scheduler
//   warp 0           TMA producer: operands of each task into the ring                 gemm
//   warps 1 - 3      pull rows of peers into the pool                                  dispatch      Eq. (1)
//   warps 4 - 11     two math warpgroups: GEMM 1, SwiGLU, cast; GEMM 2, scatter        gemm, swiglu, scatter  Eq. (2) - (7)
//   all threads      meet all ranks, sum the slots, clean the counters                 combine       Eq. (8)
#include "combine.cuh"
#include "dispatch.cuh"
#include "scatter.cuh"
#include "stats.cuh"
#include "storage.cuh"

using scheduler::kBlockM;
using scheduler::kBlockN;
using scheduler::kBoxRows;

// A math warpgroup takes 64 rows of each 128 of the tile: a part-filled tile is shared fairly.
constexpr u32 kTurnRows = 128, kTurns = kBlockM / kTurnRows;

// Waits for a stage; gives up where the launch has failed. Copies under way are given time to land first, so that all
// warps of the block take the same way: a warpgroup cannot multiply with a warp missing.
__device__ __forceinline__ bool wait_stage(const layout::Rank& r, u64* full_or_empty, u32 parity) {
    constexpr u64 kLandingNs = 10'000'000;
    u64 failed_at = 0;
    for (u32 i = 1; !ptx::mbarrier_try_wait(full_or_empty, parity); ++i) {
        if (i % 1024 != 0 || !barrier::failed(r.p)) continue;
        if (failed_at == 0) failed_at = ptx::global_timer();
        else if (ptx::global_timer() - failed_at > kLandingNs) return false;
    }
    return true;
}

// The rows of the task's pool block have arrived, or GEMM 1 has written all of them.
__device__ __forceinline__ bool wait_operands(const layout::Rank& r, const scheduler::Task& task) {
    const u32* counter = (task.l2 ? r.block_l1_tiles() : r.block_rows()) + task.block;
    const u32 expected = task.l2 ? 2 * r.p.shape.intermediate / kBlockN : task.rows;
    const bool ready = barrier::spin(r, counter, task.l2 ? barrier::kBlockL1Tiles : barrier::kBlockRows, expected,
                                     [&](u32 seen) { return seen >= expected; });
    ptx::fence_proxy_async_all();
    return ready;
}

// Loads the stages of one task. The weights of as many stages as the ring has go first: they wait for nobody, while the
// activations may still be on their way or being computed.
template <u32 kGroup>
__device__ __forceinline__ bool produce(const layout::Rank& r, SharedStorage& s, gemm::Place<kStages>& place,
                                        const scheduler::Task& task) {
    using Stage = gemm::Stage<kBlockM, kBlockN, kGroup>;
    const Shape& shape = r.p.shape;
    const u32 blocks = (task.l2 ? shape.intermediate : shape.hidden) / gemm::kBlockK;
    const u32 n = task.l2 ? shape.hidden : 2 * shape.intermediate;
    const ptx::TensorMap& a = task.l2 ? r.own.l2_acts : r.own.l1_acts;
    const ptx::TensorMap& b = task.l2 ? r.own.w2 : r.own.w1;
    const float* a_sf = r.mine<float>(task.l2 ? r.p.layout.l2_acts_sf : r.p.layout.l1_acts_sf) + task.block * kBlockM;
    const u32 boxes = (task.rows + kBoxRows - 1) / kBoxRows;
    const u32 bytes = (boxes * kBoxRows + kBlockN) * gemm::kBlockK + Stage::kGroups * kBlockM * 4;

    const auto load_weights = [&](u32 i, const gemm::Place<kStages>& at) {
        if (!wait_stage(r, &s.empty[at.index], at.parity ^ 1)) return false;
        ptx::mbarrier_arrive_expect(&s.full[at.index], bytes);
        ptx::tma_load_2d(reinterpret_cast<Stage&>(s.stages[at.index]).b, b, &s.full[at.index], i * gemm::kBlockK,
                         task.expert * n + task.column * kBlockN);
        return true;
    };
    const u32 ahead = min(blocks, kStages);
    gemm::Place<kStages> first = place;
    for (u32 i = 0; i < ahead; ++i, first.advance())
        if (!load_weights(i, first)) return false;
    if (!wait_operands(r, task)) return false;
    for (u32 i = 0; i < blocks; ++i, place.advance()) {
        if (i >= ahead && !load_weights(i, place)) return false;
        auto& stage = reinterpret_cast<Stage&>(s.stages[place.index]);
        u64* full = &s.full[place.index];
        for (u32 box = 0; box < boxes; ++box)
            ptx::tma_load_2d(stage.a[box * kBoxRows], a, full, i * gemm::kBlockK, task.block * kBlockM + box * kBoxRows);
        for (u32 g = 0; g < Stage::kGroups; ++g)
            ptx::bulk_load(stage.a_sf[g], a_sf + static_cast<u64>(i * Stage::kGroups + g) * shape.pool_rows, kBlockM * 4, full);
    }
    return true;
}

// A warpgroup whose 64 rows are all padding only keeps the ring turning.
__device__ __forceinline__ bool pass(const layout::Rank& r, SharedStorage& s, gemm::Place<kStages>& place,
                                     const scheduler::Task& task) {
    const u32 blocks = (task.l2 ? r.p.shape.intermediate : r.p.shape.hidden) / gemm::kBlockK;
    for (u32 b = 0; b < blocks; ++b, place.advance()) {
        if (!wait_stage(r, &s.full[place.index], place.parity)) return false;
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&s.empty[place.index]);
    }
    return true;
}

template <u32 kGroup>
__device__ __forceinline__ bool multiply(const layout::Rank& r, SharedStorage& s, gemm::Place<kStages>& place,
                                         const scheduler::Task& task, float (&sum)[kTurns][kBlockN / 2], u32 first_row, u32 row) {
    const Shape& shape = r.p.shape;
    const u32 blocks = (task.l2 ? shape.intermediate : shape.hidden) / gemm::kBlockK;
    const u32 columns = (task.l2 ? shape.hidden : 2 * shape.intermediate) / kBlockN;
    // The scales of this tile's gate rows, and how far behind them those of its up rows stand; in GEMM 2 they are the same.
    const float* w_sf = (task.l2 ? r.own.w2_sf : r.own.w1_sf) +
                        static_cast<u64>(task.expert * columns + (task.l2 ? task.column : task.column / 2)) * blocks;
    const u32 up = task.l2 ? 0 : columns / 2 * blocks;
    constexpr u32 kInFlight = kTurns == 1 ? gemm::kBlockK / kGroup : 1;
    const bool second = task.rows > first_row + kTurnRows;
    float acc[kInFlight][kBlockN / 2];
    gemm::define<kInFlight, kBlockN>(acc);
    gemm::define<kTurns, kBlockN>(sum);
    for (u32 b = 0; b < blocks; ++b, place.advance()) {
        const float scales[2] = {__ldg(w_sf + b), __ldg(w_sf + up + b)};
        if (!wait_stage(r, &s.full[place.index], place.parity)) return false;
        auto& stage = reinterpret_cast<gemm::Stage<kBlockM, kBlockN, kGroup>&>(s.stages[place.index]);
        if constexpr (kTurns == 1) gemm::multiply_stage(sum[0], acc, stage, &s.empty[place.index], first_row, row, scales);
        else gemm::multiply_stage_in_turn<kTurnRows>(sum, acc, stage, &s.empty[place.index], second, first_row, row, scales);
    }
    return true;
}

template <bool kFast>
__device__ __forceinline__ void math_role(const layout::Rank& r, SharedStorage& s) {
    const u32 first_row = (threadIdx.x / 128 - 1) * 64, row_of_64 = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    gemm::Place<kStages> place;
    scheduler::Task task;
    float sum[kTurns][kBlockN / 2];
    for (u32 i = 0; scheduler::next_task(r, s.plan, i, task); ++i) {
        if (first_row >= task.rows) {
            if (!pass(r, s, place, task)) return;
        } else if (!(task.l2 ? multiply<64>(r, s, place, task, sum, first_row, row_of_64)
                             : multiply<128>(r, s, place, task, sum, first_row, row_of_64))) {
            return;
        }
        scheduler::next_task(r, s.plan, i, task);  // once more: its registers are the sums' until here
#pragma unroll
        for (u32 turn = 0; turn < kTurns; ++turn) {
            if (turn * kTurnRows + first_row >= task.rows) break;
            const u32 row_in_block = turn * kTurnRows + first_row + row_of_64;
            const u64 row = static_cast<u64>(task.block) * kBlockM + row_in_block;
            if (task.l2) {
                scatter::to_slot(r, sum[turn], row, row_in_block, task.rows, task.column * kBlockN);
                continue;
            }
            const float* pool_weight = r.mine<float>(r.p.layout.pool_weight);
            const float weight[2] = {pool_weight[row], pool_weight[row + 8]};
            swiglu::requantise_tile<kFast>(sum[turn], weight, r.p.swiglu, r.mine<u8>(r.p.layout.l2_acts),
                                           r.mine<float>(r.p.layout.l2_acts_sf), row, task.column, r.p.shape.pool_rows,
                                           r.p.shape.intermediate);
        }
        if (task.l2) continue;
        ptx::fence_proxy_async_all();  // TMA reads what these threads wrote
        ptx::named_barrier<1, 32 * kMathWarps>();
        if (threadIdx.x == 128) ptx::reduce_add_release(&r.block_l1_tiles()[task.block], 1);
    }
}

__device__ __forceinline__ void producer_role(const layout::Rank& r, SharedStorage& s) {
    gemm::Place<kStages> place;
    scheduler::Task task;
    for (u32 i = 0; scheduler::next_task(r, s.plan, i, task); ++i) {
        if (!(task.l2 ? produce<64>(r, s, place, task) : produce<128>(r, s, place, task))) return;
    }
}

// The counters of the pool are zero again for the next launch; all blocks of the rank have met since they were last read.
__device__ __forceinline__ void clean(const layout::Rank& r) {
    const u32 first = r.block * blockDim.x + threadIdx.x, step = r.blocks * blockDim.x;
    for (u32 i = first; i < 2 * r.p.shape.pool_blocks; i += step) r.block_rows()[i] = 0;
}

template <bool kFast>
__device__ __forceinline__ void moe(const Params& p) {
    extern __shared__ __align__(1024) u8 shared[];
    auto& s = *reinterpret_cast<SharedStorage*>(shared);
    const layout::Rank r(p);
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < kStages; ++i) ptx::mbarrier_init(&s.full[i], 1), ptx::mbarrier_init(&s.empty[i], kMathWarps);
        for (dispatch::Transit& transit : s.transit) ptx::mbarrier_init(&transit.arrived, 1);
        ptx::fence_mbarrier_init();
    }

    dispatch::announce(r);
    if (!barrier::meet(r, [&] { dispatch::publish(r); })) return;
    scheduler::make_plan(r, s.plan);
    stats::accumulate(r, s.plan);

    // 56 + 2 x 224 = 3 x 168, what the block starts with: a sum above it would wait for ever.
    if (threadIdx.x < 128) {
        ptx::fewer_registers<56>();
        if (threadIdx.x == 0) producer_role(r, s);
        else if (threadIdx.x >= 32) dispatch::pull(r, s.plan, s.transit[threadIdx.x / 32 - 1], threadIdx.x / 32 - 1, kDispatchWarps);
    } else {
        ptx::more_registers<224>();
        math_role<kFast>(r, s);
    }
    __syncwarp();  // the producer is one lane of its warp

    if (!barrier::meet(r, [] {})) return;
    combine::combine(r);
    clean(r);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) moe_fast(const __grid_constant__ Params p) { moe<true>(p); }
extern "C" __global__ void __launch_bounds__(kThreads, 1) moe_precise(const __grid_constant__ Params p) { moe<false>(p); }
