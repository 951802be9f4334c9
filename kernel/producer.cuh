// What keeps the math warpgroups fed: the scout finds tasks and waits for their operands, the producer loads them.
#pragma once
#include "phase.cuh"
#include "storage.cuh"

namespace producer {

using barrier::wait_stage;
using gemm::kBlockM;
using scheduler::kBoxRows;

// Until a task's operands are there. GEMM 1: the rows of its pool block have arrived, and where their activations will stand
// GEMM 2 has read the block before. GEMM 2: GEMM 1 has written all columns of the block.
template <typename Meanwhile>
__device__ __forceinline__ bool wait_operands(const layout::Rank& r, const scheduler::Task& task, Meanwhile meanwhile) {
    const auto reaches = [&](const u32* counter, barrier::Counter kind, u32 expected) {
        return barrier::reach(r, counter, kind, expected, meanwhile);
    };
    const u32 ring = r.p.shape.ring_blocks;
    bool ready;
    if (task.l2) {
        ready = reaches(r.block_l1_turns() + task.block, barrier::kBlockL1Turns, scheduler::l1_turns(r.p.shape));
    } else {
        ready = reaches(r.block_rows() + task.block, barrier::kBlockRows, task.rows);
        if (ready && task.block >= ring)
            ready = reaches(r.block_l2_turns() + task.block - ring, barrier::kBlockL2Turns, scheduler::l2_turns(r.p.shape));
    }
    ptx::fence_proxy_async_all();
    return ready;
}

// What the math warpgroups have finished, task by task, is told to the blocks that wait for it: here, since a release takes
// microseconds, in which nothing would be multiplied.
struct Reporter {
    const layout::Rank& r;
    SharedStorage& s;
    bool recycled;  // blocks take the place of others in the ring
    u32 reported = 0;

    __device__ __forceinline__ Reporter(const layout::Rank& rank, SharedStorage& storage)
        : r(rank), s(storage), recycled(s.plan.first_block[r.p.shape.experts_local] > r.p.shape.ring_blocks) {}

    __device__ __forceinline__ u64* finished() const { return &s.finished[reported % kTasks]; }
    __device__ __forceinline__ u32 parity() const { return reported / kTasks & 1; }

    __device__ __forceinline__ void report() {
        const scheduler::Task& task = s.tasks[reported++ % kTasks];
        if (task.l2 && !recycled) return;
        u32* turns = task.l2 ? r.block_l2_turns() : r.block_l1_turns();
        ptx::reduce_add_release(turns + task.block, task.columns / scheduler::kTurnN);
    }

    __device__ __forceinline__ void operator()() {
        if (ptx::mbarrier_test_wait(finished(), parity())) report();
    }

