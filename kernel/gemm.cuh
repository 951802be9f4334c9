// Eq. (2), Eq. (3), Eq. (6): the promoted GEMM. Each block of K is a chain of wgmma steps from 0; one fp32 fma for each
// output then adds it, scaled, into the sum. Operands come through a ring of shared-memory stages.
#pragma once
#include "ptx.cuh"

namespace gemm {

// The tile of a block: kBlockM rows of activations by kBlockN rows of weights, two math warpgroups.
constexpr u32 kBlockM = 128, kBlockN = 256, kStages = 4, kMathWarps = 8;
constexpr u32 kBlockK = 128;  // columns of a stage, and columns that share an input scale
constexpr u32 kStepK = 32;    // columns of one wgmma
constexpr u32 kTurnN = 128;   // weight rows of a chain: accumulators of one turn and sums of two fit in registers
constexpr u32 kSums = kTurnN / 2;  // outputs of a thread in a turn: 64 rows x kTurnN columns by 128 threads
constexpr u32 kMaxGroups = 2;      // scales of an activation row in a stage

// The ring: 128-byte rows in the 128-byte swizzle, and the scale factors of A's rows, one a group of K.
struct Stage {
    alignas(1024) u8 a[kBlockM][kBlockK];
    alignas(1024) u8 b[kBlockN][kBlockK];
    alignas(1024) float a_sf[kMaxGroups][kBlockM];
};

struct Ring {
    Stage stages[kStages];
    u64 full[kStages], empty[kStages];

    __device__ __forceinline__ void init() {
        for (u32 i = 0; i < kStages; ++i) ptx::mbarrier_init(&full[i], 1), ptx::mbarrier_init(&empty[i], kMathWarps);
    }
};

// Place in the ring: index and parity of the barriers' phase.
struct Place {
    u32 index = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++index == kStages) index = 0, parity ^= 1;
    }
};

// What one math warpgroup does in a tile: 64 rows of A from first_row on, in `turns` times kTurnN rows of B from
// first_column on. 0 turns: all padding.
struct Share {
    u32 first_row, first_column, turns;
};

// Above 64 rows the warpgroups share out the rows; up to 64 they share out the columns, and nobody multiplies padding.
// whole_rows: up to 64 as well one warpgroup has all columns of a row, and the other one has nothing.
__device__ __forceinline__ Share share_of(u32 warpgroup, u32 rows, u32 columns, bool whole_rows = false) {
    if (rows <= 64 && !whole_rows) return {0, warpgroup * kTurnN, warpgroup * kTurnN < columns ? 1u : 0u};
    return {warpgroup * 64, 0, warpgroup * 64 < rows ? (columns + kTurnN - 1) / kTurnN : 0};
}

// The index of this thread's math warpgroup, in a register that the compiler knows to be uniform: descriptors made from
// it need no copies before each wgmma.
__device__ __forceinline__ u32 math_warpgroup() { return __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1; }

// This thread's first row in the 64 of its warpgroup; the second is 8 further on.
__device__ __forceinline__ u32 row_of_64() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

// Starts one chain: a group of kGroup columns of K, 64 rows of A against kTurnN of B. Its first step does not read acc.
template <u32 kGroup>
__device__ __forceinline__ void start_chain(float (&acc)[kSums], u64 desc_a, u64 desc_b, u32 group) {
#pragma unroll
    for (float& value : acc) ptx::pin(value);
    ptx::wgmma_fence();
#pragma unroll
    for (u32 s = 0; s < kGroup / kStepK; ++s) {
        const u64 offset = (group * kGroup + s * kStepK) >> 4;
        ptx::wgmma_ss<kTurnN>(acc, desc_a + offset, desc_b + offset, s > 0);
    }
    ptx::wgmma_commit();
}

__device__ __forceinline__ void finish_chain(float (&acc)[kSums]) {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (float& value : acc) ptx::pin(value);
}

// fl(s_a * s_w) for this thread's two rows and for even and odd groups of 8 columns; in place before the chain has ended.
__device__ __forceinline__ void scale_factors(float (&scale)[2][2], const float (&a_sf)[2], float even, float odd) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        scale[0][half] = a_sf[half] * even, scale[1][half] = a_sf[half] * odd;
        ptx::pin(scale[0][half]), ptx::pin(scale[1][half]);
    }
}

// One fma an output. Lanes hold column pairs 8 j + 2 q of two rows, see ptx.cuh. Scale after scale: a register that the next
// fma reads too is kept for it, and leaves the sums' bank alone. In the order of the sums GEMM 1's first turn kept none.
__device__ __forceinline__ void promote(float (&sum)[kSums], const float (&acc)[kSums], const float (&scale)[2][2]) {
#pragma unroll
    for (u32 pair = 0; pair < 4; ++pair) {
#pragma unroll
        for (u32 n = 0; n < kSums / 4; ++n) {
            const u32 i = n / 2 * 8 + pair * 2 + n % 2;
            sum[i] = ptx::fma_rn(scale[pair / 2][pair % 2], acc[i], sum[i]);
        }
    }
}

