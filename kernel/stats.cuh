// Eq. (9): how many (rank, token, slot) each local expert received; accumulated over launches.
#pragma once
#include "scheduler.cuh"

namespace stats {

__device__ __forceinline__ void accumulate(const layout::Rank& r, const scheduler::Plan& plan) {
    if (r.block != 0 || r.own.stats == nullptr) return;
    for (u32 e = threadIdx.x; e < r.p.shape.experts_local; e += blockDim.x) r.own.stats[e] += static_cast<int>(plan.rows[e]);
}

}  // namespace stats
