// The fused layer: one persistent launch. Read top to bottom; the rooms do the work.
//
//   all threads      announce the routed rows and meet all ranks, or only count; plan  dispatch, barrier, scheduler, stats
//   warp 0           TMA producer: operands of each task into the ring                 producer
//   warps 1, 2       pull rows of peers into the pool                                  dispatch      Eq. (1)
//   warp 3           scout: the next task, when its operands are there, what is done   producer, scheduler
//   warps 4 - 11     two math warpgroups: GEMM 1, SwiGLU, cast; GEMM 2, scatter        math, gemm, swiglu, scatter  Eq. (2) - (7)
//   all threads      meet all ranks, sum the slots, clean the counters                 combine       Eq. (8)
#include "combine.cuh"
#include "math.cuh"
#include "producer.cuh"
#include "stats.cuh"

// The counters of the pool are zero again for the next launch; all blocks of the rank have met since they were last read.
__device__ __forceinline__ void clean(const layout::Rank& r) {
    const u32 first = r.block * blockDim.x + threadIdx.x, step = r.blocks * blockDim.x;
    for (u32 i = first; i < 3 * r.p.shape.pool_blocks; i += step) r.block_rows()[i] = 0;
    if (first == 0) r.workspace().tiles_taken = 0;
}

template <bool kFast>
__device__ __forceinline__ void moe(const Params& p) {
    extern __shared__ __align__(1024) u8 shared[];
    auto& s = *reinterpret_cast<SharedStorage*>(shared);
    const layout::Rank r(p);
    if (threadIdx.x == 0) {
        s.ring.init();
        s.handover.init();
        for (u64& finished : s.finished) ptx::mbarrier_init(&finished, gemm::kMathWarps);
        for (dispatch::Transit& transit : s.transit) ptx::mbarrier_init(&transit.arrived, 1);
        ptx::fence_mbarrier_init();
        ptx::prefetch_tensor_map(r.own.l1_acts), ptx::prefetch_tensor_map(r.own.l2_acts);
    }

    phase::mark(p, phase::kPhases);
    if (dispatch::counts_alone(r)) {
        if (!dispatch::count_alone(r, s.expert_of_entry, s.plan.rows)) return;
    } else {
        if (!dispatch::announce(r, s.plan.rows) || !barrier::meet(r, [&] { dispatch::publish(r); })) return;
        scheduler::receive(r, s.plan);
    }
    scheduler::make_plan(r, s.plan);
    stats::accumulate(r, s.plan);
    phase::mark(p, phase::kPrologue);

    // 56 + 2 x 224 = 3 x 168, what the block starts with: a sum above it would wait for ever. When all roles are done, all
    // have 168 again; before, a warp that is done early would take what a late math warp still has to get.
    const bool math = threadIdx.x >= 128;
    if (math) {
        ptx::more_registers<224>();
        math::math_role<kFast>(r, s);
    } else {
        ptx::fewer_registers<56>();
        const u32 warp = threadIdx.x / 32;
        if (warp == 0) {
            if (ptx::elect_one()) producer::producer_role(r, s);
        } else if (warp <= kDispatchWarps) {
            dispatch::pull(r, s.plan, s.expert_of_entry, s.transit[warp - 1], warp - 1, kDispatchWarps);
        } else if (threadIdx.x == 96) {
            producer::scout_role(r, s);
        }
    }
    __syncwarp();  // producer and scout are one lane of their warps
    __syncthreads();
    if (math) ptx::fewer_registers<168>();
    else ptx::more_registers<168>();

    phase::mark(p, phase::kWait);
    combine::Units units(r);
    if (!(p.shape.ranks == 1 ? barrier::meet_alone(r) : barrier::meet(r, [] {}))) return;
    phase::mark(p, phase::kMeet);
    combine::combine(r, units);
    phase::mark(p, phase::kCombine);
    clean(r);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) moe_fast(const __grid_constant__ Params p) { moe<true>(p); }
extern "C" __global__ void __launch_bounds__(kThreads, 1) moe_precise(const __grid_constant__ Params p) { moe<false>(p); }
