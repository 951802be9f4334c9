// Eq. (7): an output row becomes BF16 before it leaves for slot (token, k) of its source rank. The math warpgroups run
// it after GEMM 2. Inputs: sums in registers, pool_source. Output: the field `slots` of the source rank. Predicted by
// reference/scatter.py.
#pragma once
#include "layout.cuh"

namespace scatter {

// Stores this thread's two rows of a half tile of 64 rows; padding rows are left out. In the order in which weights.py
// stores weight rows, four pairs of registers are 8 neighbouring columns, one store of 16 bytes, and the four lanes of
// a quad have 32 columns side by side.
__device__ __forceinline__ void to_slot(const layout::Rank& rank, const float (&sum)[64], u64 pool_row,
                                        u32 row_in_block, u32 num_rows, u32 first_column) {
#pragma unroll
    for (u32 row_half = 0; row_half < 2; ++row_half) {
        if (row_in_block + 8 * row_half >= num_rows) continue;
        const uint2 source = rank.own_ptr<uint2>(rank.params.layout.offset.pool_source)[pool_row + 8 * row_half];
        u16* out = rank.slot_row(source.x, source.y) + first_column + threadIdx.x % 4 * 8;
#pragma unroll
        for (u32 j = 0; j < 16; j += 4) {
            u32 words[4];
#pragma unroll
            for (u32 w = 0; w < 4; ++w) {
                const u32 i = 4 * (j + w) + 2 * row_half;
                words[w] = ptx::cvt_bf16(sum[i]) | static_cast<u32>(ptx::cvt_bf16(sum[i + 1])) << 16;
            }
            *reinterpret_cast<uint4*>(out + 8 * j) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

}  // namespace scatter
