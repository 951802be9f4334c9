// A dense promoted GEMM: the main loop of gemm.cuh alone, so that it can be proven and measured before the layer uses it.
#include "../gemm.cuh"

struct DenseParams {
    ptx::TensorMap a;  // e4m3 [M, K], boxes of 128 x 128, 128-byte swizzle
    ptx::TensorMap b;  // e4m3 [N, K], the same
    const float* a_sf;  // [K / group][M]
    const float* b_sf;  // [N / 128][K / 128]
    float* d;           // [M, N]
    u32 m, n, k;        // m, n multiples of 128, k of 128
};

using gemm::kBlockM, gemm::kBlockN, gemm::kTurnN;
constexpr u32 kThreads = 128 + 32 * gemm::kMathWarps;
constexpr u32 kTileColumns = 8;  // tiles of N that are worked on together, so that their operands stay in L2

__device__ __forceinline__ u32 tile_columns(const DenseParams& p) { return (p.n + kBlockN - 1) / kBlockN; }

// Which tile: columns of kTileColumns tiles, top to bottom.
__device__ __forceinline__ void tile_place(const DenseParams& p, u32 tile, u32& row, u32& column) {
    const u32 rows = p.m / kBlockM, band = kTileColumns * rows, first = tile / band * kTileColumns;
    const u32 width = min(kTileColumns, tile_columns(p) - first), inside = tile % band;
    row = inside / width * kBlockM;
    column = (first + inside % width) * kBlockN;
}

static_assert(sizeof(gemm::Ring) == SHARED_BYTES);

template <u32 kGroup>
__device__ __forceinline__ void dense(const DenseParams& p) {
    extern __shared__ __align__(1024) u8 shared[];
    auto& ring = *reinterpret_cast<gemm::Ring*>(shared);
    const u32 tiles = (p.m / kBlockM) * tile_columns(p), blocks = p.k / gemm::kBlockK;
    if (threadIdx.x == 0) {
        ring.init();
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    gemm::Place place;
    if (threadIdx.x < 128) {  // the producer
        ptx::fewer_registers<40>();
        if (threadIdx.x < 32 && ptx::elect_one()) {
            constexpr u32 kGroups = gemm::kBlockK / kGroup;
            for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                u32 row, column;
                tile_place(p, tile, row, column);
                const u32 columns = min(kBlockN, p.n - column);
                for (u32 b = 0; b < blocks; ++b, place.advance()) {
                    gemm::Stage& stage = ring.stages[place.index];
                    u64* full = &ring.full[place.index];
                    gemm::wait(&ring.empty[place.index], place.parity ^ 1);
                    ptx::mbarrier_arrive_expect(full, (kBlockM + columns) * gemm::kBlockK + kGroups * kBlockM * 4);
                    ptx::tma_load_2d(stage.a, p.a, full, b * gemm::kBlockK, row);
                    for (u32 c = 0; c < columns; c += kTurnN)
                        ptx::tma_load_2d(stage.b[c], p.b, full, b * gemm::kBlockK, column + c);
                    for (u32 g = 0; g < kGroups; ++g)
                        ptx::bulk_load(stage.a_sf[g], p.a_sf + static_cast<u64>(b * kGroups + g) * p.m + row, kBlockM * 4, full);
                }
            }
        }
    } else {
        ptx::more_registers<232>();
        float sum[2][gemm::kSums];
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            u32 tile_row, tile_column;
            tile_place(p, tile, tile_row, tile_column);
            const gemm::Share share = gemm::share_of(gemm::math_warpgroup(), kBlockM, min(kBlockN, p.n - tile_column));
            const float* b_sf = p.b_sf + static_cast<u64>(tile_column / 128) * blocks;
            const u32 second = share.turns == 2 ? blocks : 0;
            gemm::multiply<false, kGroup>(
                sum, ring, place, share, blocks, [](u64* full, u32 parity) { return gemm::wait(full, parity), true; },
                [&](float (&w_sf)[2], u32 b) { w_sf[0] = __ldg(b_sf + b), w_sf[1] = __ldg(b_sf + second + b); });
            // A pair of floats is stored from an even register and the next, as accumulators stand in. Sums that stood so too
            // would be read from the same bank as their accumulators: 2 % in the main loop.
#pragma unroll
            for (u32 turn = 0; turn < 2; ++turn) {
                if (turn >= share.turns) break;
                float* d = p.d + static_cast<u64>(tile_row + share.first_row + gemm::row_of_64()) * p.n + tile_column +
                           turn * kTurnN + threadIdx.x % 4 * 2;
#pragma unroll
                for (u32 i = 0; i < gemm::kSums; i += 2) {
                    float2* target = reinterpret_cast<float2*>(d + static_cast<u64>(i / 2 % 2 * 8) * p.n + i / 4 * 8);
                    *target = make_float2(ptx::in_any_register(sum[turn][i]), ptx::in_any_register(sum[turn][i + 1]));
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) dense_128(const __grid_constant__ DenseParams p) { dense<128>(p); }
extern "C" __global__ void __launch_bounds__(kThreads, 1) dense_64(const __grid_constant__ DenseParams p) { dense<64>(p); }
