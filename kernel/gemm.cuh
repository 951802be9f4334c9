// Eq. (2), Eq. (3), Eq. (6): the promoted GEMM. Each block of K is a chain of wgmma steps from 0; one fp32 fma for each
// output then adds it, scaled, into the sum. Operands come through a ring of shared-memory stages.
#pragma once
#include "ptx.cuh"

namespace gemm {

constexpr u32 kBlockK = 128;  // columns of a stage, and columns that share an input scale
constexpr u32 kStepK = 32;    // columns of one wgmma

// One stage of the ring: 128-byte rows in the 128-byte swizzle, and the scale factors of A's rows, one a group of K.
template <u32 kBlockM, u32 kBlockN, u32 kGroup>
struct Stage {
    static constexpr u32 kGroups = kBlockK / kGroup;
    static constexpr u32 kBytes = (kBlockM + kBlockN) * kBlockK + kGroups * kBlockM * 4;
    alignas(1024) u8 a[kBlockM][kBlockK];
    alignas(1024) u8 b[kBlockN][kBlockK];
    alignas(1024) float a_sf[kGroups][kBlockM];
};

// Place in a ring of kStages: index and parity of the barriers' phase.
template <u32 kStages>
struct Place {
    u32 index = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++index == kStages) index = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
    while (!ptx::mbarrier_try_wait(barrier, parity)) {
    }
}

// fl(s_a * s_w) for this thread's two rows, then one fma an output. Lanes hold column pairs 8 j + 2 q, see ptx.cuh; w_sf
// has one scale for even j and one for odd j: gate and up of an interleaved tile, or the same one twice.
template <u32 kBlockN>
__device__ __forceinline__ void promote(float (&sum)[kBlockN / 2], const float (&acc)[kBlockN / 2], float a_sf0, float a_sf1,
                                        const float (&w_sf)[2]) {
    float scale[2][2];
#pragma unroll
    for (u32 odd = 0; odd < 2; ++odd) scale[odd][0] = a_sf0 * w_sf[odd], scale[odd][1] = a_sf1 * w_sf[odd];
#pragma unroll
    for (u32 i = 0; i < kBlockN / 2; ++i) sum[i] = ptx::fma_rn(scale[i / 4 % 2][i / 2 % 2], acc[i], sum[i]);
}

// Accumulators of wgmma, defined once: a chain's first step does not read them, so nobody clears them again.
template <u32 kCount, u32 kBlockN>
__device__ __forceinline__ void define(float (&acc)[kCount][kBlockN / 2]) {
#pragma unroll
    for (u32 i = 0; i < kCount * kBlockN / 2; ++i) acc[i / (kBlockN / 2)][i % (kBlockN / 2)] = 0.0f;
}

template <u32 kBlockN>
__device__ __forceinline__ void pin(float (&acc)[kBlockN / 2]) {
#pragma unroll
    for (float& value : acc) ptx::pin(value);
}

// Starts one chain: a group of K columns, 64 rows of A against kBlockN of B.
template <u32 kBlockN, u32 kGroup>
__device__ __forceinline__ void start_chain(float (&acc)[kBlockN / 2], u64 desc_a, u64 desc_b, u32 group) {
    pin<kBlockN>(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (u32 s = 0; s < kGroup / kStepK; ++s) {
        const u64 offset = (group * kGroup + s * kStepK) >> 4;
        ptx::wgmma_ss<kBlockN>(acc, desc_a + offset, desc_b + offset, s > 0);
    }
    ptx::wgmma_commit();
}

// Every lane has its scales, and wgmma has read the operands: the stage may be written again.
__device__ __forceinline__ void release(u64* empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
}

// One stage by one math warpgroup: its 64 rows of A against all kBlockN columns. `row`: this thread's first row in the
// warpgroup's 64. Frees the stage as soon as its operands and scales have been read.
template <u32 kBlockM, u32 kBlockN, u32 kGroup>
__device__ __forceinline__ void multiply_stage(float (&sum)[kBlockN / 2], float (&acc)[kBlockK / kGroup][kBlockN / 2],
                                               const Stage<kBlockM, kBlockN, kGroup>& stage, u64* empty, u32 first_row, u32 row,
                                               const float (&w_sf)[2]) {
    constexpr u32 kGroups = kBlockK / kGroup;
    float a_sf[kGroups][2];
    const u64 desc_a = ptx::descriptor_swizzle_128(stage.a[first_row]), desc_b = ptx::descriptor_swizzle_128(stage.b);
#pragma unroll
    for (u32 g = 0; g < kGroups; ++g) {
        a_sf[g][0] = stage.a_sf[g][first_row + row];  // read before the chain: behind it they cost 6 %
        a_sf[g][1] = stage.a_sf[g][first_row + row + 8];
        start_chain<kBlockN, kGroup>(acc[g], desc_a, desc_b, g);
    }
    if constexpr (kGroups == 2) {
        ptx::wgmma_wait<1>();
        pin<kBlockN>(acc[0]);
        promote<kBlockN>(sum, acc[0], a_sf[0][0], a_sf[0][1], w_sf);
    }
    ptx::wgmma_wait<0>();
    pin<kBlockN>(acc[kGroups - 1]);
    release(empty);
    promote<kBlockN>(sum, acc[kGroups - 1], a_sf[kGroups - 1][0], a_sf[kGroups - 1][1], w_sf);
}

// The same for two times 64 rows, kTurnRows apart, one chain in flight at a time: the other warpgroup multiplies while
// this one promotes. Without `second` the second turn is all padding and is left out.
template <u32 kTurnRows, u32 kBlockM, u32 kBlockN, u32 kGroup>
__device__ __forceinline__ void multiply_stage_in_turn(float (&sum)[2][kBlockN / 2], float (&acc)[1][kBlockN / 2],
                                                       const Stage<kBlockM, kBlockN, kGroup>& stage, u64* empty, bool second,
                                                       u32 first_row, u32 row, const float (&w_sf)[2]) {
    constexpr u32 kGroups = kBlockK / kGroup;
    const u64 desc_b = ptx::descriptor_swizzle_128(stage.b);
#pragma unroll
    for (u32 turn = 0; turn < 2; ++turn) {
        if (turn > 0 && !second) break;
        const u64 desc_a = ptx::descriptor_swizzle_128(stage.a[turn * kTurnRows + first_row]);
#pragma unroll
        for (u32 g = 0; g < kGroups; ++g) {
            const float* a_sf = &stage.a_sf[g][turn * kTurnRows + first_row + row];
            const float a_sf0 = a_sf[0], a_sf1 = a_sf[8];
            start_chain<kBlockN, kGroup>(acc[0], desc_a, desc_b, g);
            ptx::wgmma_wait<0>();
            pin<kBlockN>(acc[0]);
            if (g == kGroups - 1 && (turn == 1 || !second)) release(empty);
            promote<kBlockN>(sum[turn], acc[0], a_sf0, a_sf1, w_sf);
        }
    }
}

}  // namespace gemm
