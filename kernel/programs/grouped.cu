// The two grouped GEMMs of the layer with their epilogues, over a pool of rows sorted by expert: what the fused kernel does
// between dispatch and combine, provable alone. A pool block is 128 rows of one expert; rows beyond an expert's are padding.
#include "../gemm.cuh"
#include "../swiglu.cuh"

using gemm::kBlockM, gemm::kBlockN, gemm::kTurnN;
constexpr u32 kThreads = 128 + 32 * gemm::kMathWarps;

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

static_assert(sizeof(gemm::Ring) == SHARED_BYTES);

__device__ __forceinline__ u32 tile_columns(const GroupedParams& p) { return (p.n + kBlockN - 1) / kBlockN; }

// Tiles of one pool block follow each other, so that its rows stay in L2 while the expert's weights stream through.
template <u32 kGroup>
__device__ __forceinline__ void produce(const GroupedParams& p, gemm::Ring& ring) {
    constexpr u32 kGroups = gemm::kBlockK / kGroup;
    const u32 tiles = p.rows / kBlockM * tile_columns(p), blocks = p.k / gemm::kBlockK;
    gemm::Place place;
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const u32 row = tile / tile_columns(p) * kBlockM, expert = p.block_expert[tile / tile_columns(p)];
        const u32 column = tile % tile_columns(p) * kBlockN, columns = min(kBlockN, p.n - column);
        for (u32 b = 0; b < blocks; ++b, place.advance()) {
            gemm::Stage& stage = ring.stages[place.index];
            u64* full = &ring.full[place.index];
            gemm::wait(&ring.empty[place.index], place.parity ^ 1);
            ptx::mbarrier_arrive_expect(full, (kBlockM + columns) * gemm::kBlockK + kGroups * kBlockM * 4);
            ptx::tma_load_2d(stage.a, p.a, full, b * gemm::kBlockK, row);
            for (u32 c = 0; c < columns; c += kTurnN)
                ptx::tma_load_2d(stage.b[c], p.b, full, b * gemm::kBlockK, expert * p.n + column + c);
            for (u32 g = 0; g < kGroups; ++g)
                ptx::bulk_load(stage.a_sf[g], p.a_sf + static_cast<u64>(b * kGroups + g) * p.rows + row, kBlockM * 4, full);
        }
    }
}

// One tile: the sums of this thread. Interleaved W1 has two scales a tile: that of the gate rows and that of the up rows.
template <u32 kGroup, bool kInterleaved>
__device__ __forceinline__ void multiply(const GroupedParams& p, gemm::Ring& ring, gemm::Place& place, const gemm::Share& share,
                                         float (&sum)[2][gemm::kSums], u32 expert, u32 column) {
    const u32 n = p.n / kTurnN, blocks = p.k / gemm::kBlockK;
    const float* b_sf = p.b_sf + static_cast<u64>(expert * n + (kInterleaved ? column / kBlockN : column / kTurnN)) * blocks;
    const u32 second = (kInterleaved ? n / 2 : share.turns - 1) * blocks;
    gemm::multiply<kInterleaved, kGroup>(
        sum, ring, place, share, blocks, [](u64* full, u32 parity) { return gemm::wait(full, parity), true; },
        [&](float (&w_sf)[2], u32 b) { w_sf[0] = __ldg(b_sf + b), w_sf[1] = __ldg(b_sf + second + b); });
}

template <u32 kGroup, typename Epilogue>
__device__ __forceinline__ void grouped(const GroupedParams& p, Epilogue epilogue) {
    extern __shared__ __align__(1024) u8 shared[];
    auto& ring = *reinterpret_cast<gemm::Ring*>(shared);
    if (threadIdx.x == 0) {
        ring.init();
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        ptx::fewer_registers<40>();
        if (threadIdx.x < 32 && ptx::elect_one()) produce<kGroup>(p, ring);
    } else {
        ptx::more_registers<232>();
        const u32 tiles = p.rows / kBlockM * tile_columns(p);
        gemm::Place place;
        float sum[2][gemm::kSums];
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const u32 block = tile / tile_columns(p), column = tile % tile_columns(p) * kBlockN;
            const gemm::Share share = gemm::share_of(gemm::math_warpgroup(), kBlockM, min(kBlockN, p.n - column));
            multiply<kGroup, kGroup == 128>(p, ring, place, share, sum, p.block_expert[block], column);
            const u64 row = static_cast<u64>(block) * kBlockM + share.first_row + gemm::row_of_64();
#pragma unroll
            for (u32 turn = 0; turn < 2; ++turn)
                if (turn < share.turns) epilogue(sum + turn, row, column + turn * kTurnN);
        }
    }
}

// Eq. (2) to (5).
template <bool kFast>
__device__ __forceinline__ void l1(const GroupedParams& p) {
    grouped<128>(p, [&](const float (*sum)[gemm::kSums], u64 row, u32 column) {
        const float weight[2] = {p.weight[row], p.weight[row + 8]};
        swiglu::requantise_tile<kFast, 1>(sum, weight, p.swiglu, p.l2_acts, p.l2_acts_sf, row, column / kTurnN, p.rows, p.n / 2);
    });
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) grouped_l1_fast(const __grid_constant__ GroupedParams p) { l1<true>(p); }
extern "C" __global__ void __launch_bounds__(kThreads, 1) grouped_l1_precise(const __grid_constant__ GroupedParams p) { l1<false>(p); }

// Eq. (6), (7).
extern "C" __global__ void __launch_bounds__(kThreads, 1) grouped_l2(const __grid_constant__ GroupedParams p) {
    grouped<64>(p, [&](const float (*turn)[gemm::kSums], u64 row, u32 column) {
        const float(&sum)[gemm::kSums] = *turn;
        u16* out = p.out + row * p.n + column + threadIdx.x % 4 * 2;
#pragma unroll
        for (u32 i = 0; i < gemm::kSums; i += 2) {
            const u32 pair = ptx::cvt_bf16(sum[i]) | static_cast<u32>(ptx::cvt_bf16(sum[i + 1])) << 16;
            *reinterpret_cast<u32*>(out + static_cast<u64>(i / 2 % 2 * 8) * p.n + i / 4 * 8) = pair;
        }
    });
}
