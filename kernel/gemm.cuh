// Eq. (2), Eq. (3), Eq. (6): the promoted GEMM, for GEMM 1 and GEMM 2 alike. Each scale block of K is a chain of wgmma
// steps from 0; one fp32 fma for each output then adds the chain, scaled, into the sum ("promotes" it). The math
// warpgroups run multiply(); the producer of the kernel around it fills the pipeline. Predicted by reference/gemm.py.
//
// Inputs: E4M3 operands and the scales of A in the stages of the pipeline, the scales of B from a function of the
// caller. Output: the sums of a tile in registers.
#pragma once
#include "ptx.cuh"

namespace gemm {

// The tile of a thread block: kBlockM rows of activations (A) by kBlockN rows of weights (B), by two math warpgroups.
// One tile serves all shapes: smaller ones read more from the L2 cache, three warpgroups of 192 x 128 gained nothing.
// Four stages are what fits into shared memory.
constexpr u32 kBlockM = BLOCK_M, kBlockN = BLOCK_N, kNumStages = NUM_STAGES, kNumMathWarps = NUM_MATH_WARPS;
constexpr u32 kBlockK = BLOCK_K;      // columns of a K block: of one stage, and of the weights that share a scale
constexpr u32 kStepK = 32;            // columns of one wgmma
constexpr u32 kHalfN = HALF_N;        // weight rows of a half tile, and N of a chain: more accumulators would spill
constexpr u32 kNumSums = kHalfN / 2;  // outputs of a thread in a half tile: 64 rows x kHalfN columns by 128 threads
constexpr u32 kMaxScales = 2;         // most scale blocks of a K block: 128 / 64

// One K block of both operands: 128-byte rows in the 128-byte swizzle, and the scales of A's rows for each scale block.
struct Stage {
    alignas(1024) u8 a[kBlockM][kBlockK];
    alignas(1024) u8 b[kBlockN][kBlockK];
    alignas(1024) float a_sf[kMaxScales][kBlockM];
};

// The ring of stages in shared memory. A full barrier completes when the copies of its stage have landed, an empty
// barrier when all math warps have read the stage.
struct Pipeline {
    Stage stages[kNumStages];
    u64 full_barriers[kNumStages], empty_barriers[kNumStages];

    __device__ __forceinline__ void init() {
        for (u32 i = 0; i < kNumStages; ++i) {
            ptx::mbarrier_init(&full_barriers[i], 1);
            ptx::mbarrier_init(&empty_barriers[i], kNumMathWarps);
        }
    }
};

// Where a role is in the pipeline: a stage, and the parity of the phase of its barriers. The parity flips each time
// around.
struct PipelineState {
    u32 stage_idx = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage_idx == kNumStages) stage_idx = 0, parity ^= 1;
    }
};

// What one math warpgroup multiplies of a tile: 64 rows of A from first_row on by num_half_tiles times kHalfN rows of B
// from first_column on. It has no half tile where all of its rows are padding.
struct Share {
    u32 first_row, first_column, num_half_tiles;
};

// With more than 64 rows each warpgroup takes 64 of them; with fewer each takes half of the columns, so that neither
// multiplies padding. keep_rows_whole: one warpgroup gets all columns of a row with fewer rows too, and the other one
// gets nothing.
__device__ __forceinline__ Share share_of(u32 warpgroup_idx, u32 num_rows, u32 num_columns,
                                          bool keep_rows_whole = false) {
    if (num_rows <= 64 && !keep_rows_whole)
        return {0, warpgroup_idx * kHalfN, warpgroup_idx * kHalfN < num_columns ? 1u : 0u};
    return {warpgroup_idx * 64, 0, warpgroup_idx * 64 < num_rows ? (num_columns + kHalfN - 1) / kHalfN : 0};
}

// The index of this thread's math warpgroup. The shuffle tells the compiler that it is uniform in the warp, so that
// descriptors made from it need no copies before each wgmma: 4 % of dense.cu with scales per 128.
__device__ __forceinline__ u32 math_warpgroup_idx() { return __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1; }

