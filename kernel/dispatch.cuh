// Eq. (1): tokens travel to the ranks of their experts as they are. Sources announce what they send; destinations pull.
#pragma once
#include "barrier.cuh"
#include "scheduler.cuh"

namespace dispatch {

template <typename Visit>
__device__ __forceinline__ void each_active_slot(const layout::Rank& r, Visit visit) {
    const long long* topk_idx = r.mine<long long>(r.p.layout.topk_idx);
    const u32 entries = r.own.tokens * r.p.shape.topk;
    for (u32 entry = r.block * blockDim.x + threadIdx.x; entry < entries; entry += r.blocks * blockDim.x)
        if (r.active(topk_idx[entry])) visit(entry, static_cast<u32>(topk_idx[entry]));
}

// Whether each block counts for itself: those of a rank alone with few slots do, and meet nobody before rows travel.
constexpr u32 kFewSlots = 1024;
constexpr u16 kNobody = 0xFFFF;
__device__ __forceinline__ bool counts_alone(const layout::Rank& r) {
    return r.p.shape.ranks == 1 && r.own.tokens * r.p.shape.topk <= kFewSlots;
}

// The expert of each entry (token, slot) and the rows of each expert, u16 [kFewSlots] and u32 [experts] in shared memory. False:
// a launch before this one has failed. All threads.
__device__ __forceinline__ bool count_alone(const layout::Rank& r, u16* expert_of_entry, u32* rows) {
    const bool failed = threadIdx.x == 0 && barrier::failed(r.p);
    const long long* topk_idx = r.mine<long long>(r.p.layout.topk_idx);
    for (u32 expert = threadIdx.x; expert < r.p.shape.experts; expert += blockDim.x) rows[expert] = 0;
    __syncthreads();
    for (u32 entry = threadIdx.x; entry < r.own.tokens * r.p.shape.topk; entry += blockDim.x) {
        const long long expert = topk_idx[entry];
        expert_of_entry[entry] = r.active(expert) ? static_cast<u16>(expert) : kNobody;
        if (r.active(expert)) ptx::atomic_add_shared(&rows[expert], 1);
    }
    return __syncthreads_or(failed) == 0;
}

// The entry with row `index` of an expert, in the order of entries. All lanes of a warp; there is one.
__device__ __forceinline__ u32 find_entry(const u16* expert_of_entry, u32 entries, u32 expert, u32 index) {
    const u32 lane = threadIdx.x % 32;
    for (u32 first = 0; first < entries; first += 32) {
        const u32 found = __ballot_sync(0xFFFFFFFFu, first + lane < entries && expert_of_entry[first + lane] == expert);
        const u32 count = __popc(found);
        if (index < count) {
            const bool here = (found >> lane & 1) != 0 && __popc(found & ((1u << lane) - 1)) == index;
            return first + __ffs(__ballot_sync(0xFFFFFFFFu, here)) - 1;
        }
        index -= count;
    }
    return 0;
}

// Appends this rank's entries (token, slot) to the lists at the destinations. A block takes room for all of its entries of
// an expert at once: one counter for the whole rank would be the bottleneck of large batches. Within a list the order is
// that of arrival: no bit depends on it. `places`: shared memory, u32 [experts]. False: a launch before this one has failed.
__device__ __forceinline__ bool announce(const layout::Rank& r, u32* places) {
    const bool failed = threadIdx.x == 0 && barrier::failed(r.p);
    const u32 local = r.p.shape.experts_local;
    for (u32 expert = threadIdx.x; expert < r.p.shape.experts; expert += blockDim.x) places[expert] = 0;
    __syncthreads();
    each_active_slot(r, [&](u32 entry, u32 expert) { ptx::atomic_add_shared(&places[expert], 1); });
    if (__syncthreads_or(failed) != 0) return false;
    for (u32 expert = threadIdx.x; expert < r.p.shape.experts; expert += blockDim.x)
        if (const u32 count = places[expert]) places[expert] = ptx::atomic_add(&r.workspace().send_count[expert], count);
    __syncthreads();
    each_active_slot(r, [&](u32 entry, u32 expert) {
        r.recv_list(expert / local, r.rank, expert % local)[ptx::atomic_add_shared(&places[expert], 1)] = entry;
    });
    return true;
}

// Tells the destinations how long the lists are, and makes the counters zero again. All threads of one block.
__device__ __forceinline__ void publish(const layout::Rank& r) {
    const u32 local = r.p.shape.experts_local;
    for (u32 expert = threadIdx.x; expert < r.p.shape.experts; expert += blockDim.x) {
        u32* count = &r.workspace().send_count[expert];
        r.recv_count(expert / local, r.rank)[expert % local] = ptx::load_relaxed(count);
        *count = 0;
    }
}

constexpr u32 kLost = 2;      // instead of a parity: a copy did not arrive
constexpr u32 kChunk = 8192;  // bytes of a row that travel at a time: rows of most models in one step

// Where one warp's rows pass through shared memory: the copies are asynchronous, so they cost no registers and few cycles.
struct Transit {
    alignas(128) u8 chunk[kChunk];
    u64 arrived;
};

// Whether this lane starts the copies of its warp and waits for them, and at which phase of `arrived` it is.
struct Carrier {
    bool elected;
    u32 parity = 0;
};

// One warp copies one pool row: bytes and scales (transposed, as TMA wants them) to their place in the ring, weight and
// source to the pool row. False: a copy did not arrive.
__device__ __forceinline__ bool pull_row(const layout::Rank& r, const scheduler::Plan& plan, Transit& transit, Carrier& carrier,
                                         const u16* expert_of_entry, u32 expert, u32 index, u64 row, u64 ring_row) {
    const Shape& s = r.p.shape;
    const Layout& l = r.p.layout;
    const u32 lane = threadIdx.x % 32;
    u32 source = 0;
    while (source + 1 < s.ranks && plan.first_row[expert * s.ranks + source + 1] <= index) ++source;
    const u32 entry = counts_alone(r)
                          ? find_entry(expert_of_entry, r.own.tokens * s.topk, expert, index)
                          : r.recv_list(r.rank, source, expert)[index - plan.first_row[expert * s.ranks + source]];
    const u32 token = entry / s.topk, slot = entry % s.topk;
    const float* from_sf = r.at<float>(source, l.x_sf) + static_cast<u64>(token) * (s.hidden / 128);
    float* to_sf = r.mine<float>(l.l1_acts_sf) + ring_row;
    const u8* from = r.at<u8>(source, l.x) + static_cast<u64>(token) * s.hidden;
    u8* to = r.mine<u8>(l.l1_acts) + ring_row * s.hidden;
    const auto load = [&](u32 offset) {
        const u32 bytes = min(kChunk, s.hidden - offset);
        ptx::mbarrier_arrive_expect(&transit.arrived, bytes);
        ptx::bulk_load(transit.chunk, from + offset, bytes, &transit.arrived);
        return bytes;
    };
    u32 bytes = 0;
    if (carrier.elected) bytes = load(0);
    for (u32 i = lane; i < s.hidden / 128; i += 32) to_sf[static_cast<u64>(i) * s.ring_rows] = from_sf[i];
    if (carrier.elected) {
        r.mine<uint2>(l.pool_source)[row] = make_uint2(source, r.slot_index(token, slot));
        r.mine<float>(l.pool_weight)[row] = r.at<float>(source, l.topk_weights)[entry];
        for (u32 offset = 0;; bytes = load(offset)) {
            if (!barrier::wait_copy(r, &transit.arrived, carrier.parity)) {
                carrier.parity = kLost;
                break;
            }
            carrier.parity ^= 1;
            ptx::bulk_store(to + offset, transit.chunk, bytes);
            ptx::bulk_store_wait();
            if ((offset += bytes) >= s.hidden) break;
        }
    }
    return __ballot_sync(0xFFFFFFFFu, carrier.parity == kLost) == 0;
}

// The place of a pool block in the ring is free: GEMM 1 has read the block that stood there. One lane looks, so that the
// warp stays together also where the launch has failed.
__device__ __forceinline__ bool wait_free(const layout::Rank& r, u32 block) {
    if (block < r.p.shape.ring_blocks) return true;
    const u32 expected = scheduler::l1_turns(r.p.shape);
    bool free = true;
    if (threadIdx.x % 32 == 0)
        free = barrier::reach(r, r.block_l1_turns() + block - r.p.shape.ring_blocks, barrier::kBlockL1Turns, expected);
    __syncwarp();
    return __shfl_sync(0xFFFFFFFFu, static_cast<u32>(free), 0) != 0;
}

// The dispatch warps of all blocks, each block of the pool in its turn: GEMM 1 starts on the first while later ones travel.
// expert_of_entry: of a rank alone.
__device__ __forceinline__ void pull(const layout::Rank& r, const scheduler::Plan& plan, const u16* expert_of_entry, Transit& transit,
                                     u32 warp, u32 warps) {
    const u32 experts = r.p.shape.experts_local, pool_blocks = plan.first_block[experts];
    Carrier carrier{ptx::elect_one()};
    u32 turn = 0;  // rows seen so far; row n belongs to warp n mod all warps
    const u32 all = warps * r.blocks, own = warp * r.blocks + r.block;
    ptx::fence_proxy_async_all();  // bulk copies read what peers wrote before they were met
    for (u32 block = 0; block < pool_blocks; ++block) {
        const u32 expert = scheduler::expert_of(plan, experts, block);
        const u32 rows = scheduler::rows_in_block(plan, expert, block);
        const u32 first = (own + all - turn % all) % all;
        if (first < rows && !wait_free(r, block)) return;
        for (u32 i = first; i < rows; i += all) {
            if (!pull_row(r, plan, transit, carrier, expert_of_entry, expert,
                          (block - plan.first_block[expert]) * scheduler::kBlockM + i,
                          static_cast<u64>(block) * scheduler::kBlockM + i, r.ring_row(block, i)))
                return;
            ptx::fence_proxy_async_all();  // TMA reads what these lanes wrote
            __syncwarp();
            if (threadIdx.x % 32 == 0) ptx::reduce_add_release(&r.block_rows()[block], 1);
        }
        turn += rows;
    }
}

}  // namespace dispatch
