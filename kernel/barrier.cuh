// Waiting for others: every spin has a time limit, and leaves who waited for what in the status word instead of hanging.
#pragma once
#include "layout.cuh"

namespace barrier {

enum Counter : u32 { kBlocks = 1, kRanks = 2, kBlockRows = 3, kBlockL1Turns = 4, kBlockL2Turns = 5, kTransit = 6, kFinished = 7 };

__device__ __forceinline__ bool failed(const Params& p) { return ptx::load_relaxed(&p.status->flag) != 0; }

// The first to give up writes the status; then everyone drains.
__device__ __noinline__ void give_up(Status* s, u32 rank, u32 block, Counter counter, u32 expected, u32 seen) {
    if (ptx::atomic_cas(&s->flag, 0, 1) != 0) return;
    s->rank = rank, s->block = block, s->counter = counter, s->expected = expected, s->seen = seen;
}

struct Nothing {
    __device__ __forceinline__ void operator()() const {}
};

// Spins until done(value of *address) with acquire at system scope, and does something else between two looks. False: time is
// up, here, which blame(value) writes down, or elsewhere.
template <typename Done, typename Blame, typename Meanwhile = Nothing>
__device__ __forceinline__ bool spin(const layout::Rank& r, const u32* address, Done done, Blame blame, Meanwhile meanwhile = {}) {
    if (done(ptx::load_acquire(address))) return true;
    const u64 start = ptx::global_timer();
    for (u32 i = 1;; ++i) {
        meanwhile();
        const u32 seen = ptx::load_acquire(address);
        if (done(seen)) return true;
        if (i % 64 == 0) {
            if (failed(r.p)) return false;
            if (ptx::global_timer() - start > r.p.timeout_ns) return blame(seen), false;
        }
    }
}

// Until a counter that only grows has come to `expected`.
template <typename Meanwhile = Nothing>
__device__ __forceinline__ bool reach(const layout::Rank& r, const u32* address, Counter counter, u32 expected,
                                      Meanwhile meanwhile = {}) {
    return spin(r, address, [&](u32 seen) { return seen >= expected; },
                [&](u32 seen) { give_up(r.p.status, r.rank, r.block, counter, expected, seen); }, meanwhile);
}

// `arrived` of a meeting under way: arrivals below the upper bit, which meet_alone flips. There block 0 adds what the others
// lack of 2^31, so that all together flip the bit and leave 0 below it.
constexpr u32 kFlip = 1u << 31;
__device__ __forceinline__ u32 arrivals(u32 arrived, u32 blocks) {
    const u32 low = arrived & (kFlip - 1);
    return low <= blocks ? low : low - (kFlip - blocks);
}

// All threads of all blocks of all ranks; what any of them wrote before, also to peers, is visible to everyone after. False:
// give up. The block of a rank that arrives last runs `publish` with all its threads, then speaks for its rank.
template <typename Publish>
__device__ __forceinline__ bool meet(const layout::Rank& r, Publish publish) {
    __shared__ u32 is_last, ok;
    Workspace& w = r.workspace();
    const u32 ranks = r.p.shape.ranks;
    u32 expected = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        expected = ranks * (ptx::load_relaxed(&w.rank_epoch) + 1);  // before the last one arrives and moves it on
        if (ranks > 1) ptx::fence_system();  // what the block wrote to peers before __syncthreads goes first
        is_last = (ptx::atomic_add_acq_rel(&w.arrived, 1) & ~kFlip) == r.blocks - 1;
    }
    __syncthreads();
    if (is_last) {
        publish();
        __syncthreads();
        if (threadIdx.x == 0) {
            w.arrived = 0, w.rank_epoch += 1;
            if (ranks == 1) {
                ptx::reduce_add_release(r.mine<u32>(r.p.layout.rank_counter), 1);
            } else {
                ptx::fence_system();
                for (u32 peer = 0; peer < ranks; ++peer)
                    ptx::reduce_add_release_system(r.at<u32>(peer, r.p.layout.rank_counter), 1);
            }
        }
    }
    if (threadIdx.x == 0) {
        const auto blame = [&](u32 seen) {  // a block of this rank, if one is missing
            const u32 blocks = arrivals(ptx::load_acquire(&w.arrived), r.blocks);
            if (blocks % r.blocks == 0) give_up(r.p.status, r.rank, r.block, kRanks, expected, seen);
            else give_up(r.p.status, r.rank, r.block, kBlocks, r.blocks, blocks);
        };
        ok = spin(r, r.mine<u32>(r.p.layout.rank_counter),
                  [&](u32 seen) { return static_cast<int>(seen - expected) >= 0; }, blame) &&
             !failed(r.p);
    }
    __syncthreads();
    return ok != 0;
}

