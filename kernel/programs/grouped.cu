// The two grouped GEMMs of the layer with their epilogues, over a pool of rows sorted by expert: what the fused kernel
// does between dispatch and combine, so that it can be proven alone. A pool block is 128 rows of one expert; the rows
// beyond an expert's last one are padding. Warp 0 is the producer, two warpgroups multiply; thread blocks are
// persistent.
#include "../gemm.cuh"
#include "../registers.cuh"
#include "../swiglu.cuh"

using gemm::kBlockM, gemm::kBlockN, gemm::kHalfN;
constexpr u32 kNumThreads = 128 + 32 * gemm::kNumMathWarps;

struct GroupedParams {
    ptx::TensorMap a_map;     // e4m3 [num_rows, K]: L1 or L2 activations by pool row
    ptx::TensorMap b_map;     // e4m3 [E * N, K]: interleaved W1, or W2
    const float* a_sf_ptr;    // [K / scale block][num_rows]
    const float* b_sf_ptr;    // [E][N / 128][K / 128]
    const int* block_expert;  // [num_rows / 128]: local expert of each pool block
    const float* weight_ptr;  // [num_rows]: routing weights (GEMM 1)
    u8* l2_acts_ptr;          // e4m3 [num_rows][N / 2] (GEMM 1)
    float* l2_acts_sf_ptr;    // [N / 128][num_rows] (GEMM 1)
    u16* out_ptr;             // bf16 [num_rows][N] (GEMM 2)
    u32 num_rows, n, k;
    swiglu::Params swiglu;
};

static_assert(sizeof(gemm::Pipeline) == SHARED_BYTES);

__device__ __forceinline__ u32 num_tile_columns(const GroupedParams& params) {
    return (params.n + kBlockN - 1) / kBlockN;
}

// The tiles of one pool block follow each other, so that its rows stay in the L2 cache while the expert's weights
// stream through.
template <u32 kScaleK>
__device__ __forceinline__ void produce(const GroupedParams& params, gemm::Pipeline& pipeline) {
    constexpr u32 kNumScales = gemm::kBlockK / kScaleK;
    const u32 num_tiles = params.num_rows / kBlockM * num_tile_columns(params), num_k_blocks = params.k / gemm::kBlockK;
    gemm::PipelineState state;
    for (u32 tile_idx = blockIdx.x; tile_idx < num_tiles; tile_idx += gridDim.x) {
        const u32 pool_block_idx = tile_idx / num_tile_columns(params);
        const u32 row = pool_block_idx * kBlockM, expert_idx = params.block_expert[pool_block_idx];
        const u32 column = tile_idx % num_tile_columns(params) * kBlockN, num_columns = min(kBlockN, params.n - column);
        for (u32 k_block_idx = 0; k_block_idx < num_k_blocks; ++k_block_idx, state.advance()) {
            gemm::Stage& stage = pipeline.stages[state.stage_idx];
            u64* full_barrier = &pipeline.full_barriers[state.stage_idx];
            gemm::wait(&pipeline.empty_barriers[state.stage_idx], state.parity ^ 1);
            ptx::mbarrier_arrive_expect(full_barrier,
                                        (kBlockM + num_columns) * gemm::kBlockK + kNumScales * kBlockM * 4);
            ptx::tma_load_2d(stage.a, params.a_map, full_barrier, k_block_idx * gemm::kBlockK, row);
            for (u32 c = 0; c < num_columns; c += kHalfN)
                ptx::tma_load_2d(stage.b[c], params.b_map, full_barrier, k_block_idx * gemm::kBlockK,
                                 expert_idx * params.n + column + c);
            for (u32 scale_idx = 0; scale_idx < kNumScales; ++scale_idx)
                ptx::bulk_load(
                    stage.a_sf[scale_idx],
                    params.a_sf_ptr + static_cast<u64>(k_block_idx * kNumScales + scale_idx) * params.num_rows + row,
                    kBlockM * 4, full_barrier);
        }
    }
}

