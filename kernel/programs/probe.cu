// One-instruction probes: what does the chip compute? Captured by golden/capture.py, never part of the production kernel.
#include "../ptx.cuh"
#include "../special.cuh"

// ---- wgmma ----------------------------------------------------------------------------------------------------------

struct WgmmaParams {
    const u8* a;        // [cases][64][32 * steps]
    const u8* b;        // [cases][N][32 * steps]
    const float* c;     // [cases][64][N], loaded into the accumulators always
    float* d;           // [cases][64][N]
    u32 steps;          // k32 steps of a chain, K ascending
    u32 scale_d;        // 0: the first step must ignore the accumulators
};

// Copies a K-major [rows][32 * steps] byte matrix to shared memory, a slab of rows * 32 bytes a step: core matrices of
// 8 rows x 16 bytes, K neighbours 128 bytes apart, row neighbours 256.
__device__ __forceinline__ void load_core_matrices(u8* shared, const u8* global, u32 rows, u32 steps) {
    const u32 chunks_per_row = 2 * steps;
    for (u32 i = threadIdx.x; i < rows * chunks_per_row; i += blockDim.x) {
        const u32 row = i / chunks_per_row, chunk = i % chunks_per_row;
        u8* target = shared + (chunk / 2) * rows * 32 + (row / 8) * 256 + (chunk % 2) * 128 + (row % 8) * 16;
        *reinterpret_cast<uint4*>(target) = reinterpret_cast<const uint4*>(global)[i];
    }
}

// kSteps steps from step s on, in flight together as the production kernel issues them. A from the slabs of shared memory,
// or the same bytes from registers.
template <int kN, bool kAFromRegisters, int kSteps>
__device__ __forceinline__ void chain(float (&d)[kN / 2], const u8* fragment_a, u32 row_bytes, const u8* shared_a, const u8* shared_b, u32 s, bool scale_d) {
    u32 a[kSteps][4];
    if constexpr (kAFromRegisters) {
#pragma unroll
        for (u32 i = 0; i < 4 * kSteps; ++i) {
            const u32 offset = i % 2 * 8 * row_bytes + (s + i / 4) * 32 + i % 4 / 2 * 16;
            a[i / 4][i % 4] = *reinterpret_cast<const u32*>(fragment_a + offset);
            ptx::pin(a[i / 4][i % 4]);
        }
    }
    for (float& value : d) ptx::pin(value);
    ptx::wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < kSteps; ++i) {
        const u64 desc_b = ptx::descriptor_no_swizzle(shared_b + (s + i) * kN * 32, 128, 256);
        if constexpr (kAFromRegisters)
            ptx::wgmma_rs<kN>(d, a[i], desc_b, scale_d || i > 0);
        else
            ptx::wgmma_ss<kN>(d, ptx::descriptor_no_swizzle(shared_a + (s + i) * 64 * 32, 128, 256), desc_b, scale_d || i > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (float& value : d) ptx::pin(value);
}

template <int kN, bool kAFromRegisters>
__device__ __forceinline__ void probe_wgmma(const WgmmaParams& params) {
    extern __shared__ __align__(128) u8 shared[];
    const u32 steps = params.steps, row_bytes = 32 * steps;
    u8* shared_a = shared;
    u8* shared_b = shared + 64 * row_bytes;
    const u8* a = params.a + static_cast<u64>(blockIdx.x) * 64 * row_bytes;
    load_core_matrices(shared_a, a, 64, steps);
    load_core_matrices(shared_b, params.b + static_cast<u64>(blockIdx.x) * kN * row_bytes, kN, steps);
    ptx::fence_proxy_async();
    __syncthreads();

    const u32 row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    const u8* fragment_a = a + row * row_bytes + 4 * quad;
    const u64 origin = static_cast<u64>(blockIdx.x) * 64 * kN + row * kN + 2 * quad;
    float d[kN / 2];
#pragma unroll
    for (u32 i = 0; i < kN / 2; ++i) d[i] = params.c[origin + i / 4 * 8 + i % 4 / 2 * 8 * kN + i % 2];

    u32 s = 0;
    for (; s + 4 <= steps; s += 4)
        chain<kN, kAFromRegisters, 4>(d, fragment_a, row_bytes, shared_a, shared_b, s, s > 0 || params.scale_d != 0);
    for (; s < steps; ++s)
        chain<kN, kAFromRegisters, 1>(d, fragment_a, row_bytes, shared_a, shared_b, s, s > 0 || params.scale_d != 0);

#pragma unroll
    for (u32 i = 0; i < kN / 2; ++i) params.d[origin + i / 4 * 8 + i % 4 / 2 * 8 * kN + i % 2] = d[i];
}

#define PROBE_WGMMA(N)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128, 1) wgmma_ss_n##N(const __grid_constant__ WgmmaParams params) { \
        probe_wgmma<N, false>(params);                                                                             \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(128, 1) wgmma_rs_n##N(const __grid_constant__ WgmmaParams params) { \
        probe_wgmma<N, true>(params);                                                                              \
    }
PROBE_WGMMA(8)
PROBE_WGMMA(16)
PROBE_WGMMA(32)
PROBE_WGMMA(64)
PROBE_WGMMA(128)
PROBE_WGMMA(256)

// ---- elementwise ----------------------------------------------------------------------------------------------------

struct SweepParams {
    const u32* in;  // fp32 bits of the inputs, or null: the bits are start, start + 1, ...
    void* out;      // [count], 32 or 16 bits each
    u32 start;
    u32 count;
};

// One kernel a function: `x` is the input, `bits` its bits; the expression's value is stored as TYPE.
#define PROBE_SWEEP(NAME, TYPE, EXPRESSION)                                                                      \
    extern "C" __global__ void __launch_bounds__(256) sweep_##NAME(const __grid_constant__ SweepParams params) { \
        for (u32 i = blockIdx.x * 256 + threadIdx.x; i < params.count; i += gridDim.x * 256) {                   \
            const u32 bits = params.in ? params.in[i] : params.start + i;                                        \
            const float x = __uint_as_float(bits);                                                               \
            static_cast<TYPE*>(params.out)[i] = EXPRESSION;                                                      \
        }                                                                                                        \
    }
PROBE_SWEEP(rcp, float, ptx::rcp_approx(x))
PROBE_SWEEP(ex2, float, ptx::ex2_approx(x))
PROBE_SWEEP(exp_steps, float, special::exp_steps(x))
PROBE_SWEEP(expf, float, expf(x))
PROBE_SWEEP(silu_fast, float, special::silu_fast(x))
PROBE_SWEEP(silu_precise, float, special::silu_precise(x))
PROBE_SWEEP(rcp_rn, float, ptx::rcp_rn(x))
// The second lane takes the complement of the bits, so that a sweep takes each lane through every input.
PROBE_SWEEP(e4m3x2, u16, ptx::cvt_e4m3x2(x, __uint_as_float(~bits)))
PROBE_SWEEP(bf16, u16, ptx::cvt_bf16(x))

struct FmaParams {
    const float* a;  // [count], as b, c and out
    const float* b;
    const float* c;
    float* out;
    u32 count;
};

extern "C" __global__ void __launch_bounds__(256) probe_fma(const __grid_constant__ FmaParams params) {
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < params.count; i += gridDim.x * 256)
        params.out[i] = ptx::fma_rn(params.a[i], params.b[i], params.c[i]);
}
