// exp and silu, written out step by step so that no toolkit can change a bit. The build turns contraction off
// (--fmad=false): each fma below is written as one, and every other operation rounds on its own. Predicted by
// quant/atoms.py: expf, silu.
#pragma once
#include "ptx.cuh"

namespace special {

constexpr float kLog2E = 0x1.715476p+0f;

// The steps of expf in libdevice of CUDA 13.0 without fast math; subnormal results are kept.
__device__ __forceinline__ float exp_steps(float x) {
    const float t = ptx::fma_rn_sat(x, __uint_as_float(0x3BBB989D), 0.5f);  // x * log2(e) / 252 + 1/2; NaN gives 0
    const float j = ptx::fma_rm(t, 252.0f, 12582913.0f);
    const float n = j - 12583039.0f;  // floor(252 t) - 126
    float f = ptx::fma_rn(x, kLog2E, -n);
    f = ptx::fma_rn(x, __uint_as_float(0x32A57060), f);  // the bits of log2(e) that do not fit into kLog2E
    return ptx::ex2_approx(f) * __uint_as_float(__float_as_uint(j) << 23);
}

__device__ __forceinline__ float silu_fast(float x) { return x * ptx::rcp_approx(1.0f + ptx::ex2_approx(-x * kLog2E)); }

__device__ __forceinline__ float silu_precise(float x) { return x * ptx::rcp_rn(1.0f + exp_steps(-x)); }

}  // namespace special
