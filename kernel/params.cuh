// The one argument of the kernel, a sub-struct a room. The host computes every size and offset once, in kernel/launch code;
// nothing is derived a second time here.
#pragma once
#include "ptx.cuh"
#include "swiglu.cuh"

constexpr u32 kMaxRanks = 8;      // ranks of one launch, or peers of one process
constexpr u32 kMaxExperts = 512;  // over all ranks

// L2 activations that share a scale, and so the chain of GEMM 2: 64 or 128. With 128 the scales fill half of their memory.
constexpr u32 kGranularity = GRANULARITY, kTurnsPerScale = kGranularity / 64;
static_assert(kGranularity == 64 || kGranularity == 128);

// Byte offsets into a rank's symmetric buffer; the same on every rank.
struct Layout {
    u64 x, x_sf, topk_idx, topk_weights;                   // inputs
    u64 slots;                                             // bf16 [K][capacity][H]: rows come back here
    u64 recv_count;                                        // u32 [R][E_loc]: written by the source ranks
    u64 recv_list;                                         // u32 [R][E_loc][capacity * K]: token * K + slot
    u64 rank_counter;                                      // u32: arrivals of the ranks, ever growing
    u64 workspace;                                         // of this rank alone, see Workspace
    u64 l1_acts, l1_acts_sf, l2_acts, l2_acts_sf;          // the ring of the pool
    u64 pool_source, pool_weight;                          // u32x2 (source rank, its slot row) and f32, by pool row
};

// Counters of one rank; all zero between launches, but for rank_epoch, which only grows, and the upper bit of `arrived`.
struct Workspace {
    u32 arrived, rank_epoch, tiles_taken;
    u32 send_count[kMaxExperts];
    // behind it, u32 [pool blocks] each: block_rows, block_l1_turns, block_l2_turns
};

struct Shape {
    u32 ranks, experts, experts_local, topk, hidden, intermediate;
    u32 capacity;     // tokens a rank at most
    u32 pool_blocks;  // blocks that can fill: counters of each kind
    u32 ring_blocks;  // blocks that activations have memory for: block b stands at b mod ring_blocks
    u32 ring_rows;
};

// What a spin that ran out of time leaves behind. `flag` is set by the first; everyone who sees it drains and exits, and the
// host reads the rest when the launch has ended.
struct Status {
    u32 flag, rank, block, counter, expected, seen;
};

// One rank of this launch.
struct RankParams {
    ptx::TensorMap l1_acts, l2_acts;
    const u8* w1;        // interleaved, in half tiles, see layout.cuh
    const u8* w2;
    const float* w1_sf;  // [E_loc][2I / 128][H / 128]
    const float* w2_sf;  // [E_loc][H / 128][I / 128]
    u16* y;              // bf16 [T][H]
    int* stats;          // [E_loc], or null
    u32 tokens, unused[3];
};

struct Params {
    RankParams rank[kMaxRanks];  // the ranks of this launch: first_rank, first_rank + 1, ...
    u8* buffer[kMaxRanks];       // symmetric buffers of all ranks
    Layout layout;
    Shape shape;
    swiglu::Params swiglu;
    u32 first_rank, blocks_per_rank;
    u64 timeout_ns;
    Status* status;
};
