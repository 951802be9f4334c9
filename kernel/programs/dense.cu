// A dense promoted GEMM: the main loop of gemm.cuh alone, so that it can be proven and measured apart from the layer. D
// = A B^T with scales. Warp 0 is the producer, two warpgroups multiply; thread blocks are persistent.
#include "../gemm.cuh"
#include "../registers.cuh"

struct DenseParams {
    ptx::TensorMap a_map;   // e4m3 [M, K], boxes of 128 x 128 in the 128-byte swizzle
    ptx::TensorMap b_map;   // e4m3 [N, K], the same boxes
    const float* a_sf_ptr;  // [K / scale block][M]
    const float* b_sf_ptr;  // [N / 128][K / 128]
    float* d_ptr;           // [M, N]
    u32 m, n, k;            // multiples of 128
};

using gemm::kBlockM, gemm::kBlockN, gemm::kHalfN;
constexpr u32 kNumThreads = 128 + 32 * gemm::kNumMathWarps;
constexpr u32 kBandColumns = 8;  // tile columns of a band: few enough that its operands stay in the L2 cache

__device__ __forceinline__ u32 num_tile_columns(const DenseParams& params) {
    return (params.n + kBlockN - 1) / kBlockN;
}

// The place of tile number `tile_idx`: in bands of kBandColumns tile columns, each from top to bottom.
__device__ __forceinline__ void tile_place(const DenseParams& params, u32 tile_idx, u32& row, u32& column) {
    const u32 num_tile_rows = params.m / kBlockM, band_tiles = kBandColumns * num_tile_rows;
    const u32 first_column = tile_idx / band_tiles * kBandColumns;
    const u32 width = min(kBandColumns, num_tile_columns(params) - first_column), inside = tile_idx % band_tiles;
    row = inside / width * kBlockM;
    column = (first_column + inside % width) * kBlockN;
}

static_assert(sizeof(gemm::Pipeline) == SHARED_BYTES);

template <u32 kScaleK>
__device__ __forceinline__ void produce(const DenseParams& params, gemm::Pipeline& pipeline, u32 num_tiles,
                                        u32 num_k_blocks) {
    constexpr u32 kNumScales = gemm::kBlockK / kScaleK;
    gemm::PipelineState state;
    for (u32 tile_idx = blockIdx.x; tile_idx < num_tiles; tile_idx += gridDim.x) {
        u32 row, column;
        tile_place(params, tile_idx, row, column);
        const u32 num_columns = min(kBlockN, params.n - column);
        for (u32 k_block_idx = 0; k_block_idx < num_k_blocks; ++k_block_idx, state.advance()) {
            gemm::Stage& stage = pipeline.stages[state.stage_idx];
            u64* full_barrier = &pipeline.full_barriers[state.stage_idx];
            gemm::wait(&pipeline.empty_barriers[state.stage_idx], state.parity ^ 1);
            ptx::mbarrier_arrive_expect(full_barrier,
                                        (kBlockM + num_columns) * gemm::kBlockK + kNumScales * kBlockM * 4);
            ptx::tma_load_2d(stage.a, params.a_map, full_barrier, k_block_idx * gemm::kBlockK, row);
            for (u32 c = 0; c < num_columns; c += kHalfN)
                ptx::tma_load_2d(stage.b[c], params.b_map, full_barrier, k_block_idx * gemm::kBlockK, column + c);
            for (u32 scale_idx = 0; scale_idx < kNumScales; ++scale_idx)
                ptx::bulk_load(
                    stage.a_sf[scale_idx],
                    params.a_sf_ptr + static_cast<u64>(k_block_idx * kNumScales + scale_idx) * params.m + row,
                    kBlockM * 4, full_barrier);
        }
    }
}

// Stores this thread's two rows of a half tile. A pair of floats is stored from an even register and the next one,
// which is the order of the accumulators. If the sums were in that order too, fmas would read them from the same
// register bank as their accumulators: that cost 2 % in the main loop. Hence the detour through any register.
__device__ __forceinline__ void store(const DenseParams& params, float* d_ptr, const float (&sum)[gemm::kNumSums]) {
#pragma unroll
    for (u32 i = 0; i < gemm::kNumSums; i += 2) {
        float2* target = reinterpret_cast<float2*>(d_ptr + static_cast<u64>(i / 2 % 2 * 8) * params.n + i / 4 * 8);
        *target = make_float2(ptx::in_any_register(sum[i]), ptx::in_any_register(sum[i + 1]));
    }
}

template <u32 kScaleK>
__device__ __forceinline__ void multiply(const DenseParams& params, gemm::Pipeline& pipeline, u32 num_tiles,
                                         u32 num_k_blocks) {
    gemm::PipelineState state;
    float sum[2][gemm::kNumSums];
    for (u32 tile_idx = blockIdx.x; tile_idx < num_tiles; tile_idx += gridDim.x) {
        u32 tile_row, tile_column;
        tile_place(params, tile_idx, tile_row, tile_column);
        const gemm::Share share =
            gemm::share_of(gemm::math_warpgroup_idx(), kBlockM, min(kBlockN, params.n - tile_column));
        const float* b_sf_ptr = params.b_sf_ptr + static_cast<u64>(tile_column / 128) * num_k_blocks;
        const u32 second = share.num_half_tiles == 2 ? num_k_blocks : 0;
        gemm::multiply<false, kScaleK>(
            sum, pipeline, state, share, num_k_blocks,
            [](u64* full_barrier, u32 parity) { return gemm::wait(full_barrier, parity), true; },
            [&](float (&b_sf)[2], u32 k_block_idx) {
                b_sf[0] = __ldg(b_sf_ptr + k_block_idx), b_sf[1] = __ldg(b_sf_ptr + second + k_block_idx);
            });
#pragma unroll
        for (u32 half_idx = 0; half_idx < 2; ++half_idx) {
            if (half_idx >= share.num_half_tiles) break;
            float* d_ptr = params.d_ptr + static_cast<u64>(tile_row + share.first_row + gemm::row_of_64()) * params.n +
                           tile_column + half_idx * kHalfN + threadIdx.x % 4 * 2;
            store(params, d_ptr, sum[half_idx]);
        }
    }
}

template <u32 kScaleK>
__device__ __forceinline__ void dense(const DenseParams& params) {
    DYNAMIC_SHARED_MEMORY(shared);
    auto& pipeline = *reinterpret_cast<gemm::Pipeline*>(shared);
    const u32 num_tiles = (params.m / kBlockM) * num_tile_columns(params), num_k_blocks = params.k / gemm::kBlockK;
    if (threadIdx.x == 0) {
        pipeline.init();
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        ptx::fewer_registers<registers::kGemmProducer>();
        if (threadIdx.x < 32 && ptx::elect_one()) produce<kScaleK>(params, pipeline, num_tiles, num_k_blocks);
    } else {
        ptx::more_registers<registers::kGemmMath>();
        multiply<kScaleK>(params, pipeline, num_tiles, num_k_blocks);
    }
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) dense_128(const __grid_constant__ DenseParams params) {
    dense<128>(params);
}
extern "C" __global__ void __launch_bounds__(kNumThreads, 1) dense_64(const __grid_constant__ DenseParams params) {
    dense<64>(params);
}
