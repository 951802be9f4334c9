// Eq. (8): each token sums its active slots in fp32, in ascending k, and rounds once. Every row of y is written.
#pragma once
#include "layout.cuh"

namespace combine {

constexpr u32 kPart = 8;    // columns that a lane reads at a time: 16 bytes
constexpr u32 kParts = 2;   // as often, 256 columns apart
constexpr u32 kAhead = 8;   // slots whose loads are under way together

// A warp takes 512 columns of a token, a unit; the warps of all blocks take them in turn. The slots of the next one are looked
// up while rows are on their way, those of the first one before the rows are there.
struct Units {
    const layout::Rank& r;
    u32 columns, parts;
    u64 end, step, unit;
    long long expert;  // of this lane's slot of `unit`

    __device__ __forceinline__ explicit Units(const layout::Rank& rank)
        : r(rank), columns(32 * kPart * kParts), parts((r.p.shape.hidden + columns - 1) / columns),
          end(static_cast<u64>(r.own.tokens) * parts), step(blockDim.x / 32 * r.blocks),
          unit(threadIdx.x / 32 * r.blocks + r.block), expert(expert_of(unit)) {}

    __device__ __forceinline__ long long expert_of(u64 some) const {
        const u32 lane = threadIdx.x % 32;
        if (some >= end || lane >= r.p.shape.topk) return -1;
        return r.mine<long long>(r.p.layout.topk_idx)[some / parts * r.p.shape.topk + lane];
    }
};

__device__ __forceinline__ void combine(const layout::Rank& r, Units& units) {
    const Shape& s = r.p.shape;
    const u32 lane = threadIdx.x % 32, columns = units.columns, parts = units.parts;
    for (u64& unit = units.unit; unit < units.end; unit += units.step) {
        const u32 token = static_cast<u32>(unit / parts), first_column = static_cast<u32>(unit % parts) * columns + lane * kPart;
        const u32 slots = __ballot_sync(0xFFFFFFFFu, r.active(units.expert));
        bool inside[kParts];
        float sum[kParts][kPart] = {};
#pragma unroll
        for (u32 i = 0; i < kParts; ++i) inside[i] = first_column + i * 32 * kPart < s.hidden;
        for (u32 first = 0; first < s.topk; first += kAhead) {
            uint4 eight[kAhead][kParts];
#pragma unroll
            for (u32 k = 0; k < kAhead; ++k) {
                if (!(slots >> (first + k) & 1)) continue;
                const u16* row = r.slot_row(r.rank, r.slot_index(token, first + k)) + first_column;
#pragma unroll
                for (u32 i = 0; i < kParts; ++i)
                    if (inside[i]) eight[k][i] = ptx::load_volatile(reinterpret_cast<const uint4*>(row + i * 32 * kPart));
            }
            if (first == 0) units.expert = units.expert_of(unit + units.step);
#pragma unroll
            for (u32 k = 0; k < kAhead; ++k) {
                if (!(slots >> (first + k) & 1)) continue;
#pragma unroll
                for (u32 i = 0; i < kParts; ++i) {
                    const u32 pairs[4] = {eight[k][i].x, eight[k][i].y, eight[k][i].z, eight[k][i].w};
#pragma unroll
                    for (u32 j = 0; j < kPart; ++j)
                        sum[i][j] += __uint_as_float(j % 2 ? pairs[j / 2] & 0xFFFF0000u : pairs[j / 2] << 16);
                }
            }
        }
        u16* y = r.own.y + static_cast<u64>(token) * s.hidden + first_column;
#pragma unroll
        for (u32 i = 0; i < kParts; ++i) {
            u32 out[kPart / 2];
#pragma unroll
            for (u32 j = 0; j < kPart / 2; ++j)
                out[j] = ptx::cvt_bf16(sum[i][2 * j]) | static_cast<u32>(ptx::cvt_bf16(sum[i][2 * j + 1])) << 16;
            if (inside[i]) *reinterpret_cast<uint4*>(y + i * 32 * kPart) = make_uint4(out[0], out[1], out[2], out[3]);
        }
    }
}

}  // namespace combine
