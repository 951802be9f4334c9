// The fused layer: one persistent launch. Read top to bottom; the rooms do the work.
//
//   all threads      count and announce the routed rows, meet all ranks, plan          dispatch, barrier, scheduler
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

// Waits for a stage; gives up where the launch has failed.
__device__ __forceinline__ bool wait_stage(const layout::Rank& r, u64* full_or_empty, u32 parity) {
    for (u32 i = 1; !ptx::mbarrier_try_wait(full_or_empty, parity); ++i)
        if (i % 1024 == 0 && barrier::failed(r.p)) return false;
    return true;
}

// The rows of the task's pool block have arrived, or GEMM 1 has written all of them.
__device__ __forceinline__ bool wait_operands(const layout::Rank& r, const scheduler::Plan& plan, const scheduler::Task& task) {
    const u32* counter = (task.l2 ? r.block_l1_tiles() : r.block_rows()) + task.block;
    const u32 expected = task.l2 ? 2 * r.p.shape.intermediate / kBlockN : scheduler::rows_in_block(plan, task.expert, task.block);
    const bool ready = barrier::spin(r, counter, task.l2 ? barrier::kBlockL1Tiles : barrier::kBlockRows, expected,
                                     [&](u32 seen) { return seen >= expected; });
    ptx::fence_proxy_async_all();
    return ready;
}

template <u32 kGroup>
__device__ __forceinline__ bool produce(const layout::Rank& r, SharedStorage& s, gemm::Place<kStages>& place,
                                        const scheduler::Task& task) {
    const Shape& shape = r.p.shape;
    const u32 k = task.l2 ? shape.intermediate : shape.hidden, n = task.l2 ? shape.hidden : 2 * shape.intermediate;
    const ptx::TensorMap& a = task.l2 ? r.own.l2_acts : r.own.l1_acts;
    const ptx::TensorMap& b = task.l2 ? r.own.w2 : r.own.w1;
    const float* a_sf = r.mine<float>(task.l2 ? r.p.layout.l2_acts_sf : r.p.layout.l1_acts_sf) + task.block * kBlockM;
    for (u32 i = 0; i < k / gemm::kBlockK; ++i, place.advance()) {
        auto& stage = reinterpret_cast<gemm::Stage<kBlockM, kBlockN, kGroup>&>(s.stages[place.index]);
        u64* full = &s.full[place.index];
        if (!wait_stage(r, &s.empty[place.index], place.parity ^ 1)) return false;
        ptx::mbarrier_arrive_expect(full, stage.kBytes);
        ptx::tma_load_2d(stage.a, a, full, i * gemm::kBlockK, task.block * kBlockM);
        ptx::tma_load_2d(stage.b, b, full, i * gemm::kBlockK, task.expert * n + task.column * kBlockN);
        for (u32 g = 0; g < stage.kGroups; ++g)
            ptx::bulk_load(stage.a_sf[g], a_sf + static_cast<u64>(i * stage.kGroups + g) * shape.pool_rows, kBlockM * 4, full);
    }
    return true;
}

template <u32 kGroup>
__device__ __forceinline__ bool multiply(const layout::Rank& r, SharedStorage& s, gemm::Place<kStages>& place,
                                         const scheduler::Task& task, float (&sum)[kBlockN / 2], u32 first_row, u32 row) {
    const Shape& shape = r.p.shape;
    const u32 blocks = (task.l2 ? shape.intermediate : shape.hidden) / gemm::kBlockK;
    const u32 columns = (task.l2 ? shape.hidden : 2 * shape.intermediate) / kBlockN;
    const float* w_sf = (task.l2 ? r.own.w2_sf : r.own.w1_sf) + static_cast<u64>(task.expert) * columns * blocks;
    const float* first = w_sf + static_cast<u64>(task.l2 ? task.column : task.column / 2) * blocks;
    const float* second = task.l2 ? first : first + static_cast<u64>(columns / 2) * blocks;  // the up rows of a tile
#pragma unroll
    for (float& value : sum) value = 0.0f;
    for (u32 b = 0; b < blocks; ++b, place.advance()) {
        const float scales[2] = {__ldg(first + b), __ldg(second + b)};
        if (!wait_stage(r, &s.full[place.index], place.parity)) return false;
        auto& stage = reinterpret_cast<gemm::Stage<kBlockM, kBlockN, kGroup>&>(s.stages[place.index]);
        gemm::multiply_stage(sum, stage, &s.empty[place.index], first_row, row, scales);
    }
    return true;
}

