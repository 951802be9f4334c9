// The one argument of the kernel: a struct for each room that reads it. The host computes every size and offset once
// and fills the structs; their mirror in ctypes is params.py. Nothing is derived a second time on the device.
#pragma once
#include "ptx.cuh"
#include "swiglu.cuh"

// Constants that the host needs too are macros of their name: their values and units are in kernel/host/sizes.py.
constexpr u32 kMaxRanks = MAX_RANKS;      // ranks of one launch
constexpr u32 kMaxExperts = MAX_EXPERTS;  // experts of all ranks together

// Columns of the L2 activations that share a scale, and so the columns of K in a chain of GEMM 2: 64 or 128. The buffer
// has room for the scales of 64; with 128 they fill half of it.
constexpr u32 kGranularity = GRANULARITY;
// GEMM 1 computes 64 columns of L2 activations in a half tile: gate and up of each.
constexpr u32 kHalfTilesPerScale = kGranularity / 64;
static_assert(kGranularity == 64 || kGranularity == 128);

// Byte offsets of the fields of a symmetric buffer; they are the same on every rank. Shapes of the fields are in
// reference/layout.py.
struct Offsets {
    u64 x, x_sf, topk_idx, topk_weights;           // the inputs
    u64 slots;                                     // bf16 [K][capacity][H]: output rows come back here
    u64 recv_count;                                // u32 [R][E_loc]: rows from each source rank, which writes its own
    u64 recv_list;                                 // u32 [R][E_loc][capacity * K]: entries token * K + slot
    u64 rank_counter;                              // u32: arrivals of all ranks at barriers; it only grows
    u64 workspace;                                 // Workspace; only this rank uses it
    u64 l1_acts, l1_acts_sf, l2_acts, l2_acts_sf;  // activations of the pool blocks that are in the ring
    u64 pool_source, pool_weight;                  // by pool row: u32x2 (source rank, slot row), f32
};

// Room layout: where the memory of the ranks is.
struct LayoutParams {
    u8* buffer_ptr[kMaxRanks];  // symmetric buffers of all ranks
    Offsets offset;
};

// Counters of one rank. All are zero between launches, except rank_epoch, which only grows, and the upper bit of
// `arrived`.
struct Workspace {
    u32 arrived, rank_epoch, num_tasks_taken;
    u32 send_count[kMaxExperts];
    // Three arrays u32 [num_pool_blocks] follow, one counter a pool block: see rows_arrived_ptr in layout.cuh.
};

// Dimensions of the layer, which all rooms read.
struct Shape {
    u32 num_ranks, num_experts, num_local_experts, num_topk, hidden, intermediate;
    u32 capacity;         // most tokens of a rank
    u32 num_pool_blocks;  // most pool blocks that can fill; each has one counter of each kind
    u32 num_ring_blocks;  // pool blocks that activations have memory for: pool block b uses place b mod num_ring_blocks
    u32 num_ring_rows;    // num_ring_blocks * 128
};

// What a wait that timed out leaves behind. The first role that gives up sets `flag` and the rest; every role that sees
// the flag drains and exits. The host reads it when the launch has ended.
struct Status {
    u32 flag, rank_idx, cta_idx, counter, expected, seen;
};

// Room barrier: how long a role waits, and where it writes what it waited for in vain.
struct BarrierParams {
    u64 timeout_ns;
    Status* status_ptr;
};

// How the thread blocks of the grid are shared out among the ranks of this launch.
struct GridParams {
    u32 first_rank_idx, num_ctas_per_rank;
};

// Rooms producer and math: the weights of a rank's experts. The tiles of 128 x 256 weights are stored as they will lie
// in shared memory, see half_tile_ptr in layout.cuh; W1 has its gate and up rows interleaved.
struct WeightParams {
    const u8* w1_ptr;
    const u8* w2_ptr;
    const float* w1_sf_ptr;  // [E_loc][2I / 128][H / 128]
    const float* w2_sf_ptr;  // [E_loc][H / 128][I / 128]
};

// Rooms combine and stats.
struct OutputParams {
    u16* y_ptr;      // bf16 [num_tokens][H]
    int* stats_ptr;  // [E_loc], or null
};

// One rank of this launch.
struct RankParams {
    ptx::TensorMap l1_acts_map, l2_acts_map;  // the ring rows of its buffer, for TMA
    WeightParams weights;
    OutputParams outputs;
    u32 num_tokens, unused[3];
};

struct Params {
    RankParams ranks[kMaxRanks];  // the ranks of this launch, from grid.first_rank_idx on
    LayoutParams layout;
    Shape shape;
    swiglu::Params swiglu;
    GridParams grid;
    BarrierParams barrier;
};
static_assert(sizeof(Params) == PARAMS_BYTES);
