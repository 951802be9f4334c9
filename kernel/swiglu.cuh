// Eq. (4), (5): clamped SwiGLU times the routing weight, then re-quantisation to E4M3 with one power-of-two scale for 64
// or 128 columns. The same names as in reference/swiglu.py; every operation rounds on its own.
#pragma once
#include "special.cuh"

namespace swiglu {

struct Params {
    float clamp;    // c, where clamped
    u32 clamped;    // 0: no clamp, and NaN stays NaN
};

// Eq. (4). gate = min(gate, c) only; up = min(max(up, -c), c); fminf and fmaxf drop a NaN.
template <bool kFast, bool kClamped>
__device__ __forceinline__ float activate(float gate, float up, float weight, float clamp) {
    if (kClamped) {
        gate = fminf(gate, clamp);
        up = fminf(fmaxf(up, -clamp), clamp);
    }
    const float silu = kFast ? special::silu_fast(gate) : special::silu_precise(gate);
    return silu * up * weight;
}

// Eq. (5): the least e with 2^e >= fl(amax * fl(1/448)), in [-126, 126], read from the bits.
__device__ __forceinline__ int scale_exponent(float amax) {
    const u32 scaled = __float_as_uint(amax * __uint_as_float(0x3B124925u));
    const int e = static_cast<int>(scaled >> 23 & 0xFF) - 127 + ((scaled & 0x7FFFFF) != 0 ? 1 : 0);
    return max(-126, min(126, e));
}

__device__ __forceinline__ float pow2(int e) { return __uint_as_float(static_cast<u32>(e + 127) << 23); }

// kTurns turns of a math warpgroup after GEMM 1, which share a scale: each is 64 rows x 128 columns, that is gate and up of
// 64 outputs. In the order of kernel/tiles.py a thread holds 16 neighbouring outputs of two rows, their gates in even
// groups of four registers and their ups in odd ones; the four lanes of a quad hold the 64 of a row. `first`: the first
// turn of the row's I / 64, a multiple of kTurns. Codes go to l2_acts [rows][intermediate], the scale to l2_acts_sf
// [intermediate / (64 kTurns)][rows].
template <bool kFast, bool kClamped, u32 kTurns>
__device__ __forceinline__ void requantise_turns(const float (*sum)[64], const float (&weight)[2], float clamp, u8* l2_acts,
                                                 float* l2_acts_sf, u64 row, u32 first, u64 rows, u32 intermediate) {
    const u32 lane = threadIdx.x % 4;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float v[kTurns][16], amax = 0.0f;
#pragma unroll
        for (u32 i = 0; i < 16 * kTurns; ++i) {
            const u32 turn = i / 16, gate = i % 16 / 2 * 8 + half * 2 + i % 2;
            const float value = activate<kFast, kClamped>(sum[turn][gate], sum[turn][gate + 4], weight[half], clamp);
            v[turn][i % 16] = value;
            amax = fmaxf(amax, fabsf(value));
        }
        amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 1));
        amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 2));
        const int e = scale_exponent(amax);
        const float factor = pow2(-e);
#pragma unroll
        for (u32 turn = 0; turn < kTurns; ++turn) {
            u32 words[4];
#pragma unroll
            for (u32 w = 0; w < 4; ++w) {
                const float* four = v[turn] + 4 * w;
                const u32 low = ptx::cvt_e4m3x2(four[1] * factor, four[0] * factor);
                words[w] = low | static_cast<u32>(ptx::cvt_e4m3x2(four[3] * factor, four[2] * factor)) << 16;
            }
            *reinterpret_cast<uint4*>(l2_acts + (row + 8 * half) * intermediate + (first + turn) * 64 + 16 * lane) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
        if (lane == 0) l2_acts_sf[first / kTurns * rows + row + 8 * half] = pow2(e);
    }
}

// One question for all outputs, whether there is a clamp: asked for each, it costs a move and a load beside every minimum.
template <bool kFast, u32 kTurns>
__device__ __forceinline__ void requantise_tile(const float (*sum)[64], const float (&weight)[2], const Params& p, u8* l2_acts,
                                                float* l2_acts_sf, u64 row, u32 first, u64 rows, u32 intermediate) {
    if (p.clamped)
        requantise_turns<kFast, true, kTurns>(sum, weight, p.clamp, l2_acts, l2_acts_sf, row, first, rows, intermediate);
    else requantise_turns<kFast, false, kTurns>(sum, weight, 0.0f, l2_acts, l2_acts_sf, row, first, rows, intermediate);
}

}  // namespace swiglu
