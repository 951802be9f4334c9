// Two roles that keep the math warpgroups fed: the scout finds tasks and waits for their operands, the producer loads
// the operands. Each is one lane of a warp. Inputs: the plan, the counters of pool blocks, activations and weights.
// Outputs: tasks and stages in shared memory; from the scout also the counters of finished half tiles.
#pragma once
#include "phase.cuh"
#include "storage.cuh"

namespace producer {

using barrier::wait_mbarrier;
using gemm::kBlockM;
using scheduler::kBoxRows;

// Waits until a task's operands are there. Before GEMM 1 the rows of its pool block must have arrived, and GEMM 2 must
// have read the pool block whose place in the ring its outputs take. Before GEMM 2, GEMM 1 must have written all
// columns of the pool block. Returns false if the launch has failed.
template <typename Meanwhile>
__device__ __forceinline__ bool wait_operands(const layout::Rank& rank, const scheduler::Task& task,
                                              Meanwhile meanwhile) {
    const Shape& shape = rank.params.shape;
    const auto reach = [&](const u32* counter_ptr, barrier::Counter counter, u32 expected) {
        return barrier::reach(rank, counter_ptr, counter, expected, meanwhile);
    };
    const u32 num_ring_blocks = shape.num_ring_blocks;
    bool is_ready;
    if (task.is_gemm2) {
        is_ready = reach(rank.gemm1_done_ptr() + task.pool_block_idx, barrier::kGemm1Done,
                         scheduler::num_gemm1_half_tiles(shape));
    } else {
        is_ready = reach(rank.rows_arrived_ptr() + task.pool_block_idx, barrier::kRowsArrived, task.num_rows);
        if (is_ready && task.pool_block_idx >= num_ring_blocks)
            is_ready = reach(rank.gemm2_done_ptr() + task.pool_block_idx - num_ring_blocks, barrier::kGemm2Done,
                             scheduler::num_gemm2_half_tiles(shape));
    }
    ptx::fence_proxy_async_all();
    return is_ready;
}

// Tells the other thread blocks what the math warpgroups of this one have finished, task by task. The scout does this,
// because a release takes microseconds, in which a math warp would not multiply.
struct Reporter {
    const layout::Rank& rank;
    SharedStorage& storage;
    bool is_ring_recycled;  // there are more pool blocks than the ring holds, so that places are used again
    u32 num_reported = 0;

    __device__ __forceinline__ Reporter(const layout::Rank& r, SharedStorage& s)
        : rank(r),
          storage(s),
          is_ring_recycled(storage.plan.first_block[rank.params.shape.num_local_experts] >
                           rank.params.shape.num_ring_blocks) {}

    __device__ __forceinline__ u64* finished() const { return &storage.queue.finished[num_reported % kNumTasks]; }
    __device__ __forceinline__ u32 parity() const { return num_reported / kNumTasks & 1; }

    __device__ __forceinline__ void report() {
        const scheduler::Task& task = storage.queue.tasks[num_reported++ % kNumTasks];
        if (task.is_gemm2 && !is_ring_recycled) return;  // no role waits for GEMM 2 then
        u32* done_ptr = task.is_gemm2 ? rank.gemm2_done_ptr() : rank.gemm1_done_ptr();
        ptx::reduce_add_release(done_ptr + task.pool_block_idx, task.num_columns / scheduler::kHalfN);
    }

    // Reports the next task if it is finished.
    __device__ __forceinline__ void operator()() {
        if (ptx::mbarrier_test_wait(finished(), parity())) report();
    }

