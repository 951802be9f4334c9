// The two grouped GEMMs of the layer with their epilogues, over a pool of rows sorted by expert: what the fused kernel does
// between dispatch and combine, provable alone. A pool block is 128 rows of one expert; rows beyond an expert's are padding.
#include "gemm.cuh"
#include "swiglu.cuh"

constexpr u32 kBlockM = 128, kBlockN = 128, kMathWarps = 8, kStages = 6;
constexpr u32 kThreads = 128 + 32 * kMathWarps;

struct GroupedParams {
    ptx::TensorMap a;          // pool rows [rows, K]: L1 or L2 activations
    ptx::TensorMap b;          // [experts * N, K]: interleaved W1, or W2
    const float* a_sf;         // [K / group][rows]
    const float* b_sf;         // [experts][N / 128][K / 128]
    const int* block_expert;   // [rows / 128]: local expert of each pool block
    const float* weight;       // [rows]: routing weight (L1)
    u8* l2_acts;               // [rows][N / 2] (L1)
    float* l2_acts_sf;         // [N / 128][rows] (L1)
    u16* out;                  // [rows][N] BF16 (L2)
    u32 rows, n, k;
    swiglu::Params swiglu;
};

template <u32 kGroup>
struct GroupedStorage {
    gemm::Stage<kBlockM, kBlockN, kGroup> stages[kStages];
    u64 full[kStages], empty[kStages];
};

static_assert(sizeof(GroupedStorage<128>) == SHARED_BYTES && sizeof(GroupedStorage<64>) == SHARED_BYTES);

// Tiles of one pool block follow each other, so that its rows stay in L2 while the expert's weights stream through.
template <u32 kGroup>
__device__ __forceinline__ void produce(const GroupedParams& p, GroupedStorage<kGroup>& s) {
    const u32 columns = p.n / kBlockN, tiles = p.rows / kBlockM * columns, blocks = p.k / gemm::kBlockK;
    gemm::Place<kStages> place;
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const u32 row = tile / columns * kBlockM, expert = p.block_expert[tile / columns];
        for (u32 b = 0; b < blocks; ++b, place.advance()) {
            auto& stage = s.stages[place.index];
            u64* full = &s.full[place.index];
            gemm::wait(&s.empty[place.index], place.parity ^ 1);
            ptx::mbarrier_arrive_expect(full, stage.kBytes);
            ptx::tma_load_2d(stage.a, p.a, full, b * gemm::kBlockK, row);
            ptx::tma_load_2d(stage.b, p.b, full, b * gemm::kBlockK, expert * p.n + tile % columns * kBlockN);
            for (u32 g = 0; g < stage.kGroups; ++g)
                ptx::bulk_load(stage.a_sf[g], p.a_sf + static_cast<u64>(b * stage.kGroups + g) * p.rows + row, kBlockM * 4, full);
        }
    }
}

// One tile: the sums of this thread. Interleaved W1 has two scales a tile: that of the gate rows and that of the up rows.
template <u32 kGroup, bool kInterleaved>
__device__ __forceinline__ void multiply(const GroupedParams& p, GroupedStorage<kGroup>& s, gemm::Place<kStages>& place,
                                         float (&sum)[kBlockN / 2], u32 tile, u32 first_row, u32 row) {
    const u32 columns = p.n / kBlockN, blocks = p.k / gemm::kBlockK, column = tile % columns;
    const float* b_sf = p.b_sf + static_cast<u64>(p.block_expert[tile / columns]) * columns * blocks;
    const float* first = b_sf + static_cast<u64>(kInterleaved ? column / 2 : column) * blocks;
    const float* second = kInterleaved ? first + static_cast<u64>(columns / 2) * blocks : first;
#pragma unroll
    for (float& value : sum) value = 0.0f;
    float acc[gemm::kBlockK / kGroup][kBlockN / 2];
    gemm::define<gemm::kBlockK / kGroup, kBlockN>(acc);
    for (u32 b = 0; b < blocks; ++b, place.advance()) {
        const float w_sf[2] = {__ldg(first + b), __ldg(second + b)};
        gemm::wait(&s.full[place.index], place.parity);
        gemm::multiply_stage(sum, acc, s.stages[place.index], &s.empty[place.index], first_row, row, w_sf);
    }
}

template <u32 kGroup, typename Epilogue>
__device__ __forceinline__ void grouped(const GroupedParams& p, Epilogue epilogue) {
    extern __shared__ __align__(1024) u8 shared[];
    auto& s = *reinterpret_cast<GroupedStorage<kGroup>*>(shared);
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < kStages; ++i) ptx::mbarrier_init(&s.full[i], 1), ptx::mbarrier_init(&s.empty[i], kMathWarps);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        ptx::fewer_registers<40>();
        if (threadIdx.x == 0) produce(p, s);
    } else {
        ptx::more_registers<232>();
        const u32 first_row = (threadIdx.x / 128 - 1) * 64, row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        const u32 columns = p.n / kBlockN, tiles = p.rows / kBlockM * columns;
        gemm::Place<kStages> place;
        float sum[kBlockN / 2];
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            multiply<kGroup, kGroup == 128>(p, s, place, sum, tile, first_row, row);
            epilogue(sum, static_cast<u64>(tile / columns) * kBlockM + first_row + row, tile % columns);
        }
    }
}

// Eq. (2) to (5).
template <bool kFast>
__device__ __forceinline__ void l1(const GroupedParams& p) {
    grouped<128>(p, [&](const float (&sum)[kBlockN / 2], u64 row, u32 column) {
        const float weight[2] = {p.weight[row], p.weight[row + 8]};
        swiglu::requantise_tile<kFast>(sum, weight, p.swiglu, p.l2_acts, p.l2_acts_sf, row, column, p.rows, p.n / 2);
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) grouped_l1_fast(const __grid_constant__ GroupedParams p) { l1<true>(p); }
extern "C" __global__ void __launch_bounds__(kThreads, 1) grouped_l1_precise(const __grid_constant__ GroupedParams p) { l1<false>(p); }

// Eq. (6), (7).
extern "C" __global__ void __launch_bounds__(kThreads, 1) grouped_l2(const __grid_constant__ GroupedParams p) {
    grouped<64>(p, [&](const float (&sum)[kBlockN / 2], u64 row, u32 column) {
        u16* out = p.out + row * p.n + column * kBlockN + threadIdx.x % 4 * 2;
#pragma unroll
        for (u32 i = 0; i < kBlockN / 2; i += 2) {
            const u32 pair = ptx::cvt_bf16(sum[i]) | static_cast<u32>(ptx::cvt_bf16(sum[i + 1])) << 16;
            *reinterpret_cast<u32*>(out + static_cast<u64>(i / 2 % 2 * 8) * p.n + i / 4 * 8) = pair;
        }
    });
}