// The first of this thread's two rows among the 64 of its warpgroup; the second one is 8 rows further on.
__device__ __forceinline__ u32 row_of_64() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

// Starts the chain of one scale block: 64 rows of A by kHalfN rows of B over kScaleK columns of K. Its first step does
// not read acc.
template <u32 kScaleK>
__device__ __forceinline__ void start_chain(float (&acc)[kNumSums], u64 desc_a, u64 desc_b, u32 scale_idx) {
#pragma unroll
    for (float& value : acc) ptx::pin(value);
    ptx::wgmma_fence();
#pragma unroll
    for (u32 step = 0; step < kScaleK / kStepK; ++step) {
        const u64 offset = (scale_idx * kScaleK + step * kStepK) >> 4;
        ptx::wgmma_ss<kHalfN>(acc, desc_a + offset, desc_b + offset, step > 0);
    }
    ptx::wgmma_commit();
}

__device__ __forceinline__ void finish_chain(float (&acc)[kNumSums]) {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (float& value : acc) ptx::pin(value);
}

// fl(s_a * s_b) for this thread's two rows, and for the even and the odd ones of the column groups of 8. The pins have
// them computed before the chain ends.
__device__ __forceinline__ void scale_factors(float (&scale)[2][2], const float (&a_sf)[2], float b_sf_even,
                                              float b_sf_odd) {
#pragma unroll
    for (u32 row_half = 0; row_half < 2; ++row_half) {
        scale[0][row_half] = a_sf[row_half] * b_sf_even, scale[1][row_half] = a_sf[row_half] * b_sf_odd;
        ptx::pin(scale[0][row_half]), ptx::pin(scale[1][row_half]);
    }
}

// Adds a chain to the sums, one fma an output. A thread holds the column pairs 8 j + 2 q of two rows, see wgmma.cuh.
// All outputs of one scale come before those of the next: a register that the next fma reads too is kept for it, and
// leaves the bank of the sums alone. In the order of the sums GEMM 1's first half tile kept no scale.
__device__ __forceinline__ void promote(float (&sum)[kNumSums], const float (&acc)[kNumSums],
                                        const float (&scale)[2][2]) {
#pragma unroll
    for (u32 scale_idx = 0; scale_idx < 4; ++scale_idx) {
#pragma unroll
        for (u32 n = 0; n < kNumSums / 4; ++n) {
            const u32 i = n / 2 * 8 + scale_idx * 2 + n % 2;
            sum[i] = ptx::fma_rn(scale[scale_idx / 2][scale_idx % 2], acc[i], sum[i]);
        }
    }
}

// Tells the producer that this warp has read a stage: its scales, and by its wgmma the operands.
__device__ __forceinline__ void release(u64* empty_barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty_barrier);
}

