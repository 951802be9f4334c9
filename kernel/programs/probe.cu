// Probes of single instructions: what does the chip compute? `python -m golden capture` captures their results; no
// production kernel uses them.
#include "../ptx.cuh"
#include "../special.cuh"

// ---- wgmma ----------------------------------------------------------------------------------------------------------

struct WgmmaParams {
    const u8* a_ptr;     // e4m3 [cases][64][32 * num_steps]
    const u8* b_ptr;     // e4m3 [cases][N][32 * num_steps]
    const float* c_ptr;  // [cases][64][N]; always loaded into the accumulators
    float* d_ptr;        // [cases][64][N]
    u32 num_steps;       // k32 steps of a chain, in ascending K
    u32 scale_d;         // 0: the first step must ignore the accumulators
};

// Copies a K-major byte matrix [num_rows][32 * num_steps] to shared memory: for each step a slab of num_rows * 32
// bytes, made of core matrices of 8 rows x 16 bytes. Neighbours along K are 128 bytes apart, neighbours along the rows
// 256.
__device__ __forceinline__ void load_core_matrices(u8* shared, const u8* global, u32 num_rows, u32 num_steps) {
    const u32 chunks_per_row = 2 * num_steps;
    for (u32 i = threadIdx.x; i < num_rows * chunks_per_row; i += blockDim.x) {
        const u32 row = i / chunks_per_row, chunk = i % chunks_per_row;
        u8* target = shared + (chunk / 2) * num_rows * 32 + (row / 8) * 256 + (chunk % 2) * 128 + (row % 8) * 16;
        *reinterpret_cast<uint4*>(target) = reinterpret_cast<const uint4*>(global)[i];
    }
}

// Computes kNumSteps steps from `first_step` on. They are in flight together, as the production kernel issues them. A
// comes from the slabs in shared memory, or the same bytes come from registers.
template <int kN, bool kAFromRegisters, int kNumSteps>
__device__ __forceinline__ void chain(float (&d)[kN / 2], const u8* fragment_a, u32 row_bytes, const u8* shared_a,
                                      const u8* shared_b, u32 first_step, bool scale_d) {
    u32 a[kNumSteps][4];
    if constexpr (kAFromRegisters) {
#pragma unroll
        for (u32 i = 0; i < 4 * kNumSteps; ++i) {
            const u32 offset = i % 2 * 8 * row_bytes + (first_step + i / 4) * 32 + i % 4 / 2 * 16;
            a[i / 4][i % 4] = *reinterpret_cast<const u32*>(fragment_a + offset);
            ptx::pin(a[i / 4][i % 4]);
        }
    }
    for (float& value : d) ptx::pin(value);
    ptx::wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < kNumSteps; ++i) {
        const u64 desc_b = ptx::descriptor_no_swizzle(shared_b + (first_step + i) * kN * 32, 128, 256);
        if constexpr (kAFromRegisters) ptx::wgmma_rs<kN>(d, a[i], desc_b, scale_d || i > 0);
        else
            ptx::wgmma_ss<kN>(d, ptx::descriptor_no_swizzle(shared_a + (first_step + i) * 64 * 32, 128, 256), desc_b,
                              scale_d || i > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (float& value : d) ptx::pin(value);
}

template <int kN, bool kAFromRegisters>
__device__ __forceinline__ void probe_wgmma(const WgmmaParams& params) {
    extern __shared__ __align__(128) u8 shared[];
    const u32 num_steps = params.num_steps, row_bytes = 32 * num_steps;
    u8* shared_a = shared;
    u8* shared_b = shared + 64 * row_bytes;
    const u8* a = params.a_ptr + static_cast<u64>(blockIdx.x) * 64 * row_bytes;
    load_core_matrices(shared_a, a, 64, num_steps);
    load_core_matrices(shared_b, params.b_ptr + static_cast<u64>(blockIdx.x) * kN * row_bytes, kN, num_steps);
    ptx::fence_proxy_async();
    __syncthreads();

    const u32 row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    const u8* fragment_a = a + row * row_bytes + 4 * quad;
    const u64 origin = static_cast<u64>(blockIdx.x) * 64 * kN + row * kN + 2 * quad;
    float d[kN / 2];
#pragma unroll
    for (u32 i = 0; i < kN / 2; ++i) d[i] = params.c_ptr[origin + i / 4 * 8 + i % 4 / 2 * 8 * kN + i % 2];

    u32 step = 0;
    for (; step + 4 <= num_steps; step += 4)
        chain<kN, kAFromRegisters, 4>(d, fragment_a, row_bytes, shared_a, shared_b, step,
                                      step > 0 || params.scale_d != 0);
    for (; step < num_steps; ++step)
        chain<kN, kAFromRegisters, 1>(d, fragment_a, row_bytes, shared_a, shared_b, step,
                                      step > 0 || params.scale_d != 0);

#pragma unroll
    for (u32 i = 0; i < kN / 2; ++i) params.d_ptr[origin + i / 4 * 8 + i % 4 / 2 * 8 * kN + i % 2] = d[i];
}

#define PROBE_WGMMA(N)                                                                                               \
    extern "C" __global__ void __launch_bounds__(128, 1) wgmma_ss_n##N(const __grid_constant__ WgmmaParams params) { \
        probe_wgmma<N, false>(params);                                                                               \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(128, 1) wgmma_rs_n##N(const __grid_constant__ WgmmaParams params) { \
        probe_wgmma<N, true>(params);                                                                                \
    }
