// Eq. (7): an output row becomes BF16 before it leaves for slot (token, k) of its source rank.
#pragma once
#include "layout.cuh"

namespace scatter {

// One turn of a math warpgroup: this thread's two rows of 64. In the order of kernel/tiles.py four pairs of registers are 8
// neighbouring columns, and the lanes of a quad have 32 of them side by side. Padding rows go nowhere.
__device__ __forceinline__ void to_slot(const layout::Rank& r, const float (&sum)[64], u64 row, u32 row_in_block, u32 rows,
                                        u32 column) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        if (row_in_block + 8 * half >= rows) continue;
        const uint2 source = r.mine<uint2>(r.p.layout.pool_source)[row + 8 * half];
        u16* out = r.slot_row(source.x, source.y) + column + threadIdx.x % 4 * 8;
#pragma unroll
        for (u32 j = 0; j < 16; j += 4) {
            u32 words[4];
#pragma unroll
            for (u32 w = 0; w < 4; ++w) {
                const u32 i = 4 * (j + w) + 2 * half;
                words[w] = ptx::cvt_bf16(sum[i]) | static_cast<u32>(ptx::cvt_bf16(sum[i + 1])) << 16;
            }
            *reinterpret_cast<uint4*>(out + 8 * j) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

}  // namespace scatter
