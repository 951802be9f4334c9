// Eq. (8): each token sums its active slots in fp32, in ascending k, and rounds once. Every row of y is written.
#pragma once
#include "layout.cuh"

namespace combine {

__device__ __forceinline__ void combine(const layout::Rank& r) {
    const Shape& s = r.p.shape;
    const long long* topk_idx = r.mine<long long>(r.p.layout.topk_idx);
    for (u32 token = r.block; token < r.own.tokens; token += r.blocks)
        for (u32 chunk = threadIdx.x; chunk < s.hidden / 8; chunk += blockDim.x) {
            float sum[8] = {};
            for (u32 k = 0; k < s.topk; ++k) {
                const u32 entry = token * s.topk + k;
                if (topk_idx[entry] < 0) continue;
                const uint4 eight = ptx::load_volatile(reinterpret_cast<const uint4*>(r.slot_row(r.rank, entry)) + chunk);
                const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                for (u32 i = 0; i < 8; ++i) sum[i] += __uint_as_float(i % 2 ? pairs[i / 2] & 0xFFFF0000u : pairs[i / 2] << 16);
            }
            u32 out[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                out[i] = ptx::cvt_bf16(sum[2 * i]) | static_cast<u32>(ptx::cvt_bf16(sum[2 * i + 1])) << 16;
            reinterpret_cast<uint4*>(r.own.y + static_cast<u64>(token) * s.hidden)[chunk] = make_uint4(out[0], out[1], out[2], out[3]);
        }
}

}  // namespace combine