// Computes the sums of this thread in one tile. A tile of interleaved W1 has two scales at each K block, one for its
// gate rows and one for its up rows; a tile of W2 has one for each half tile.
template <u32 kScaleK, bool kInterleaved>
__device__ __forceinline__ void multiply(const GroupedParams& params, gemm::Pipeline& pipeline,
                                         gemm::PipelineState& state, const gemm::Share& share,
                                         float (&sum)[2][gemm::kNumSums], u32 expert_idx, u32 column) {
    const u32 num_sf_rows = params.n / kHalfN, num_k_blocks = params.k / gemm::kBlockK;
    const float* b_sf_ptr =
        params.b_sf_ptr +
        static_cast<u64>(expert_idx * num_sf_rows + (kInterleaved ? column / kBlockN : column / kHalfN)) * num_k_blocks;
    const u32 second = (kInterleaved ? num_sf_rows / 2 : share.num_half_tiles - 1) * num_k_blocks;
    gemm::multiply<kInterleaved, kScaleK>(
        sum, pipeline, state, share, num_k_blocks,
        [](u64* full_barrier, u32 parity) { return gemm::wait(full_barrier, parity), true; },
        [&](float (&b_sf)[2], u32 k_block_idx) {
            b_sf[0] = __ldg(b_sf_ptr + k_block_idx), b_sf[1] = __ldg(b_sf_ptr + second + k_block_idx);
        });
}

template <u32 kScaleK, typename Epilogue>
__device__ __forceinline__ void grouped(const GroupedParams& params, Epilogue epilogue) {
    DYNAMIC_SHARED_MEMORY(shared);
    auto& pipeline = *reinterpret_cast<gemm::Pipeline*>(shared);
    if (threadIdx.x == 0) {
        pipeline.init();
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        ptx::fewer_registers<registers::kGemmProducer>();
        if (threadIdx.x < 32 && ptx::elect_one()) produce<kScaleK>(params, pipeline);
    } else {
        ptx::more_registers<registers::kGemmMath>();
        const u32 num_tiles = params.num_rows / kBlockM * num_tile_columns(params);
        gemm::PipelineState state;
        float sum[2][gemm::kNumSums];
        for (u32 tile_idx = blockIdx.x; tile_idx < num_tiles; tile_idx += gridDim.x) {
            const u32 pool_block_idx = tile_idx / num_tile_columns(params);
            const u32 column = tile_idx % num_tile_columns(params) * kBlockN;
            const gemm::Share share =
                gemm::share_of(gemm::math_warpgroup_idx(), kBlockM, min(kBlockN, params.n - column));
            multiply<kScaleK, kScaleK == 128>(params, pipeline, state, share, sum, params.block_expert[pool_block_idx],
                                              column);
            const u64 row = static_cast<u64>(pool_block_idx) * kBlockM + share.first_row + gemm::row_of_64();
#pragma unroll
            for (u32 half_idx = 0; half_idx < 2; ++half_idx)
                if (half_idx < share.num_half_tiles) epilogue(sum + half_idx, row, column + half_idx * kHalfN);
        }
    }
}

// Eq. (2) to (5).
template <bool kFast>
__device__ __forceinline__ void gemm1(const GroupedParams& params) {
    grouped<128>(params, [&](const float (*sum)[gemm::kNumSums], u64 row, u32 column) {
        const float weight[2] = {params.weight_ptr[row], params.weight_ptr[row + 8]};
        swiglu::requantise_tile<kFast, 1>(sum, weight, params.swiglu, params.l2_acts_ptr, params.l2_acts_sf_ptr, row,
                                          column / kHalfN, params.num_rows, params.n / 2);
    });
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1)
    grouped_l1_fast(const __grid_constant__ GroupedParams params) {
    gemm1<true>(params);
}
extern "C" __global__ void __launch_bounds__(kNumThreads, 1)
    grouped_l1_precise(const __grid_constant__ GroupedParams params) {
    gemm1<false>(params);
}

// Eq. (6), (7).
extern "C" __global__ void __launch_bounds__(kNumThreads, 1) grouped_l2(const __grid_constant__ GroupedParams params) {
    grouped<64>(params, [&](const float (*half_tile)[gemm::kNumSums], u64 row, u32 column) {
        const float (&sum)[gemm::kNumSums] = *half_tile;
        u16* out_ptr = params.out_ptr + row * params.n + column + threadIdx.x % 4 * 2;
#pragma unroll
        for (u32 i = 0; i < gemm::kNumSums; i += 2) {
            const u32 pair = ptx::cvt_bf16(sum[i]) | static_cast<u32>(ptx::cvt_bf16(sum[i + 1])) << 16;
            *reinterpret_cast<u32*>(out_ptr + static_cast<u64>(i / 2 % 2 * 8) * params.n + i / 4 * 8) = pair;
        }
    });
}
