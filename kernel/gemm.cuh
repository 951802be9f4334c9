// Eq. (3) and (6): the promoted GEMM. Each block of K is a chain of wgmma steps from 0; one fp32 fma for each output then
// adds it, scaled, into the sum. Operands come through a ring of shared-memory stages.
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

// One stage by one math warpgroup: its 64 rows of A against all kBlockN columns. `row`: this thread's first row in the
// warpgroup's 64. Frees the stage as soon as its operands and scales have been read.
template <u32 kBlockM, u32 kBlockN, u32 kGroup>
__device__ __forceinline__ void multiply_stage(float (&sum)[kBlockN / 2], const Stage<kBlockM, kBlockN, kGroup>& stage,
                                               u64* empty, u32 first_row, u32 row, const float (&w_sf)[2]) {
    constexpr u32 kGroups = kBlockK / kGroup, kSteps = kGroup / kStepK;
    float acc[kGroups][kBlockN / 2], a_sf[kGroups][2];
#pragma unroll
    for (u32 g = 0; g < kGroups; ++g) {
        a_sf[g][0] = stage.a_sf[g][first_row + row];
        a_sf[g][1] = stage.a_sf[g][first_row + row + 8];
#pragma unroll
        for (float& value : acc[g]) value = 0.0f, ptx::pin(value);
    }
    const u64 desc_a = ptx::descriptor_swizzle_128(stage.a[first_row]), desc_b = ptx::descriptor_swizzle_128(stage.b);
    ptx::wgmma_fence();
#pragma unroll
    for (u32 g = 0; g < kGroups; ++g) {
#pragma unroll
        for (u32 s = 0; s < kSteps; ++s) {
            const u64 offset = (g * kGroup + s * kStepK) >> 4;
            ptx::wgmma_ss<kBlockN>(acc[g], desc_a + offset, desc_b + offset, s > 0);
        }
        ptx::wgmma_commit();
    }
    if constexpr (kGroups == 2) {
        ptx::wgmma_wait<1>();
#pragma unroll
        for (float& value : acc[0]) ptx::pin(value);
        promote<kBlockN>(sum, acc[0], a_sf[0][0], a_sf[0][1], w_sf);
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (float& value : acc[kGroups - 1]) ptx::pin(value);
    __syncwarp();  // every lane has its scales, and wgmma has read the operands
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
    promote<kBlockN>(sum, acc[kGroups - 1], a_sf[kGroups - 1][0], a_sf[kGroups - 1][1], w_sf);
}

}  // namespace gemm