// The warp has read the stage's scales, and wgmma its operands: it may be written again.
__device__ __forceinline__ void release(u64* empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
}

// A tile by one math warpgroup, kBlockK columns after kBlockK columns, `blocks` times. One chain is in flight at a time, the
// other warpgroup multiplies while this one promotes; whatever a chain does not need happens while one is in flight, so
// that between two chains of a warpgroup there are only fmas. But a stage is released as soon as its last chain has ended,
// before that chain's fmas: how many bytes are on their way is what the multiplies wait for.
//   kInterleaved: w_sf has the scales of gate and up columns, which alternate by 8; otherwise those of the two turns.
//   wait(full, parity): until a stage is full; false gives up.   weights(w_sf, b): loads the scales of K block b.
template <bool kInterleaved, u32 kGroup, u32 kTurns, typename Wait, typename Weights>
__device__ __forceinline__ bool multiply_turns(float (&sum)[2][kSums], Ring& ring, Place& place, const Share& share, u32 blocks,
                                               Wait wait, Weights weights) {
    constexpr u32 kGroups = kBlockK / kGroup;
    struct Operands {
        u64 desc_a, desc_b;
        float a_sf[kGroups][2], w_sf[2];
    };
    const u32 row = share.first_row + row_of_64();
    const auto load = [&](Operands& operands) {
        const Stage& stage = ring.stages[place.index];
        operands.desc_a = ptx::descriptor_swizzle_128(stage.a[share.first_row]);
        operands.desc_b = ptx::descriptor_swizzle_128(stage.b[share.first_column]);
#pragma unroll
        for (u32 g = 0; g < kGroups; ++g)
            operands.a_sf[g][0] = stage.a_sf[g][row], operands.a_sf[g][1] = stage.a_sf[g][row + 8];
    };

    float acc[kSums];
#pragma unroll
    for (u32 i = 0; i < kSums; ++i) acc[i] = sum[0][i] = sum[1][i] = 0.0f;
    Operands now, next;
    weights(now.w_sf, 0);
    if (!wait(&ring.full[place.index], place.parity)) return false;
    load(now);
    bool going = true;
    for (u32 b = 0; b < blocks; ++b) {
        const u32 stage = place.index;
#pragma unroll
        for (u32 turn = 0; turn < kTurns; ++turn) {
#pragma unroll
            for (u32 g = 0; g < kGroups; ++g) {
                start_chain<kGroup>(acc, now.desc_a, now.desc_b + (turn * kTurnN * kBlockK >> 4), g);
                float scale[2][2];
                scale_factors(scale, now.a_sf[g], now.w_sf[kInterleaved ? 0 : turn], now.w_sf[kInterleaved ? 1 : turn]);
                if (turn == 0 && g == 0 && b + 1 < blocks) weights(next.w_sf, b + 1);
                if (turn == kTurns - 1 && g == kGroups - 1) {
                    place.advance();
                    if (b + 1 < blocks) {
                        going = wait(&ring.full[place.index], place.parity);
                        load(next);
                    }
                }
                finish_chain(acc);
                if (turn == kTurns - 1 && g == kGroups - 1) release(&ring.empty[stage]);
                promote(sum[turn], acc, scale);
            }
        }
        if (!going) return false;
        now = next;
    }
    return true;
}

template <bool kInterleaved, u32 kGroup, typename Wait, typename Weights>
__device__ __forceinline__ bool multiply(float (&sum)[2][kSums], Ring& ring, Place& place, const Share& share, u32 blocks,
                                         Wait wait, Weights weights) {
    return share.turns == 2 ? multiply_turns<kInterleaved, kGroup, 2>(sum, ring, place, share, blocks, wait, weights)
                            : multiply_turns<kInterleaved, kGroup, 1>(sum, ring, place, share, blocks, wait, weights);
}

// The same without a share in the tile: only keeps the ring turning.
template <typename Wait>
__device__ __forceinline__ bool pass(Ring& ring, Place& place, u32 blocks, Wait wait) {
    for (u32 b = 0; b < blocks; ++b, place.advance()) {
        if (!wait(&ring.full[place.index], place.parity)) return false;
        release(&ring.empty[place.index]);
    }
    return true;
}

__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
    while (!ptx::mbarrier_try_wait(barrier, parity)) {
    }
}

}  // namespace gemm