PROBE_WGMMA(8)
PROBE_WGMMA(16)
PROBE_WGMMA(32)
PROBE_WGMMA(64)
PROBE_WGMMA(128)
PROBE_WGMMA(256)

// ---- elementwise ----------------------------------------------------------------------------------------------------

struct SweepParams {
    const u32* in_ptr;  // fp32 bits of the inputs; null: the bits are start, start + 1, ...
    void* out_ptr;      // [count], 32 or 16 bits each
    u32 start;
    u32 count;
};

// Defines the kernel sweep_NAME. EXPRESSION is a function of the input `x` or its bits `bits`; its value is stored as
// TYPE.
#define PROBE_SWEEP(NAME, TYPE, EXPRESSION)                                                                      \
    extern "C" __global__ void __launch_bounds__(256) sweep_##NAME(const __grid_constant__ SweepParams params) { \
        for (u32 i = blockIdx.x * 256 + threadIdx.x; i < params.count; i += gridDim.x * 256) {                   \
            const u32 bits = params.in_ptr ? params.in_ptr[i] : params.start + i;                                \
            const float x = __uint_as_float(bits);                                                               \
            static_cast<TYPE*>(params.out_ptr)[i] = EXPRESSION;                                                  \
        }                                                                                                        \
    }
PROBE_SWEEP(rcp, float, ptx::rcp_approx(x))
PROBE_SWEEP(ex2, float, ptx::ex2_approx(x))
PROBE_SWEEP(exp_steps, float, special::exp_steps(x))
PROBE_SWEEP(expf, float, expf(x))
PROBE_SWEEP(silu_fast, float, special::silu_fast(x))
PROBE_SWEEP(silu_precise, float, special::silu_precise(x))
PROBE_SWEEP(rcp_rn, float, ptx::rcp_rn(x))
// The low byte converts the complement of the bits, so that a sweep over all inputs takes both bytes through all of
// them.
PROBE_SWEEP(e4m3x2, u16, ptx::cvt_e4m3x2(x, __uint_as_float(~bits)))
PROBE_SWEEP(bf16, u16, ptx::cvt_bf16(x))

struct FmaParams {
    const float* a_ptr;  // [count], as all of them
    const float* b_ptr;
    const float* c_ptr;
    float* out_ptr;
    u32 count;
};

extern "C" __global__ void __launch_bounds__(256) probe_fma(const __grid_constant__ FmaParams params) {
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < params.count; i += gridDim.x * 256)
        params.out_ptr[i] = ptx::fma_rn(params.a_ptr[i], params.b_ptr[i], params.c_ptr[i]);
}
