// Waiting for others: every spin has a time limit, and leaves who waited for what in the status word instead of hanging.
#pragma once
#include "layout.cuh"

namespace barrier {

enum Counter : u32 { kGeneration = 1, kRanks = 2, kBlockRows = 3, kBlockL1Tiles = 4, kStage = 5 };

__device__ __forceinline__ bool failed(const Params& p) { return ptx::load_relaxed(&p.status->flag) != 0; }

// The first to give up writes the status; then everyone drains.
__device__ __noinline__ void give_up(Status* s, u32 rank, u32 block, Counter counter, u32 expected, u32 seen) {
    if (ptx::atomic_cas(&s->flag, 0, 1) != 0) return;
    s->rank = rank, s->block = block, s->counter = counter, s->expected = expected, s->seen = seen;
}

// Spins until done(value of *address) with acquire at system scope. False: time is up, here or elsewhere.
template <typename Done>
__device__ __forceinline__ bool spin(const layout::Rank& r, const u32* address, Counter counter, u32 expected, Done done) {
    if (done(ptx::load_acquire(address))) return true;
    const u64 start = ptx::global_timer();
    for (u32 i = 1;; ++i) {
        const u32 seen = ptx::load_acquire(address);
        if (done(seen)) return true;
        if (i % 64 == 0) {
            if (failed(r.p)) return false;
            if (ptx::global_timer() - start > r.p.timeout_ns) return give_up(r.p.status, r.rank, r.block, counter, expected, seen), false;
        }
    }
}

// All threads of all blocks of a rank; with `all_ranks`, of all ranks. What was written before is visible after, also by
// peers. The last block to arrive speaks for its rank. False: give up.
__device__ __forceinline__ bool meet(const layout::Rank& r, bool all_ranks) {
    __shared__ u32 ok;
    ptx::fence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        Workspace& w = r.workspace();
        const u32 generation = ptx::load_acquire(&w.generation);
        ok = 1;
        if (ptx::atomic_add_acq_rel(&w.arrived, 1) == r.blocks - 1) {
            w.arrived = 0;
            if (all_ranks) {
                const u32 expected = r.p.shape.ranks * (w.rank_epoch + 1);
                w.rank_epoch += 1;
                ptx::fence_system();
                for (u32 peer = 0; peer < r.p.shape.ranks; ++peer)
                    ptx::reduce_add_release_system(r.at<u32>(peer, r.p.layout.rank_counter), 1);
                ok = spin(r, r.mine<u32>(r.p.layout.rank_counter), kRanks, expected,
                          [&](u32 seen) { return static_cast<int>(seen - expected) >= 0; });
            }
            ptx::store_release(&w.generation, generation + 1);
        } else {
            ok = spin(r, &w.generation, kGeneration, generation + 1, [&](u32 seen) { return seen != generation; });
        }
        if (failed(r.p)) ok = 0;
    }
    __syncthreads();
    const bool result = ok != 0;
    __syncthreads();
    return result;
}

}  // namespace barrier