// A math warpgroup's share of a tile, K block after K block. One chain is in flight at a time; the other warpgroup
// multiplies while this one promotes. Everything that a chain does not need is done while one is in flight, so that
// only fmas stand between two chains of a warpgroup. The one exception is the release of a stage, as soon as its last
// chain has ended and before that chain's fmas: the loads then start earlier, and more bytes on their way were worth
// 2.0 to 2.6 % from 2,048 tokens up.
//
//   kInterleaved             b_sf holds the scales of gate and up columns, which alternate by 8;
//                            else those of the two half tiles
//   wait(barrier, parity)    waits until a stage is full; returns false if the launch has failed
//   load_b_sf(b_sf, k)       loads the two scales of K block k
//
// Returns false if a wait did.
template <bool kInterleaved, u32 kScaleK, u32 kNumHalfTiles, typename Wait, typename LoadBSf>
__device__ __forceinline__ bool multiply_half_tiles(float (&sum)[2][kNumSums], Pipeline& pipeline, PipelineState& state,
                                                    const Share& share, u32 num_k_blocks, Wait wait,
                                                    LoadBSf load_b_sf) {
    constexpr u32 kNumScales = kBlockK / kScaleK;
    struct Operands {
        u64 desc_a, desc_b;
        float a_sf[kNumScales][2], b_sf[2];
    };
    const u32 row = share.first_row + row_of_64();
    const auto load = [&](Operands& operands) {
        const Stage& stage = pipeline.stages[state.stage_idx];
        operands.desc_a = ptx::descriptor_swizzle_128(stage.a[share.first_row]);
        operands.desc_b = ptx::descriptor_swizzle_128(stage.b[share.first_column]);
#pragma unroll
        for (u32 scale_idx = 0; scale_idx < kNumScales; ++scale_idx)
            operands.a_sf[scale_idx][0] = stage.a_sf[scale_idx][row],
            operands.a_sf[scale_idx][1] = stage.a_sf[scale_idx][row + 8];
    };

    float acc[kNumSums];
#pragma unroll
    for (u32 i = 0; i < kNumSums; ++i) acc[i] = sum[0][i] = sum[1][i] = 0.0f;
    Operands now, next;
    load_b_sf(now.b_sf, 0);
    if (!wait(&pipeline.full_barriers[state.stage_idx], state.parity)) return false;
    load(now);
    bool is_alive = true;
    for (u32 k_block_idx = 0; k_block_idx < num_k_blocks; ++k_block_idx) {
        const u32 stage_idx = state.stage_idx;
#pragma unroll
        for (u32 half_idx = 0; half_idx < kNumHalfTiles; ++half_idx) {
#pragma unroll
            for (u32 scale_idx = 0; scale_idx < kNumScales; ++scale_idx) {
                start_chain<kScaleK>(acc, now.desc_a, now.desc_b + (half_idx * kHalfN * kBlockK >> 4), scale_idx);
                float scale[2][2];
                scale_factors(scale, now.a_sf[scale_idx], now.b_sf[kInterleaved ? 0 : half_idx],
                              now.b_sf[kInterleaved ? 1 : half_idx]);
                if (half_idx == 0 && scale_idx == 0 && k_block_idx + 1 < num_k_blocks)
                    load_b_sf(next.b_sf, k_block_idx + 1);
                if (half_idx == kNumHalfTiles - 1 && scale_idx == kNumScales - 1) {
                    state.advance();
                    if (k_block_idx + 1 < num_k_blocks) {
                        is_alive = wait(&pipeline.full_barriers[state.stage_idx], state.parity);
                        load(next);
                    }
                }
                finish_chain(acc);
                if (half_idx == kNumHalfTiles - 1 && scale_idx == kNumScales - 1)
                    release(&pipeline.empty_barriers[stage_idx]);
                promote(sum[half_idx], acc, scale);
            }
        }
        if (!is_alive) return false;
        now = next;
    }
    return true;
}

template <bool kInterleaved, u32 kScaleK, typename Wait, typename LoadBSf>
__device__ __forceinline__ bool multiply(float (&sum)[2][kNumSums], Pipeline& pipeline, PipelineState& state,
                                         const Share& share, u32 num_k_blocks, Wait wait, LoadBSf load_b_sf) {
    return share.num_half_tiles == 2 ? multiply_half_tiles<kInterleaved, kScaleK, 2>(sum, pipeline, state, share,
                                                                                     num_k_blocks, wait, load_b_sf)
                                     : multiply_half_tiles<kInterleaved, kScaleK, 1>(sum, pipeline, state, share,
                                                                                     num_k_blocks, wait, load_b_sf);
}

// Takes the place of multiply() for a warpgroup that has no share in the tile: it waits for each stage and releases it,
// since the producer waits for all math warps. Returns false if a wait did.
template <typename Wait>
__device__ __forceinline__ bool pass(Pipeline& pipeline, PipelineState& state, u32 num_k_blocks, Wait wait) {
    for (u32 k_block_idx = 0; k_block_idx < num_k_blocks; ++k_block_idx, state.advance()) {
        if (!wait(&pipeline.full_barriers[state.stage_idx], state.parity)) return false;
        release(&pipeline.empty_barriers[state.stage_idx]);
    }
    return true;
}

// Waits without a time limit: for kernels whose producer cannot fail.
__device__ __forceinline__ void wait(u64* mbarrier, u32 parity) {
    while (!ptx::mbarrier_try_wait(mbarrier, parity)) {
    }
}

}  // namespace gemm
