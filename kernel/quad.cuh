// Four lanes that share a row of wgmma's accumulators: lane q has columns 2 q and 2 q + 1 of each 8.
#pragma once
#include "ptx.cuh"

namespace quad {

// Turns lane q's word w into lane w's word q, so that a lane has neighbouring columns and stores 16 bytes at a time.
__device__ __forceinline__ void transpose(u32 (&w)[4]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    u32 a = __shfl_xor_sync(0xFFFFFFFFu, odd ? w[0] : w[1], 1);
    u32 b = __shfl_xor_sync(0xFFFFFFFFu, odd ? w[2] : w[3], 1);
    if (odd) w[0] = a, w[2] = b;
    else w[1] = a, w[3] = b;
    a = __shfl_xor_sync(0xFFFFFFFFu, high ? w[0] : w[2], 2);
    b = __shfl_xor_sync(0xFFFFFFFFu, high ? w[1] : w[3], 2);
    if (high) w[0] = a, w[1] = b;
    else w[2] = a, w[3] = b;
}

}  // namespace quad
