// Where things are: the addresses of this rank's memory and of its peers'. Every such address is the base of a
// symmetric buffer plus an offset, and only this file adds them, so that how peers are reached is one file's business.
// Every role of the kernel holds a Rank. Predicted by reference/layout.py.
#pragma once
#include "gemm.cuh"
#include "params.cuh"

namespace layout {

// The rank to which this thread block belongs, and the thread block's place in it.
struct Rank {
    const Params& params;
    const RankParams& own;
    u32 idx;                // of this rank, among all ranks
    u32 cta_idx, num_ctas;  // this thread block, and how many the rank has

    __device__ __forceinline__ explicit Rank(const Params& p)
        : params(p),
          own(p.ranks[blockIdx.x / p.grid.num_ctas_per_rank]),
          idx(p.grid.first_rank_idx + blockIdx.x / p.grid.num_ctas_per_rank),
          cta_idx(blockIdx.x % p.grid.num_ctas_per_rank),
          num_ctas(p.grid.num_ctas_per_rank) {}

    template <typename T>
    __device__ __forceinline__ T* peer_ptr(u32 peer_idx, u64 offset) const {
        return reinterpret_cast<T*>(params.layout.buffer_ptr[peer_idx] + offset);
    }
    template <typename T>
    __device__ __forceinline__ T* own_ptr(u64 offset) const {
        return peer_ptr<T>(idx, offset);
    }
    __device__ __forceinline__ Workspace& workspace() const {
        return *own_ptr<Workspace>(params.layout.offset.workspace);
    }

    // Counters by pool block: rows that have arrived, half tiles that GEMM 1 has computed, and half tiles that GEMM 2
    // has.
    __device__ __forceinline__ u32* rows_arrived_ptr() const {
        return own_ptr<u32>(params.layout.offset.workspace + sizeof(Workspace));
    }
    __device__ __forceinline__ u32* gemm1_done_ptr() const { return rows_arrived_ptr() + params.shape.num_pool_blocks; }
    __device__ __forceinline__ u32* gemm2_done_ptr() const { return gemm1_done_ptr() + params.shape.num_pool_blocks; }

    // The row of the ring that holds the activations of a pool block's row. A row's source and weight are found by its
    // pool row instead, which is never reused.
    __device__ __forceinline__ u64 ring_row(u32 pool_block_idx, u32 row_in_block) const {
        return static_cast<u64>(pool_block_idx % params.shape.num_ring_blocks) * gemm::kBlockM + row_in_block;
    }

    // The 16 KB of a half tile: 128 weight rows from `first_row` on of an expert that has num_weight_rows, at one K
    // block. They are stored as they will lie in shared memory. The second half of a tile of 256 rows follows its first
    // half, so that one copy brings both; where the number of halves is odd, the last one has no neighbour.
    __device__ __forceinline__ static const u8* half_tile_ptr(const u8* weights_ptr, u32 expert_idx,
                                                              u32 num_weight_rows, u32 first_row, u32 k_block_idx,
                                                              u32 num_k_blocks) {
        const u32 half_idx = first_row / gemm::kHalfN, num_halves = num_weight_rows / gemm::kHalfN;
        const u32 num_side_by_side = (half_idx | 1) < num_halves ? 2 : 1;
        const u64 place = static_cast<u64>(expert_idx * num_halves + half_idx / 2 * 2) * num_k_blocks +
                          k_block_idx * num_side_by_side + half_idx % 2;
        return weights_ptr + place * gemm::kHalfN * gemm::kBlockK;
    }

    // By local expert of `peer_idx`: how many rows `source_idx` sends to it.
    __device__ __forceinline__ u32* recv_count(u32 peer_idx, u32 source_idx) const {
        return peer_ptr<u32>(peer_idx, params.layout.offset.recv_count) + source_idx * params.shape.num_local_experts;
    }
    // The entries token * K + slot that `source_idx` sends to one local expert of `peer_idx`; recv_count says how many.
    __device__ __forceinline__ u32* recv_list(u32 peer_idx, u32 source_idx, u32 expert_idx) const {
        const u64 list_idx = static_cast<u64>(source_idx) * params.shape.num_local_experts + expert_idx;
        return peer_ptr<u32>(peer_idx, params.layout.offset.recv_list) +
               list_idx * params.shape.capacity * params.shape.num_topk;
    }

    // Whether a slot names an expert. -1 marks an empty slot. Any other value outside [0, E) counts as empty too,
    // because an address made from it would lie outside of the buffer.
    __device__ __forceinline__ bool is_active(long long topk_idx) const {
        return static_cast<u64>(topk_idx) < params.shape.num_experts;
    }
    // The row of (token, slot) in the field `slots` of its source rank: all tokens of slot 0, then all of slot 1.
    __device__ __forceinline__ u32 slot_row_idx(u32 token_idx, u32 slot_idx) const {
        return slot_idx * params.shape.capacity + token_idx;
    }
    __device__ __forceinline__ u16* slot_row(u32 peer_idx, u32 row_idx) const {
        return peer_ptr<u16>(peer_idx, params.layout.offset.slots) + static_cast<u64>(row_idx) * params.shape.hidden;
    }
};

}  // namespace layout
