// Eq. (4), (5): clamped SwiGLU times the routing weight, then re-quantisation to E4M3 with one power-of-two scale for
// 64 or 128 columns. Every operation rounds on its own. The math warpgroups run it after GEMM 1. Inputs: sums in
// registers, routing weights. Outputs: l2_acts and l2_acts_sf. Predicted by reference/swiglu.py.
#pragma once
#include "special.cuh"

namespace swiglu {

struct Params {
    float clamp;     // c; not read without a clamp
    u32 is_clamped;  // 0: there is no clamp, and a NaN stays a NaN
};

// Eq. (4). gate = min(gate, c), without a lower clamp; up = min(max(up, -c), c). fminf and fmaxf return the other
// operand of a NaN.
template <bool kFast, bool kClamped>
__device__ __forceinline__ float activate(float gate, float up, float weight, float clamp) {
    if (kClamped) {
        gate = fminf(gate, clamp);
        up = fminf(fmaxf(up, -clamp), clamp);
    }
    const float silu = kFast ? special::silu_fast(gate) : special::silu_precise(gate);
    return silu * up * weight;
}

// Eq. (5): the least e in [-126, 126] with 2^e >= fl(amax * fl(1/448)), read from the bits of that product; log2 would
// round.
__device__ __forceinline__ int scale_exponent(float amax) {
    const u32 scaled = __float_as_uint(amax * __uint_as_float(0x3B124925u));
    const int e = static_cast<int>(scaled >> 23 & 0xFF) - 127 + ((scaled & 0x7FFFFF) != 0 ? 1 : 0);
    return max(-126, min(126, e));
}

__device__ __forceinline__ float pow2(int e) { return __uint_as_float(static_cast<u32>(e + 127) << 23); }

// Computes Eq. (4) and (5) of kNumHalfTiles half tiles of 64 rows, which share a scale a row. A half tile is gate and
// up of 64 outputs. In the order in which weights.py stores weight rows, a thread holds 16 neighbouring outputs of two
// rows, with the gates in even groups of four registers and the ups in odd ones, and the four lanes of a quad hold the
// 64 outputs of a row.
//
//   row, first_half_tile     where the outputs stand: this thread's first row; the first 64 columns of the row's I / 64
//   l2_acts                  codes [num_rows][intermediate]
//   l2_acts_sf               scales [intermediate / (64 kNumHalfTiles)][num_rows]
template <bool kFast, bool kClamped, u32 kNumHalfTiles>
__device__ __forceinline__ void requantise_half_tiles(const float (*sum)[64], const float (&weight)[2], float clamp,
                                                      u8* l2_acts, float* l2_acts_sf, u64 row, u32 first_half_tile,
                                                      u64 num_rows, u32 intermediate) {
    const u32 lane_in_quad = threadIdx.x % 4;
#pragma unroll
    for (u32 row_half = 0; row_half < 2; ++row_half) {
        float v[kNumHalfTiles][16], amax = 0.0f;
#pragma unroll
        for (u32 i = 0; i < 16 * kNumHalfTiles; ++i) {
            const u32 half_idx = i / 16, gate = i % 16 / 2 * 8 + row_half * 2 + i % 2;
            const float value =
                activate<kFast, kClamped>(sum[half_idx][gate], sum[half_idx][gate + 4], weight[row_half], clamp);
            v[half_idx][i % 16] = value;
            amax = fmaxf(amax, fabsf(value));
        }
        amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 1));
        amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 2));
        const int e = scale_exponent(amax);
        const float factor = pow2(-e);
#pragma unroll
        for (u32 half_idx = 0; half_idx < kNumHalfTiles; ++half_idx) {
            u32 words[4];
#pragma unroll
            for (u32 w = 0; w < 4; ++w) {
                const float* four = v[half_idx] + 4 * w;
                const u32 low = ptx::cvt_e4m3x2(four[1] * factor, four[0] * factor);
                words[w] = low | static_cast<u32>(ptx::cvt_e4m3x2(four[3] * factor, four[2] * factor)) << 16;
            }
            *reinterpret_cast<uint4*>(l2_acts + (row + 8 * row_half) * intermediate +
                                      (first_half_tile + half_idx) * 64 + 16 * lane_in_quad) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
        if (lane_in_quad == 0) l2_acts_sf[first_half_tile / kNumHalfTiles * num_rows + row + 8 * row_half] = pow2(e);
    }
}

// Asks once for all outputs whether there is a clamp. Asked for each output it cost a move and a load beside every
// minimum.
template <bool kFast, u32 kNumHalfTiles>
__device__ __forceinline__ void requantise_tile(const float (*sum)[64], const float (&weight)[2], const Params& params,
                                                u8* l2_acts, float* l2_acts_sf, u64 row, u32 first_half_tile,
                                                u64 num_rows, u32 intermediate) {
    if (params.is_clamped)
        requantise_half_tiles<kFast, true, kNumHalfTiles>(sum, weight, params.clamp, l2_acts, l2_acts_sf, row,
                                                          first_half_tile, num_rows, intermediate);
    else
        requantise_half_tiles<kFast, false, kNumHalfTiles>(sum, weight, 0.0f, l2_acts, l2_acts_sf, row, first_half_tile,
                                                           num_rows, intermediate);
}

}  // namespace swiglu
