// Eq. (1): tokens travel to the ranks of their experts as they are; there is no arithmetic. All threads announce which
// rows a rank sends; after the barrier of the ranks, the dispatch warps of the destination pull the rows. Predicted by
// reference/dispatch.py.
//
// Inputs: x, x_sf, topk_idx, topk_weights of all ranks. Outputs: recv_count and recv_list; then l1_acts and l1_acts_sf
// in the ring, pool_source and pool_weight by pool row, and the counters of rows that have arrived.
//
// An entry is the number token * K + slot of an active slot of its source rank.
#pragma once
#include "barrier.cuh"
#include "scheduler.cuh"

namespace dispatch {

// Calls visit(entry, expert) for the active slots of this rank that fall to this thread.
template <typename Visit>
__device__ __forceinline__ void for_each_active_slot(const layout::Rank& rank, Visit visit) {
    const long long* topk_idx = rank.own_ptr<long long>(rank.params.layout.offset.topk_idx);
    const u32 num_entries = rank.own.num_tokens * rank.params.shape.num_topk;
    for (u32 entry = rank.cta_idx * blockDim.x + threadIdx.x; entry < num_entries; entry += rank.num_ctas * blockDim.x)
        if (rank.is_active(topk_idx[entry])) visit(entry, static_cast<u32>(topk_idx[entry]));
}

// ---- one rank with few slots: each thread block counts all of them itself -----------------------------------------

// Whether each thread block counts for itself, so that no barrier is needed before rows travel: about 3 us less up to
// 170 tokens.
constexpr u32 kFewSlots = FEW_SLOTS;  // entries for which each thread block has room in shared memory
constexpr u16 kNoExpert = 0xFFFF;
__device__ __forceinline__ bool counts_locally(const layout::Rank& rank) {
    return rank.params.shape.num_ranks == 1 && rank.own.num_tokens * rank.params.shape.num_topk <= kFewSlots;
}

// Writes the expert of each entry, u16 [kFewSlots], and the rows of each expert, u32 [E], to shared memory. All threads
// call it. Returns false if an earlier launch has failed.
__device__ __forceinline__ bool count_locally(const layout::Rank& rank, u16* expert_of_entry, u32* num_rows) {
    const bool failed = threadIdx.x == 0 && barrier::has_failed(rank.params);
    const Shape& shape = rank.params.shape;
    const long long* topk_idx = rank.own_ptr<long long>(rank.params.layout.offset.topk_idx);
    for (u32 expert_idx = threadIdx.x; expert_idx < shape.num_experts; expert_idx += blockDim.x)
        num_rows[expert_idx] = 0;
    __syncthreads();
    for (u32 entry = threadIdx.x; entry < rank.own.num_tokens * shape.num_topk; entry += blockDim.x) {
        const long long expert_idx = topk_idx[entry];
        expert_of_entry[entry] = rank.is_active(expert_idx) ? static_cast<u16>(expert_idx) : kNoExpert;
        if (rank.is_active(expert_idx)) ptx::atomic_add_shared(&num_rows[expert_idx], 1);
    }
    return __syncthreads_or(failed) == 0;
}

// The entry of an expert's row number `row_idx`, in the order of entries; the expert has such a row. All lanes of a
// warp call it and get the same answer.
__device__ __forceinline__ u32 find_entry(const u16* expert_of_entry, u32 num_entries, u32 expert_idx, u32 row_idx) {
    const u32 lane_idx = threadIdx.x % 32;
    for (u32 first = 0; first < num_entries; first += 32) {
        const u32 found = __ballot_sync(
            0xFFFFFFFFu, first + lane_idx < num_entries && expert_of_entry[first + lane_idx] == expert_idx);
        const u32 num_found = __popc(found);
        if (row_idx < num_found) {
            const bool is_mine = (found >> lane_idx & 1) != 0 && __popc(found & ((1u << lane_idx) - 1)) == row_idx;
            return first + __ffs(__ballot_sync(0xFFFFFFFFu, is_mine)) - 1;
        }
        row_idx -= num_found;
    }
    return 0;
}

// ---- any number of ranks: sources announce their entries to the destinations --------------------------------------

// Appends this rank's entries to the lists at the destinations. A thread block reserves room for all of its entries of
// an expert at once, because one counter for the whole rank was the bottleneck of large batches. The order within a
// list is that of arrival; no bit depends on it. All threads call it. `places` is shared memory, u32 [E]. Returns false
// if an earlier launch has failed.
__device__ __forceinline__ bool announce(const layout::Rank& rank, u32* places) {
    const bool failed = threadIdx.x == 0 && barrier::has_failed(rank.params);
    const Shape& shape = rank.params.shape;
    const u32 num_local_experts = shape.num_local_experts;
    for (u32 expert_idx = threadIdx.x; expert_idx < shape.num_experts; expert_idx += blockDim.x) places[expert_idx] = 0;
    __syncthreads();
    for_each_active_slot(rank, [&](u32 entry, u32 expert_idx) { ptx::atomic_add_shared(&places[expert_idx], 1); });
    if (__syncthreads_or(failed) != 0) return false;
    for (u32 expert_idx = threadIdx.x; expert_idx < shape.num_experts; expert_idx += blockDim.x)
        if (const u32 count = places[expert_idx])
            places[expert_idx] = ptx::atomic_add(&rank.workspace().send_count[expert_idx], count);
    __syncthreads();
    for_each_active_slot(rank, [&](u32 entry, u32 expert_idx) {
        u32* list = rank.recv_list(expert_idx / num_local_experts, rank.idx, expert_idx % num_local_experts);
        list[ptx::atomic_add_shared(&places[expert_idx], 1)] = entry;
    });
    return true;
}

// Writes the lengths of the lists to the destinations and sets this rank's counters to zero again. All threads of one
// thread block call it, inside the barrier of the ranks.
__device__ __forceinline__ void publish(const layout::Rank& rank) {
    const Shape& shape = rank.params.shape;
    const u32 num_local_experts = shape.num_local_experts;
    for (u32 expert_idx = threadIdx.x; expert_idx < shape.num_experts; expert_idx += blockDim.x) {
        u32* count_ptr = &rank.workspace().send_count[expert_idx];
        const u32 count = ptx::load_relaxed(count_ptr);
        rank.recv_count(expert_idx / num_local_experts, rank.idx)[expert_idx % num_local_experts] = count;
        *count_ptr = 0;
    }
}

// ---- destinations pull the rows -----------------------------------------------------------------------------------

// Through this memory the rows of one dispatch warp travel. Asynchronous copies cost no registers and few instructions.
// 8 KB hold a row of most models, so that it travels in one step; With 4 KB the layer took up to 2 % longer.
constexpr u32 kStagingBytes = STAGING_BYTES;
struct StagingBuffer {
    alignas(128) u8 bytes[kStagingBytes];
    u64 arrived;  // mbarrier
};

// The copies of a dispatch warp: whether this lane starts them and waits for them, and the parity of `arrived`.
struct CopyState {
    bool is_elected;
    u32 parity = 0;
};
constexpr u32 kCopyLost = 2;  // takes the place of a parity if a copy did not arrive in time

// Copies one pool row, by one warp: the codes through the staging buffer and the scales (transposed, as the GEMM loads
// them) to the ring, weight and source to their place by pool row. Returns false if a copy did not arrive.
__device__ __forceinline__ bool pull_row(const layout::Rank& rank, const scheduler::Plan& plan, StagingBuffer& staging,
                                         CopyState& copy, const u16* expert_of_entry, u32 expert_idx, u32 row_idx,
                                         u64 pool_row, u64 ring_row) {
    const Shape& shape = rank.params.shape;
    const Offsets& offset = rank.params.layout.offset;
    const u32 lane_idx = threadIdx.x % 32;
    u32 source_idx = 0;
    while (source_idx + 1 < shape.num_ranks && plan.first_row[expert_idx * shape.num_ranks + source_idx + 1] <= row_idx)
        ++source_idx;
    const u32 entry =
        counts_locally(rank)
            ? find_entry(expert_of_entry, rank.own.num_tokens * shape.num_topk, expert_idx, row_idx)
            : rank.recv_list(rank.idx, source_idx,
                             expert_idx)[row_idx - plan.first_row[expert_idx * shape.num_ranks + source_idx]];
    const u32 token_idx = entry / shape.num_topk, slot_idx = entry % shape.num_topk;
    const float* from_sf =
        rank.peer_ptr<float>(source_idx, offset.x_sf) + static_cast<u64>(token_idx) * (shape.hidden / 128);
    float* to_sf = rank.own_ptr<float>(offset.l1_acts_sf) + ring_row;
    const u8* from = rank.peer_ptr<u8>(source_idx, offset.x) + static_cast<u64>(token_idx) * shape.hidden;
    u8* to = rank.own_ptr<u8>(offset.l1_acts) + ring_row * shape.hidden;
    const auto load = [&](u32 first) {
        const u32 num_bytes = min(kStagingBytes, shape.hidden - first);
        ptx::mbarrier_arrive_expect(&staging.arrived, num_bytes);
        ptx::bulk_load(staging.bytes, from + first, num_bytes, &staging.arrived);
        return num_bytes;
    };
    u32 num_bytes = 0;
    if (copy.is_elected) num_bytes = load(0);
    for (u32 i = lane_idx; i < shape.hidden / 128; i += 32)
        to_sf[static_cast<u64>(i) * shape.num_ring_rows] = from_sf[i];
    if (copy.is_elected) {
        rank.own_ptr<uint2>(offset.pool_source)[pool_row] =
            make_uint2(source_idx, rank.slot_row_idx(token_idx, slot_idx));
        rank.own_ptr<float>(offset.pool_weight)[pool_row] =
            rank.peer_ptr<float>(source_idx, offset.topk_weights)[entry];
        for (u32 first = 0;; num_bytes = load(first)) {
            if (!barrier::wait_copy(rank, &staging.arrived, copy.parity)) {
                copy.parity = kCopyLost;
                break;
            }
            copy.parity ^= 1;
            ptx::bulk_store(to + first, staging.bytes, num_bytes);
            ptx::bulk_store_wait();
            if ((first += num_bytes) >= shape.hidden) break;
        }
    }
    return __ballot_sync(0xFFFFFFFFu, copy.parity == kCopyLost) == 0;
}

// Waits until a pool block's place in the ring is free: until GEMM 1 has read the pool block that had it before. One
// lane looks, so that the warp stays together even where the launch has failed. Returns false if it has.
__device__ __forceinline__ bool wait_free(const layout::Rank& rank, u32 pool_block_idx) {
    const Shape& shape = rank.params.shape;
    if (pool_block_idx < shape.num_ring_blocks) return true;
    const u32 expected = scheduler::num_gemm1_half_tiles(shape);
    bool is_free = true;
    if (threadIdx.x % 32 == 0)
        is_free = barrier::reach(rank, rank.gemm1_done_ptr() + pool_block_idx - shape.num_ring_blocks,
                                 barrier::kGemm1Done, expected);
    __syncwarp();
    return __shfl_sync(0xFFFFFFFFu, static_cast<u32>(is_free), 0) != 0;
}

// The dispatch role. The dispatch warps of all thread blocks share the rows of one pool block after the other, so that
// GEMM 1 starts on the first while later ones still travel. expert_of_entry is used where counts_locally() holds.
__device__ __forceinline__ void pull(const layout::Rank& rank, const scheduler::Plan& plan, const u16* expert_of_entry,
                                     StagingBuffer& staging, u32 warp_idx, u32 num_warps) {
    const u32 num_experts = rank.params.shape.num_local_experts, num_pool_blocks = plan.first_block[num_experts];
    CopyState copy{ptx::elect_one()};
    u32 num_rows_before = 0;  // rows of the pool blocks before this one; row n falls to warp n mod num_all_warps
    const u32 num_all_warps = num_warps * rank.num_ctas, own_idx = warp_idx * rank.num_ctas + rank.cta_idx;
    ptx::fence_proxy_async_all();  // bulk copies read what peers wrote before the barrier of the ranks
    for (u32 pool_block_idx = 0; pool_block_idx < num_pool_blocks; ++pool_block_idx) {
        const u32 expert_idx = scheduler::expert_of(plan, num_experts, pool_block_idx);
        const u32 num_rows = scheduler::num_rows_in_block(plan, expert_idx, pool_block_idx);
        const u32 first = (own_idx + num_all_warps - num_rows_before % num_all_warps) % num_all_warps;
        if (first < num_rows && !wait_free(rank, pool_block_idx)) return;
        for (u32 i = first; i < num_rows; i += num_all_warps) {
            if (!pull_row(rank, plan, staging, copy, expert_of_entry, expert_idx,
                          (pool_block_idx - plan.first_block[expert_idx]) * scheduler::kBlockM + i,
                          static_cast<u64>(pool_block_idx) * scheduler::kBlockM + i, rank.ring_row(pool_block_idx, i)))
                return;
            ptx::fence_proxy_async_all();  // TMA reads what these lanes wrote
            __syncwarp();
            if (threadIdx.x % 32 == 0) ptx::reduce_add_release(&rank.rows_arrived_ptr()[pool_block_idx], 1);
        }
        num_rows_before += num_rows;
    }
}

}  // namespace dispatch
