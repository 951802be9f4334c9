// Waiting for others: every spin has a time limit, and leaves who waited for what in the status word instead of hanging.
#pragma once
#include "layout.cuh"

namespace barrier {

enum Counter : u32 { kGeneration = 1, kRanks = 2, kBlockRows = 3, kBlockL1Turns = 4, kBlockL2Turns = 5 };

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
// up, here or elsewhere.
template <typename Done, typename Meanwhile = Nothing>
__device__ __forceinline__ bool spin(const layout::Rank& r, const u32* address, Counter counter, u32 expected, Done done,
                                     Meanwhile meanwhile = {}) {
    if (done(ptx::load_acquire(address))) return true;
    const u64 start = ptx::global_timer();
    for (u32 i = 1;; ++i) {
        meanwhile();
        const u32 seen = ptx::load_acquire(address);
        if (done(seen)) return true;
        if (i % 64 == 0) {
            if (failed(r.p)) return false;
            if (ptx::global_timer() - start > r.p.timeout_ns) return give_up(r.p.status, r.rank, r.block, counter, expected, seen), false;
        }
    }
}

// All threads of all blocks of a rank. What was written before is visible after. False: give up.
// `last` is called by every thread of the block that arrives last, before anyone leaves; it returns false to give up.
template <typename Last>
__device__ __forceinline__ bool meet_rank(const layout::Rank& r, Last last) {
    __shared__ u32 generation, is_last, ok;
    __syncthreads();
    if (threadIdx.x == 0) {
        Workspace& w = r.workspace();
        if (r.p.shape.ranks > 1) ptx::fence_system();  // what the block wrote to peers before __syncthreads goes first
        generation = ptx::load_relaxed(&w.generation);
        is_last = ptx::atomic_add_acq_rel(&w.arrived, 1) == r.blocks - 1;
        ok = 1;
    }
    __syncthreads();
    if (is_last) {
        const bool went = last();
        if (threadIdx.x == 0) {
            Workspace& w = r.workspace();
            w.arrived = 0;
            ok = went;
            ptx::store_release(&w.generation, generation + 1);
        }
    } else if (threadIdx.x == 0) {
        const u32 before = generation;
        ok = spin(r, &r.workspace().generation, kGeneration, before + 1, [&](u32 seen) { return seen != before; });
    }
    if (threadIdx.x == 0 && failed(r.p)) ok = 0;
    __syncthreads();
    return ok != 0;
}

// All ranks. The last block of a rank runs `publish` with all its threads, then speaks for its rank; what it and all
// blocks wrote, also to peers, is visible to everyone after.
template <typename Publish>
__device__ __forceinline__ bool meet(const layout::Rank& r, Publish publish) {
    return meet_rank(r, [&] {
        publish();
        __syncthreads();
        if (threadIdx.x != 0 || r.p.shape.ranks == 1) return true;
        Workspace& w = r.workspace();
        const u32 expected = r.p.shape.ranks * (w.rank_epoch + 1);
        w.rank_epoch += 1;
        ptx::fence_system();
        for (u32 peer = 0; peer < r.p.shape.ranks; ++peer)
            ptx::reduce_add_release_system(r.at<u32>(peer, r.p.layout.rank_counter), 1);
        return spin(r, r.mine<u32>(r.p.layout.rank_counter), kRanks, expected,
                    [&](u32 seen) { return static_cast<int>(seen - expected) >= 0; });
    });
}

// Waits for a stage; gives up where the launch has failed. Copies under way are given time to land first, so that all
// warps of the block take the same way: a warpgroup cannot multiply with a warp missing.
template <typename Meanwhile = Nothing>
__device__ __forceinline__ bool wait_stage(const layout::Rank& r, u64* full_or_empty, u32 parity, Meanwhile meanwhile = {}) {
    constexpr u64 kLandingNs = 10'000'000;
    u64 failed_at = 0;
    for (u32 i = 1; !ptx::mbarrier_try_wait(full_or_empty, parity); ++i) {
        meanwhile();
        if (i % 1024 != 0 || !failed(r.p)) continue;
        if (failed_at == 0) failed_at = ptx::global_timer();
        else if (ptx::global_timer() - failed_at > kLandingNs) return false;
    }
    return true;
}

}  // namespace barrier