    // Waits for all tasks before number `end` and reports them. Returns false if the launch has failed.
    __device__ __forceinline__ bool catch_up(u32 end) {
        while (static_cast<int>(end - num_reported) > 0) {
            if (!barrier::wait_in_time(rank, finished(), parity(), num_reported, [] {})) return false;
            report();
        }
        return true;
    }
};

// The scout role. It finds the thread block's tasks and waits for their operands, one task ahead of the producer:
// looking tasks up, polling counters and ordering memory take microseconds, in which the producer would start no load.
// Meanwhile it reports what is finished.
__device__ __forceinline__ void scout_role(const layout::Rank& rank, SharedStorage& storage) {
    TaskQueue& queue = storage.queue;
    Reporter reporter(rank, storage);
    const auto meanwhile = [&] { reporter(); };
    u32 task_idx = rank.cta_idx;                                        // among the tasks of the rank
    for (u32 i = 0;; ++i) {                                             // among the tasks of this thread block
        if (!reporter.catch_up(i + 1 - min(i + 1, kNumTasks))) return;  // the task that had this place before
        scheduler::Task& task = queue.tasks[i % kNumTasks];
        scheduler::task_of(rank, storage.plan, task_idx, task);
        ptx::mbarrier_arrive(&queue.known);
        if (task.num_rows == 0) return static_cast<void>(reporter.catch_up(i));
        if (!wait_operands(rank, task, meanwhile)) return;
        ptx::mbarrier_arrive(&queue.ready);
        if (!barrier::wait_in_time(rank, &queue.wanted, i & 1, i, meanwhile)) return;
        task_idx = scheduler::next_task_idx(rank);
    }
}

// How many K blocks before the end of a task the producer asks for the next one. Late enough that the last tasks are
// shared out evenly, early enough for the scout: with 2 it was up to 13 % slower, 10 and 12 gained nothing.
constexpr u32 kWantedBefore = 6;

// Loads all stages of one task. If its activations are not there yet, the weights of as many stages as the pipeline has
// go first, since nothing has to be waited for. Sending further weights to the L2 cache ahead was tried and cost time.
// Returns false if the launch has failed.
template <bool kIsGemm1>
__device__ __forceinline__ bool produce(const layout::Rank& rank, SharedStorage& storage, gemm::PipelineState& state,
                                        const scheduler::Task& task, u32 parity) {
    gemm::Pipeline& pipeline = storage.pipeline;
    TaskQueue& queue = storage.queue;
    constexpr u32 kNumScales = gemm::kBlockK / kScaleK<kIsGemm1>;
    const Shape& shape = rank.params.shape;
    const Offsets& offset = rank.params.layout.offset;
    const u32 num_k_blocks = (task.is_gemm2 ? shape.intermediate : shape.hidden) / gemm::kBlockK;
    const u32 num_weight_rows = task.is_gemm2 ? shape.hidden : 2 * shape.intermediate;
    const ptx::TensorMap& a_map = task.is_gemm2 ? rank.own.l2_acts_map : rank.own.l1_acts_map;
    const u8* b_ptr = task.is_gemm2 ? rank.own.weights.w2_ptr : rank.own.weights.w1_ptr;
    const u32 a_row = static_cast<u32>(rank.ring_row(task.pool_block_idx, 0));
    const float* a_sf_ptr = rank.own_ptr<float>(task.is_gemm2 ? offset.l2_acts_sf : offset.l1_acts_sf) + a_row;
    const u32 num_rows = (task.num_rows + kBoxRows - 1) / kBoxRows * kBoxRows;
    const u32 stage_bytes = (num_rows + task.num_columns) * gemm::kBlockK + kNumScales * kBlockM * 4;

    const bool evict_first = scheduler::evicts_weights_first(shape, storage.plan.first_block[shape.num_local_experts]);
    const auto load_weights = [&](u32 k_block_idx, const gemm::PipelineState& at) {
        if (!wait_mbarrier(rank, &pipeline.empty_barriers[at.stage_idx], at.parity ^ 1)) return false;
        ptx::mbarrier_arrive_expect(&pipeline.full_barriers[at.stage_idx], stage_bytes);
        const u8* tile_ptr =
            rank.half_tile_ptr(b_ptr, task.expert_idx, num_weight_rows, task.first_column, k_block_idx, num_k_blocks);
        const u32 tile_bytes = task.num_columns * gemm::kBlockK;
        gemm::Stage& stage = pipeline.stages[at.stage_idx];
        if (evict_first) ptx::bulk_load_once(stage.b, tile_ptr, tile_bytes, &pipeline.full_barriers[at.stage_idx]);
        else ptx::bulk_load(stage.b, tile_ptr, tile_bytes, &pipeline.full_barriers[at.stage_idx]);
        return true;
    };
    u32 num_ahead = 0;
    if (!ptx::mbarrier_test_wait(&queue.ready, parity)) {
        gemm::PipelineState ahead = state;
        for (; num_ahead < min(num_k_blocks, gemm::kNumStages); ++num_ahead, ahead.advance())
            if (!load_weights(num_ahead, ahead)) return false;
        phase::mark(rank.params, phase::kLoad);
        if (!wait_mbarrier(rank, &queue.ready, parity)) return false;
        phase::mark(rank.params, phase::kOperands);
    }
    const u32 wanted_at = num_k_blocks - min(num_k_blocks, kWantedBefore);
    for (u32 k_block_idx = 0; k_block_idx < num_k_blocks; ++k_block_idx, state.advance()) {
        if (k_block_idx == wanted_at) ptx::mbarrier_arrive(&queue.wanted);
        if (k_block_idx >= num_ahead && !load_weights(k_block_idx, state)) return false;
        gemm::Stage& stage = pipeline.stages[state.stage_idx];
        u64* full_barrier = &pipeline.full_barriers[state.stage_idx];
        for (u32 row = 0; row < num_rows; row += kBoxRows)
            ptx::tma_load_2d(stage.a[row], a_map, full_barrier, k_block_idx * gemm::kBlockK, a_row + row);
        for (u32 scale_idx = 0; scale_idx < kNumScales; ++scale_idx)
            ptx::bulk_load(stage.a_sf[scale_idx],
                           a_sf_ptr + static_cast<u64>(k_block_idx * kNumScales + scale_idx) * shape.num_ring_rows,
                           kBlockM * 4, full_barrier);
    }
    return true;
}

// The producer role.
__device__ __forceinline__ void producer_role(const layout::Rank& rank, SharedStorage& storage) {
    TaskQueue& queue = storage.queue;
    gemm::PipelineState state;
    for (u32 i = 0;; ++i) {
        if (!wait_mbarrier(rank, &queue.known, i & 1)) return;
        const scheduler::Task task = queue.tasks[i % kNumTasks];
        if (task.num_rows == 0) break;
        if (!(task.is_gemm2 ? produce<false>(rank, storage, state, task, i & 1)
                            : produce<true>(rank, storage, state, task, i & 1)))
            return;
    }
    // A last stage without operands lets the math warpgroups see that there is no task any more.
    gemm::Pipeline& pipeline = storage.pipeline;
    if (wait_mbarrier(rank, &pipeline.empty_barriers[state.stage_idx], state.parity ^ 1))
        ptx::mbarrier_arrive(&pipeline.full_barriers[state.stage_idx]);
}

}  // namespace producer
