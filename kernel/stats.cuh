// Eq. (9): how many (rank, token, slot) each local expert has received, added to the caller's int32 counts. Thread
// block 0 of a rank does it. Input: num_rows of the plan. Predicted by reference/stats.py.
#pragma once
#include "scheduler.cuh"

namespace stats {

__device__ __forceinline__ void accumulate(const layout::Rank& rank, const scheduler::Plan& plan) {
    if (rank.cta_idx != 0 || rank.own.outputs.stats_ptr == nullptr) return;
    for (u32 expert_idx = threadIdx.x; expert_idx < rank.params.shape.num_local_experts; expert_idx += blockDim.x)
        rank.own.outputs.stats_ptr[expert_idx] += static_cast<int>(plan.num_rows[expert_idx]);
}

}  // namespace stats