template <bool kFast>
__device__ __forceinline__ void math_role(const layout::Rank& r, SharedStorage& s) {
    const u32 first_row = (threadIdx.x / 128 - 1) * 64, row_of_64 = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const u32 row_in_block = first_row + row_of_64;
    gemm::Place<kStages> place;
    scheduler::Task task;
    float sum[kBlockN / 2];
    for (u32 i = 0; scheduler::next_task(r, s.plan, i, task); ++i) {
        const u64 row = static_cast<u64>(task.block) * kBlockM + row_in_block;
        if (task.l2) {
            if (!multiply<64>(r, s, place, task, sum, first_row, row_of_64)) return;
            const u32 rows = scheduler::rows_in_block(s.plan, task.expert, task.block);
            scatter::to_slot(r, sum, row, row_in_block, rows, task.column * kBlockN);
            continue;
        }
        if (!multiply<128>(r, s, place, task, sum, first_row, row_of_64)) return;
        const float* pool_weight = r.mine<float>(r.p.layout.pool_weight);
        const float weight[2] = {pool_weight[row], pool_weight[row + 8]};
        swiglu::requantise_tile<kFast>(sum, weight, r.p.swiglu, r.mine<u8>(r.p.layout.l2_acts),
                                       r.mine<float>(r.p.layout.l2_acts_sf), row, task.column, r.p.shape.pool_rows,
                                       r.p.shape.intermediate);
        ptx::fence_proxy_async_all();  // TMA reads what these threads wrote
        ptx::named_barrier<1, 32 * kMathWarps>();
        if (threadIdx.x == 128) ptx::reduce_add_release(&r.block_l1_tiles()[task.block], 1);
    }
}

__device__ __forceinline__ void producer_role(const layout::Rank& r, SharedStorage& s) {
    gemm::Place<kStages> place;
    scheduler::Task task;
    for (u32 i = 0; scheduler::next_task(r, s.plan, i, task); ++i) {
        if (!wait_operands(r, s.plan, task)) return;
        if (!(task.l2 ? produce<64>(r, s, place, task) : produce<128>(r, s, place, task))) return;
    }
}

// The counters are zero again for the next launch; all blocks of the rank have met since they were last read.
__device__ __forceinline__ void clean(const layout::Rank& r) {
    Workspace& w = r.workspace();
    const u32 first = r.block * blockDim.x + threadIdx.x, step = r.blocks * blockDim.x;
    for (u32 i = first; i < r.p.shape.experts; i += step) w.send_count[i] = w.send_cursor[i] = 0;
    for (u32 i = first; i < 2 * (r.p.shape.pool_rows / kBlockM); i += step) r.block_rows()[i] = 0;
}

template <bool kFast>
__device__ __forceinline__ void moe(const Params& p) {
    extern __shared__ __align__(1024) u8 shared[];
    auto& s = *reinterpret_cast<SharedStorage*>(shared);
    const layout::Rank r(p);
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < kStages; ++i) ptx::mbarrier_init(&s.full[i], 1), ptx::mbarrier_init(&s.empty[i], kMathWarps);
        ptx::fence_mbarrier_init();
    }

    dispatch::count(r);
    if (!barrier::meet(r, false)) return;
    dispatch::announce(r, s.plan.rows);
    if (!barrier::meet(r, true)) return;
    scheduler::make_plan(r, s.plan);
    stats::accumulate(r, s.plan);

    if (threadIdx.x < 128) {
        ptx::fewer_registers<40>();
        if (threadIdx.x == 0) producer_role(r, s);
        else if (threadIdx.x >= 32) dispatch::pull(r, s.plan, threadIdx.x / 32 - 1, kDispatchWarps);
    } else {
        ptx::more_registers<232>();
        math_role<kFast>(r, s);
    }
    __syncwarp();  // the producer is one lane of its warp

    if (!barrier::meet(r, true)) return;
    combine::combine(r);
    clean(r);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) moe_fast(const __grid_constant__ Params p) { moe<true>(p); }
extern "C" __global__ void __launch_bounds__(kThreads, 1) moe_precise(const __grid_constant__ Params p) { moe<false>(p); }
