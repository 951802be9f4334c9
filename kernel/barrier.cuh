// Waiting for others: barriers of thread blocks and of ranks, counters, mbarriers. Every wait has a time limit: a role
// that waits in vain writes to the status what it waited for, and all roles drain and exit. No launch hangs, and the
// CUDA context survives. Every role runs these functions. Predicted by reference/barrier.py, which has no time limits.
#pragma once
#include "layout.cuh"

namespace barrier {

// What a role waited for in vain, as the status names it. The host has a sentence for each.
enum Counter : u32 {
    kCtasOfRank = 1,
    kRanks = 2,
    kRowsArrived = 3,
    kGemm1Done = 4,
    kGemm2Done = 5,
    kRowCopy = 6,
    kTasksFinished = 7
};

__device__ __forceinline__ bool has_failed(const Params& params) {
    return ptx::load_relaxed(&params.barrier.status_ptr->flag) != 0;
}

// Writes the status, unless another role has given up before.
__device__ __noinline__ void give_up(Status* status, u32 rank_idx, u32 cta_idx, Counter counter, u32 expected,
                                     u32 seen) {
    if (ptx::atomic_cas(&status->flag, 0, 1) != 0) return;
    status->rank_idx = rank_idx, status->cta_idx = cta_idx, status->counter = counter;
    status->expected = expected, status->seen = seen;
}

struct Nothing {
    __device__ __forceinline__ void operator()() const {}
};

// Reads a counter with acquire at system scope until is_done(value), and calls meanwhile() between two reads. Returns
// false if time is up here, which blame(value) then writes down, or if another role has given up. The status lies in
// global memory, so it is only read once in 64 rounds.
template <typename IsDone, typename Blame, typename Meanwhile = Nothing>
__device__ __forceinline__ bool spin(const layout::Rank& rank, const u32* counter_ptr, IsDone is_done, Blame blame,
                                     Meanwhile meanwhile = {}) {
    if (is_done(ptx::load_acquire(counter_ptr))) return true;
    const u64 start_ns = ptx::global_timer();
    for (u32 i = 1;; ++i) {
        meanwhile();
        const u32 seen = ptx::load_acquire(counter_ptr);
        if (is_done(seen)) return true;
        if (i % 64 == 0) {
            if (has_failed(rank.params)) return false;
            if (ptx::global_timer() - start_ns > rank.params.barrier.timeout_ns) return blame(seen), false;
        }
    }
}

// Waits until a counter that only grows has reached `expected`. Returns false as spin does.
template <typename Meanwhile = Nothing>
__device__ __forceinline__ bool reach(const layout::Rank& rank, const u32* counter_ptr, Counter counter, u32 expected,
                                      Meanwhile meanwhile = {}) {
    return spin(
        rank, counter_ptr, [&](u32 seen) { return seen >= expected; },
        [&](u32 seen) { give_up(rank.params.barrier.status_ptr, rank.idx, rank.cta_idx, counter, expected, seen); },
        meanwhile);
}

// How many thread blocks have arrived at the barrier under way, by its word `arrived`. The upper bit belongs to
// sync_ctas: there thread block 0 adds what the arrivals of the others lack of 2^31, so that all together flip the bit
// and leave 0 below it.
constexpr u32 kFlip = 1u << 31;
__device__ __forceinline__ u32 num_arrivals(u32 arrived, u32 num_ctas) {
    const u32 low = arrived & (kFlip - 1);
    return low <= num_ctas ? low : low - (kFlip - num_ctas);
}

// The barrier of all threads of all ranks. What any of them wrote before it, to peers too, is visible to all of them
// after it. The thread block of a rank that arrives last runs publish() with all its threads, then announces its rank
// to the others. Returns false if the launch has failed.
template <typename Publish>
__device__ __forceinline__ bool sync_ranks(const layout::Rank& rank, Publish publish) {
    u32& is_last = ptx::shared_word<struct IsLast>();
    u32& is_passed = ptx::shared_word<struct IsPassed>();
    Workspace& workspace = rank.workspace();
    const u32 num_ranks = rank.params.shape.num_ranks;
    u32 expected = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        expected = num_ranks * (ptx::load_relaxed(&workspace.rank_epoch) + 1);  // before the last arrival
        if (num_ranks > 1) ptx::fence_system();  // what this thread block wrote to peers is ordered before its arrival
        is_last = (ptx::atomic_add_acq_rel(&workspace.arrived, 1) & ~kFlip) == rank.num_ctas - 1;
    }
    __syncthreads();
    if (is_last) {
        publish();
        __syncthreads();
        if (threadIdx.x == 0) {
            workspace.arrived = 0, workspace.rank_epoch += 1;
            if (num_ranks == 1) {
                ptx::reduce_add_release(rank.own_ptr<u32>(rank.params.layout.offset.rank_counter), 1);
            } else {
                ptx::fence_system();
                for (u32 peer_idx = 0; peer_idx < num_ranks; ++peer_idx) {
                    u32* counter_ptr = rank.peer_ptr<u32>(peer_idx, rank.params.layout.offset.rank_counter);
                    ptx::reduce_add_release_system(counter_ptr, 1);
                }
            }
        }
    }
    if (threadIdx.x == 0) {
        const auto blame = [&](u32 seen) {  // names a thread block of this rank, if one is missing
            const u32 arrivals = num_arrivals(ptx::load_acquire(&workspace.arrived), rank.num_ctas);
            const bool all_are_here = arrivals % rank.num_ctas == 0;
            if (all_are_here) give_up(rank.params.barrier.status_ptr, rank.idx, rank.cta_idx, kRanks, expected, seen);
            else give_up(rank.params.barrier.status_ptr, rank.idx, rank.cta_idx, kCtasOfRank, rank.num_ctas, arrivals);
        };
        is_passed = spin(
                        rank, rank.own_ptr<u32>(rank.params.layout.offset.rank_counter),
                        [&](u32 seen) { return static_cast<int>(seen - expected) >= 0; }, blame) &&
                    !has_failed(rank.params);
    }
    __syncthreads();
    return is_passed != 0;
}

