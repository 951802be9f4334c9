// A dense promoted GEMM: the main loop of gemm.cuh alone, so that it can be proven and measured before the layer uses it.
#include "gemm.cuh"

struct DenseParams {
    ptx::TensorMap a;  // e4m3 [M, K], box 128 x 128, 128-byte swizzle
    ptx::TensorMap b;  // e4m3 [N, K], the same
    const float* a_sf;  // [K / group][M]
    const float* b_sf;  // [N / 128][K / 128]
    float* d;           // [M, N]
    u32 m, n, k;        // m, n multiples of 128, k of 128
};

constexpr u32 kBlockM = 128, kBlockN = 128, kMathWarps = 8, kStages = 6;
constexpr u32 kThreads = 128 + 32 * kMathWarps;
constexpr u32 kTileColumns = 8;  // tiles of N that are worked on together, so that their operands stay in L2

template <u32 kGroup>
struct DenseStorage {
    gemm::Stage<kBlockM, kBlockN, kGroup> stages[kStages];
    u64 full[kStages], empty[kStages];
};

// Which tile: columns of kTileColumns tiles, top to bottom.
__device__ __forceinline__ void tile_place(const DenseParams& p, u32 tile, u32& row, u32& column) {
    const u32 rows = p.m / kBlockM, band = kTileColumns * rows, first = tile / band * kTileColumns;
    const u32 width = min(kTileColumns, p.n / kBlockN - first), inside = tile % band;
    row = inside / width * kBlockM;
    column = (first + inside % width) * kBlockN;
}

static_assert(sizeof(DenseStorage<128>) == SHARED_BYTES_128 && sizeof(DenseStorage<64>) == SHARED_BYTES_64);

template <u32 kGroup>
__device__ __forceinline__ void dense(const DenseParams& p) {
    extern __shared__ __align__(1024) u8 shared[];
    auto& s = *reinterpret_cast<DenseStorage<kGroup>*>(shared);
    const u32 tiles = (p.m / kBlockM) * (p.n / kBlockN), blocks = p.k / gemm::kBlockK;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < kStages; ++i) ptx::mbarrier_init(&s.full[i], 1), ptx::mbarrier_init(&s.empty[i], kMathWarps);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    gemm::Place<kStages> place;
    if (threadIdx.x < 128) {  // the producer
        ptx::fewer_registers<40>();
        if (threadIdx.x == 0) {
            for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                u32 row, column;
                tile_place(p, tile, row, column);
                for (u32 b = 0; b < blocks; ++b, place.advance()) {
                    auto& stage = s.stages[place.index];
                    u64* full = &s.full[place.index];
                    gemm::wait(&s.empty[place.index], place.parity ^ 1);
                    ptx::mbarrier_arrive_expect(full, stage.kBytes);
                    ptx::tma_load_2d(stage.a, p.a, full, b * gemm::kBlockK, row);
                    ptx::tma_load_2d(stage.b, p.b, full, b * gemm::kBlockK, column);
                    for (u32 g = 0; g < stage.kGroups; ++g)
                        ptx::bulk_load(stage.a_sf[g], p.a_sf + static_cast<u64>(b * stage.kGroups + g) * p.m + row, kBlockM * 4, full);
                }
            }
        }
    } else {
        ptx::more_registers<232>();
        const u32 first_row = (threadIdx.x / 128 - 1) * 64, row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            u32 tile_row, tile_column;
            tile_place(p, tile, tile_row, tile_column);
            const float* b_sf = p.b_sf + static_cast<u64>(tile_column / 128) * blocks;
            float sum[kBlockN / 2], acc[gemm::kBlockK / kGroup][kBlockN / 2];
            gemm::define<gemm::kBlockK / kGroup, kBlockN>(acc);
#pragma unroll
            for (float& value : sum) value = 0.0f;
            for (u32 b = 0; b < blocks; ++b, place.advance()) {
                const float scale = __ldg(b_sf + b), w_sf[2] = {scale, scale};
                gemm::wait(&s.full[place.index], place.parity);
                gemm::multiply_stage(sum, acc, s.stages[place.index], &s.empty[place.index], first_row, row, w_sf);
            }
            float* d = p.d + static_cast<u64>(tile_row + first_row + row) * p.n + tile_column + threadIdx.x % 4 * 2;
#pragma unroll
            for (u32 i = 0; i < kBlockN / 2; i += 2) {
                float2* target = reinterpret_cast<float2*>(d + static_cast<u64>(i / 2 % 2 * 8) * p.n + i / 4 * 8);
                *target = make_float2(sum[i], sum[i + 1]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) dense_128(const __grid_constant__ DenseParams p) { dense<128>(p); }
extern "C" __global__ void __launch_bounds__(kThreads, 1) dense_64(const __grid_constant__ DenseParams p) { dense<64>(p); }
