// Shared memory of a block: the ring that both GEMMs use in turn, the plan of the rank, and where its rows pass through.
#pragma once
#include "dispatch.cuh"

constexpr u32 kDispatchWarps = 2, kThreads = 128 + 32 * gemm::kMathWarps;

template <bool kL1>
constexpr u32 kGroup = kL1 ? 128 : kGranularity;

// Tasks under way in a block, by their number. The producer is at most kStages tasks ahead of the math warpgroups, since a
// task has a stage at least, and the scout one ahead of the producer.
constexpr u32 kTasks = 8;
static_assert(kTasks > gemm::kStages + 2);

// Between scout and producer, one phase a task: the producer wants it; it is known; its operands are ready.
struct Handover {
    u64 wanted, known, ready;

    __device__ __forceinline__ void init() {
        ptx::mbarrier_init(&wanted, 1), ptx::mbarrier_init(&known, 1), ptx::mbarrier_init(&ready, 1);
    }
};

struct SharedStorage {
    gemm::Ring ring;
    scheduler::Plan plan;
    u16 expert_of_entry[dispatch::kFewSlots];  // of a rank alone
    scheduler::Task tasks[kTasks];
    Handover handover;
    u64 finished[kTasks];  // a phase of each for every kTasks tasks: all math warps have written what is theirs
    dispatch::Transit transit[kDispatchWarps];
};

static_assert(sizeof(SharedStorage) == SHARED_BYTES);
static_assert(sizeof(Params) == PARAMS_BYTES);
