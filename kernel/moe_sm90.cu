// The fused layer in one persistent launch. Read it top to bottom; the rooms do the work.
//
//   who runs it       what happens                                                rooms
//   all threads       announce the routed rows and meet all ranks, or count       dispatch, barrier,
//                     the rows alone; make the plan; statistics                   scheduler, stats: Eq. (9)
//   the roles, side by side:
//     warp 0          producer: loads the operands of each task                   producer
//     warps 1, 2      dispatch: pull rows of peers into the pool                  dispatch: Eq. (1)
//     warp 3          scout: finds tasks, waits for their operands, reports       producer, scheduler
//                     what is finished
//     warps 4 - 11    math: GEMM 1, SwiGLU, cast; GEMM 2, scatter                 math, gemm, swiglu, scatter:
//                                                                                 Eq. (2) - (7)
//   all threads       meet all ranks, sum the slots, clear the counters           barrier, combine: Eq. (8)
//
// A thread block belongs to one rank of the launch, see layout.cuh; all thread blocks are resident at once.
#include "combine.cuh"
#include "math.cuh"
#include "producer.cuh"
#include "registers.cuh"
#include "stats.cuh"

// All roles side by side, each with the registers that it needs. All threads are synchronised at the end. Only then
// does every warp go back to the registers of the launch: earlier, a dispatch warp that is done could take what a late
// math warp still has to get, and both would wait for ever.
template <bool kFast>
__device__ __forceinline__ void run_roles(const layout::Rank& rank, SharedStorage& storage) {
    const bool is_math = threadIdx.x >= 128;
    if (is_math) {
        ptx::more_registers<registers::kMath>();
        math::math_role<kFast>(rank, storage);
    } else {
        ptx::fewer_registers<registers::kOthers>();
        const u32 warp_idx = threadIdx.x / 32;
        if (warp_idx == 0) {
            if (ptx::elect_one()) producer::producer_role(rank, storage);
        } else if (warp_idx <= kNumDispatchWarps) {
            dispatch::pull(rank, storage.plan, storage.expert_of_entry, storage.staging[warp_idx - 1], warp_idx - 1,
                           kNumDispatchWarps);
        } else if (threadIdx.x == 96) {
            producer::scout_role(rank, storage);
        }
    }
    __syncwarp();  // the other lanes of the producer's and the scout's warps have waited here
    __syncthreads();
    if (is_math) ptx::fewer_registers<registers::kAtLaunch>();
    else ptx::more_registers<registers::kAtLaunch>();
}

// Sets the counters of the pool blocks to zero for the next launch. All thread blocks of the rank have passed a barrier
// since these counters were last read.
__device__ __forceinline__ void clear_counters(const layout::Rank& rank) {
    const u32 first = rank.cta_idx * blockDim.x + threadIdx.x, step = rank.num_ctas * blockDim.x;
    for (u32 i = first; i < 3 * rank.params.shape.num_pool_blocks; i += step) rank.rows_arrived_ptr()[i] = 0;
    if (first == 0) rank.workspace().num_tasks_taken = 0;
}

template <bool kFast>
__device__ __forceinline__ void moe(const Params& params) {
    DYNAMIC_SHARED_MEMORY(shared);
    auto& storage = *reinterpret_cast<SharedStorage*>(shared);
    const layout::Rank rank(params);
    if (threadIdx.x == 0) {
        storage.init_mbarriers();
        ptx::prefetch_tensor_map(rank.own.l1_acts_map), ptx::prefetch_tensor_map(rank.own.l2_acts_map);
    }

    phase::mark(params, phase::kPhases);
    if (dispatch::counts_locally(rank)) {
        if (!dispatch::count_locally(rank, storage.expert_of_entry, storage.plan.num_rows)) return;
    } else {
        if (!dispatch::announce(rank, storage.plan.num_rows)) return;
        if (!barrier::sync_ranks(rank, [&] { dispatch::publish(rank); })) return;
        scheduler::receive(rank, storage.plan);
    }
    scheduler::make_plan(rank, storage.plan);
    stats::accumulate(rank, storage.plan);
    phase::mark(params, phase::kPrologue);

    run_roles<kFast>(rank, storage);

    phase::mark(params, phase::kWait);
    combine::Units units(rank);
    if (!(params.shape.num_ranks == 1 ? barrier::sync_ctas(rank) : barrier::sync_ranks(rank, [] {}))) return;
    phase::mark(params, phase::kMeet);
    combine::combine(rank, units);
    phase::mark(params, phase::kCombine);
    clear_counters(rank);
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) moe_fast(const __grid_constant__ Params params) {
    moe<true>(params);
}
extern "C" __global__ void __launch_bounds__(kNumThreads, 1) moe_precise(const __grid_constant__ Params params) {
    moe<false>(params);
}