    // All tasks before number `end`. False: the launch has failed.
    __device__ __forceinline__ bool catch_up(u32 end) {
        while (static_cast<int>(end - reported) > 0) {
            if (!barrier::wait_in_time(r, finished(), parity(), reported, [] {})) return false;
            report();
        }
        return true;
    }
};

// Finds the block's tasks and waits for their operands, one task ahead of the producer: looking up, asking and ordering take
// microseconds, in which no load would start. Meanwhile it reports what is finished.
__device__ __forceinline__ void scout_role(const layout::Rank& r, SharedStorage& s) {
    Reporter reporter(r, s);
    const auto meanwhile = [&] { reporter(); };
    u32 tile = r.block;
    for (u32 i = 0;; ++i) {
        if (!reporter.catch_up(i + 1 - min(i + 1, kTasks))) return;
        scheduler::Task& task = s.tasks[i % kTasks];
        scheduler::task_of(r, s.plan, tile, task);
        ptx::mbarrier_arrive(&s.handover.known);
        if (task.rows == 0) return static_cast<void>(reporter.catch_up(i));
        if (!wait_operands(r, task, meanwhile)) return;
        ptx::mbarrier_arrive(&s.handover.ready);
        if (!barrier::wait_in_time(r, &s.handover.wanted, i & 1, i, meanwhile)) return;
        tile = scheduler::next_tile(r);
    }
}

constexpr u32 kWantedBefore = 6;  // stages before a task's end where the next one is asked for: the last tasks are shared out

// Loads the stages of one task. Where its activations are not there yet, still on their way or being computed, the weights
// of as many stages as the ring has go first: they wait for nobody. To send further ones to L2 costs time.
template <bool kL1>
__device__ __forceinline__ bool produce(const layout::Rank& r, SharedStorage& s, gemm::Place& place, const scheduler::Task& task,
                                        u32 parity) {
    gemm::Ring& ring = s.ring;
    constexpr u32 kGroups = gemm::kBlockK / kGroup<kL1>;
    const Shape& shape = r.p.shape;
    const u32 blocks = (task.l2 ? shape.intermediate : shape.hidden) / gemm::kBlockK;
    const u32 n = task.l2 ? shape.hidden : 2 * shape.intermediate;
    const ptx::TensorMap& a = task.l2 ? r.own.l2_acts : r.own.l1_acts;
    const u8* b = task.l2 ? r.own.w2 : r.own.w1;
    const u32 a_row = static_cast<u32>(r.ring_row(task.block, 0));
    const float* a_sf = r.mine<float>(task.l2 ? r.p.layout.l2_acts_sf : r.p.layout.l1_acts_sf) + a_row;
    const u32 rows = (task.rows + kBoxRows - 1) / kBoxRows * kBoxRows;
    const u32 bytes = (rows + task.columns) * gemm::kBlockK + kGroups * kBlockM * 4;

    const bool once = scheduler::weights_once(shape, s.plan.first_block[shape.experts_local]);
    const auto load_weights = [&](u32 i, const gemm::Place& at) {
        if (!wait_stage(r, &ring.empty[at.index], at.parity ^ 1)) return false;
        ptx::mbarrier_arrive_expect(&ring.full[at.index], bytes);
        const u8* tile = r.half_tile(b, task.expert, n, task.first_column, i, blocks);
        const u32 size = task.columns * gemm::kBlockK;
        if (once) ptx::bulk_load_once(ring.stages[at.index].b, tile, size, &ring.full[at.index]);
        else ptx::bulk_load(ring.stages[at.index].b, tile, size, &ring.full[at.index]);
        return true;
    };
    u32 ahead = 0;
    if (!ptx::mbarrier_test_wait(&s.handover.ready, parity)) {
        gemm::Place first = place;
        for (; ahead < min(blocks, gemm::kStages); ++ahead, first.advance())
            if (!load_weights(ahead, first)) return false;
        phase::mark(r.p, phase::kLoad);
        if (!wait_stage(r, &s.handover.ready, parity)) return false;
        phase::mark(r.p, phase::kOperands);
    }
    const u32 want = blocks - min(blocks, kWantedBefore);
    for (u32 i = 0; i < blocks; ++i, place.advance()) {
        if (i == want) ptx::mbarrier_arrive(&s.handover.wanted);
        if (i >= ahead && !load_weights(i, place)) return false;
        gemm::Stage& stage = ring.stages[place.index];
        u64* full = &ring.full[place.index];
        for (u32 row = 0; row < rows; row += kBoxRows)
            ptx::tma_load_2d(stage.a[row], a, full, i * gemm::kBlockK, a_row + row);
        for (u32 g = 0; g < kGroups; ++g)
            ptx::bulk_load(stage.a_sf[g], a_sf + static_cast<u64>(i * kGroups + g) * shape.ring_rows, kBlockM * 4, full);
    }
    return true;
}

__device__ __forceinline__ void producer_role(const layout::Rank& r, SharedStorage& s) {
    gemm::Place place;
    for (u32 i = 0;; ++i) {
        if (!wait_stage(r, &s.handover.known, i & 1)) return;
        const scheduler::Task task = s.tasks[i % kTasks];
        if (task.rows == 0) break;
        if (!(task.l2 ? produce<false>(r, s, place, task, i & 1) : produce<true>(r, s, place, task, i & 1))) return;
    }
    // A stage without operands, so that the math warpgroups see the end.
    if (wait_stage(r, &s.ring.empty[place.index], place.parity ^ 1)) ptx::mbarrier_arrive(&s.ring.full[place.index]);
}

}  // namespace producer
