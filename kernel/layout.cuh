// Where things are: every address of this rank and of its peers is a buffer's base plus an offset, and is made here.
#pragma once
#include "gemm.cuh"
#include "params.cuh"

namespace layout {

struct Rank {
    const Params& p;
    const RankParams& own;
    u32 rank, block, blocks;  // block: of this rank's blocks

    __device__ __forceinline__ explicit Rank(const Params& params)
        : p(params), own(params.rank[blockIdx.x / params.blocks_per_rank]),
          rank(params.first_rank + blockIdx.x / params.blocks_per_rank), block(blockIdx.x % params.blocks_per_rank),
          blocks(params.blocks_per_rank) {}

    template <typename T>
    __device__ __forceinline__ T* at(u32 peer, u64 offset) const {
        return reinterpret_cast<T*>(p.buffer[peer] + offset);
    }
    template <typename T>
    __device__ __forceinline__ T* mine(u64 offset) const {
        return at<T>(rank, offset);
    }
    __device__ __forceinline__ Workspace& workspace() const { return *mine<Workspace>(p.layout.workspace); }
    __device__ __forceinline__ u32* block_rows() const { return mine<u32>(p.layout.workspace + sizeof(Workspace)); }
    __device__ __forceinline__ u32* block_l1_turns() const { return block_rows() + p.shape.pool_blocks; }
    __device__ __forceinline__ u32* block_l2_turns() const { return block_l1_turns() + p.shape.pool_blocks; }
    // Where activations of row `row_in_block` of a pool block stand. Source and weight of a row stand by its pool row.
    __device__ __forceinline__ u64 ring_row(u32 block, u32 row_in_block) const {
        return static_cast<u64>(block % p.shape.ring_blocks) * gemm::kBlockM + row_in_block;
    }
    // The half tile of 128 weight rows from `row` on of an expert's n, at K block k_block of `blocks`: 16 KB as they lie in
    // shared memory. The second half of a tile of 256 follows its first; an odd last half of an expert stands alone.
    __device__ __forceinline__ static const u8* half_tile(const u8* weights, u32 expert, u32 n, u32 row, u32 k_block,
                                                          u32 blocks) {
        const u32 half = row / gemm::kTurnN, halves = n / gemm::kTurnN, width = (half | 1) < halves ? 2 : 1;
        const u64 place = static_cast<u64>(expert * halves + half / 2 * 2) * blocks + k_block * width + half % 2;
        return weights + place * gemm::kTurnN * gemm::kBlockK;
    }
    __device__ __forceinline__ u32* recv_count(u32 peer, u32 source) const {
        return at<u32>(peer, p.layout.recv_count) + source * p.shape.experts_local;
    }
    // What `source` sends to a local expert of `peer`: entries token * K + slot, as many as recv_count says.
    __device__ __forceinline__ u32* recv_list(u32 peer, u32 source, u32 expert) const {
        const u64 list = static_cast<u64>(source) * p.shape.experts_local + expert;
        return at<u32>(peer, p.layout.recv_list) + list * p.shape.capacity * p.shape.topk;
    }
    // Whether a slot names an expert: -1 does not, nor does anything else outside [0, E), which nobody must follow.
    __device__ __forceinline__ bool active(long long topk_idx) const { return static_cast<u64>(topk_idx) < p.shape.experts; }
    // The output row of (token, slot) on its source rank: slot after slot.
    __device__ __forceinline__ u32 slot_index(u32 token, u32 slot) const { return slot * p.shape.capacity + token; }
    __device__ __forceinline__ u16* slot_row(u32 peer, u32 index) const {
        return at<u16>(peer, p.layout.slots) + static_cast<u64>(index) * p.shape.hidden;
    }
};

}  // namespace layout
