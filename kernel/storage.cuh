// Shared memory of a block: a ring of stages that both GEMMs use in turn, its barriers, the plan of the rank, and where
// its rows pass through.
#pragma once
#include "dispatch.cuh"
#include "gemm.cuh"

constexpr u32 kStages = STAGES, kMathWarps = 8, kDispatchWarps = 3;
constexpr u32 kThreads = 128 + 32 * kMathWarps;

struct SharedStorage {
    // GEMM 2's stage is the larger one (two rows of scales); GEMM 1 uses the same ring.
    gemm::Stage<scheduler::kBlockM, scheduler::kBlockN, 64> stages[kStages];
    u64 full[kStages], empty[kStages];
    scheduler::Plan plan;
    dispatch::Transit transit[kDispatchWarps];
};

static_assert(sizeof(SharedStorage) == SHARED_BYTES);
static_assert(sizeof(Params) == PARAMS_BYTES);