// The same for a rank that is alone and has nothing to publish: no block has to see that it is the last.
__device__ __forceinline__ bool meet_alone(const layout::Rank& r) {
    __shared__ u32 ok;
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* arrived = &r.workspace().arrived;
        const u32 before = ptx::atomic_add_acq_rel(arrived, r.block == 0 ? kFlip - (r.blocks - 1) : 1);
        ok = spin(r, arrived, [&](u32 seen) { return ((seen ^ before) & kFlip) != 0; },
                  [&](u32 seen) { give_up(r.p.status, r.rank, r.block, kBlocks, r.blocks, arrivals(seen, r.blocks)); }) &&
             !failed(r.p);
    }
    __syncthreads();
    return ok != 0;
}

// Waits for a stage or another mbarrier of the block; gives up where the launch has failed. Copies under way are given time to
// land first, so that all warps of the block take the same way: a warpgroup cannot multiply with a warp missing.
// `meanwhile` is done between two looks, `seldom` between a thousand.
template <typename Meanwhile = Nothing, typename Seldom = Nothing>
__device__ __forceinline__ bool wait_stage(const layout::Rank& r, u64* full_or_empty, u32 parity, Meanwhile meanwhile = {},
                                           Seldom seldom = {}) {
    constexpr u64 kLandingNs = 10'000'000;
    u64 failed_at = 0;
    for (u32 i = 1; !ptx::mbarrier_try_wait(full_or_empty, parity); ++i) {
        meanwhile();
        if (i % 1024 != 0) continue;
        seldom();
        if (!failed(r.p)) continue;
        if (failed_at == 0) failed_at = ptx::global_timer();
        else if (ptx::global_timer() - failed_at > kLandingNs) return false;
    }
    return true;
}

// The same with a time limit, for the scout: its tasks do not end where any other role of the block waits in vain.
template <typename Meanwhile>
__device__ __forceinline__ bool wait_in_time(const layout::Rank& r, u64* mbarrier, u32 parity, u32 task, Meanwhile meanwhile) {
    u64 start = 0;
    return wait_stage(r, mbarrier, parity, meanwhile, [&] {
        const u64 now = ptx::global_timer();
        if (start == 0) start = now;
        if (now - start > r.p.timeout_ns) give_up(r.p.status, r.rank, r.block, kFinished, task + 1, task);
    });
}

// Waits for a copy that this thread has started, and does not leave it behind before time is up. The limit is counted in steps of
// 2^20 ns, about a millisecond, and rounded up: dispatch has few registers.
__device__ __forceinline__ bool wait_copy(const layout::Rank& r, u64* arrived, u32 parity) {
    constexpr u32 kStep = 20;
    if (ptx::mbarrier_try_wait(arrived, parity)) return true;
    const u32 start = static_cast<u32>(ptx::global_timer() >> kStep);
    while (!ptx::mbarrier_try_wait(arrived, parity)) {
        const u32 waited = static_cast<u32>(ptx::global_timer() >> kStep) - start;
        if (waited > static_cast<u32>(r.p.timeout_ns >> kStep) + 1) return give_up(r.p.status, r.rank, r.block, kTransit, 1, 0), false;
    }
    return true;
}

}  // namespace barrier
