// Eq. (7): an output row becomes BF16 before it leaves for slot (token, k) of its source rank.
#pragma once
#include "layout.cuh"

namespace scatter {

// The tile of one math warpgroup: this thread's two rows of 64, columns 8 j + 2 q of 128. Padding rows go nowhere.
__device__ __forceinline__ void to_slot(const layout::Rank& r, const float (&sum)[64], u64 row, u32 row_in_block, u32 rows,
                                        u32 column) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        if (row_in_block + 8 * half >= rows) continue;
        const uint2 source = r.mine<uint2>(r.p.layout.pool_source)[row + 8 * half];
        u16* out = r.slot_row(source.x, source.y) + column + threadIdx.x % 4 * 2;
#pragma unroll
        for (u32 j = 0; j < 16; ++j) {
            const u32 low = ptx::cvt_bf16(sum[4 * j + 2 * half]), high = ptx::cvt_bf16(sum[4 * j + 2 * half + 1]);
            *reinterpret_cast<u32*>(out + 8 * j) = low | high << 16;
        }
    }
}

}  // namespace scatter
