// Eq. (7): an output row becomes BF16 before it leaves for slot (token, k) of its source rank.
#pragma once
#include "layout.cuh"
#include "quad.cuh"

namespace scatter {

// One turn of a math warpgroup: this thread's two rows of 64, columns 8 j + 2 q of 128. Padding rows go nowhere.
__device__ __forceinline__ void to_slot(const layout::Rank& r, const float (&sum)[64], u64 row, u32 row_in_block, u32 rows,
                                        u32 column) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const bool inside = row_in_block + 8 * half < rows;  // the same for all four lanes of a row
        u16* out = nullptr;
        if (inside) {
            const uint2 source = r.mine<uint2>(r.p.layout.pool_source)[row + 8 * half];
            out = r.slot_row(source.x, source.y) + column + threadIdx.x % 4 * 8;
        }
#pragma unroll
        for (u32 first = 0; first < 16; first += 4) {
            u32 words[4];  // word j: columns 8 (first + j) + 2 q and + 1; after the exchange lane q has all 8 of word q
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const u32 i = 4 * (first + j) + 2 * half;
                words[j] = ptx::cvt_bf16(sum[i]) | static_cast<u32>(ptx::cvt_bf16(sum[i + 1])) << 16;
            }
            quad::transpose(words);
            if (inside) *reinterpret_cast<uint4*>(out + 8 * first) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

}  // namespace scatter
