// Shared memory of a thread block: the pipeline that both GEMMs use in turn, the plan of the rank, the tasks under way,
// and the staging buffers of dispatch.
#pragma once
#include "dispatch.cuh"

// Threads of a block: four warps for dispatch, producer and scout, then the math warps.
constexpr u32 kNumDispatchWarps = NUM_DISPATCH_WARPS, kNumThreads = 128 + 32 * gemm::kNumMathWarps;

// Columns of K in a scale block of the activations. GEMM 1 reads one scale for 128 columns of a token, as callers make
// them.
template <bool kIsGemm1>
constexpr u32 kScaleK = kIsGemm1 ? 128 : kGranularity;

// Most tasks under way in a thread block. The producer is at most kNumStages tasks ahead of the math warpgroups, since
// a task has at least one stage, and the scout is one task ahead of the producer.
constexpr u32 kNumTasks = NUM_TASKS;
static_assert(kNumTasks > gemm::kNumStages + 2);

// How scout, producer and math warps hand over tasks. Task number i of the thread block is in tasks[i mod kNumTasks].
// The mbarriers complete one phase for each task; of those in `finished`, each one phase for every kNumTasks tasks.
struct TaskQueue {
    scheduler::Task tasks[kNumTasks];
    u64 wanted;               // the producer asks for another task
    u64 known;                // the scout has written the task
    u64 ready;                // the task's operands are there
    u64 finished[kNumTasks];  // all math warps have written their part of the task

    __device__ __forceinline__ void init() {
        ptx::mbarrier_init(&wanted, 1), ptx::mbarrier_init(&known, 1), ptx::mbarrier_init(&ready, 1);
        for (u64& mbarrier : finished) ptx::mbarrier_init(&mbarrier, gemm::kNumMathWarps);
    }
};

struct SharedStorage {
    // Operands of the GEMMs: filled by the producer, read by the math warpgroups.
    gemm::Pipeline pipeline;
    // Where each expert's rows are in the pool: made by all threads, read by dispatch warps and scout.
    scheduler::Plan plan;
    // The expert of each entry, where thread blocks count for themselves: made by all threads, read by the dispatch
    // warps.
    u16 expert_of_entry[dispatch::kFewSlots];
    // Tiles to compute: from the scout to producer and math warpgroups, and back.
    TaskQueue queue;
    // Rows on their way from a peer into the pool, for each dispatch warp.
    dispatch::StagingBuffer staging[kNumDispatchWarps];

    // One thread calls it, before all threads are synchronised.
    __device__ __forceinline__ void init_mbarriers() {
        pipeline.init();
        queue.init();
        for (dispatch::StagingBuffer& buffer : staging) ptx::mbarrier_init(&buffer.arrived, 1);
        ptx::fence_mbarrier_init();
    }
};
static_assert(sizeof(SharedStorage) == SHARED_BYTES);