// The barrier of all threads of the only rank. It has nothing to publish, so no thread block has to find out that it is
// the last one: a step less than sync_ranks. Returns false if the launch has failed.
__device__ __forceinline__ bool sync_ctas(const layout::Rank& rank) {
    u32& is_passed = ptx::shared_word<struct IsPassed>();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* arrived_ptr = &rank.workspace().arrived;
        const u32 before = ptx::atomic_add_acq_rel(arrived_ptr, rank.cta_idx == 0 ? kFlip - (rank.num_ctas - 1) : 1);
        const auto blame = [&](u32 seen) {
            give_up(rank.params.barrier.status_ptr, rank.idx, rank.cta_idx, kCtasOfRank, rank.num_ctas,
                    num_arrivals(seen, rank.num_ctas));
        };
        is_passed = spin(
                        rank, arrived_ptr, [&](u32 seen) { return ((seen ^ before) & kFlip) != 0; }, blame) &&
                    !has_failed(rank.params);
    }
    __syncthreads();
    return is_passed != 0;
}

// Waits for an mbarrier of the thread block; calls meanwhile() between two looks and seldom() between a thousand.
// Returns false if the launch has failed; but copies under way are given 10 ms to land first, so that all warps of the
// thread block come to the same answer. A warpgroup cannot multiply with a warp missing.
template <typename Meanwhile = Nothing, typename Seldom = Nothing>
__device__ __forceinline__ bool wait_mbarrier(const layout::Rank& rank, u64* mbarrier, u32 parity,
                                              Meanwhile meanwhile = {}, Seldom seldom = {}) {
    constexpr u64 kLandingNs = 10'000'000;
    u64 failed_at_ns = 0;
    for (u32 i = 1; !ptx::mbarrier_try_wait(mbarrier, parity); ++i) {
        meanwhile();
        if (i % 1024 != 0) continue;
        seldom();
        if (!has_failed(rank.params)) continue;
        if (failed_at_ns == 0) failed_at_ns = ptx::global_timer();
        else if (ptx::global_timer() - failed_at_ns > kLandingNs) return false;
    }
    return true;
}

// wait_mbarrier with a time limit, for the scout: a task that never finishes, whichever role of the thread block it
// hangs in, ends here. `task_idx` counts the tasks of this thread block. Returns false if the launch has failed.
template <typename Meanwhile>
__device__ __forceinline__ bool wait_in_time(const layout::Rank& rank, u64* mbarrier, u32 parity, u32 task_idx,
                                             Meanwhile meanwhile) {
    u64 start_ns = 0;
    return wait_mbarrier(rank, mbarrier, parity, meanwhile, [&] {
        const u64 now_ns = ptx::global_timer();
        if (start_ns == 0) start_ns = now_ns;
        if (now_ns - start_ns > rank.params.barrier.timeout_ns)
            give_up(rank.params.barrier.status_ptr, rank.idx, rank.cta_idx, kTasksFinished, task_idx + 1, task_idx);
    });
}

// Waits for a copy that this thread has started. It does not return before the copy has landed or time is up, since a
// copy must not be left behind. Returns false if time is up. The limit is counted in steps of 2^20 ns, about a
// millisecond, and rounded up, because the dispatch role has no register to spare for 64-bit times.
__device__ __forceinline__ bool wait_copy(const layout::Rank& rank, u64* mbarrier, u32 parity) {
    constexpr u32 kStep = 20;
    if (ptx::mbarrier_try_wait(mbarrier, parity)) return true;
    const u32 start = static_cast<u32>(ptx::global_timer() >> kStep);
    while (!ptx::mbarrier_try_wait(mbarrier, parity)) {
        const u32 waited = static_cast<u32>(ptx::global_timer() >> kStep) - start;
        if (waited > static_cast<u32>(rank.params.barrier.timeout_ns >> kStep) + 1) {
            give_up(rank.params.barrier.status_ptr, rank.idx, rank.cta_idx, kRowCopy, 1, 0);
            return false;
        }
    }
    return true;
}

}  // namespace barrier
