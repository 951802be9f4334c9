// Eq. (8): each token sums its active slots in fp32, in ascending k, and rounds once. Every row of y is written. All
// warps run it, after the last barrier of the ranks. Inputs: the fields `slots` and topk_idx. Output: y. Predicted by
// reference/combine.py.
#pragma once
#include "layout.cuh"

namespace combine {

// A lane has 2 x 8 reads under way, as many as registers hold. When combine began to read so, and the math warps to
// prefetch what their epilogues read, it went from 158 to 127 us at 8,192 tokens.
constexpr u32 kLaneColumns = 8;    // columns that a lane reads at a time: 16 bytes
constexpr u32 kReadsPerLane = 2;   // as many such reads side by side, 256 columns apart
constexpr u32 kSlotsInFlight = 8;  // slots whose loads are under way together

// Which part of y this warp computes. A unit is 512 columns of a token; the warps of all thread blocks take the units
// in turn. The slots of the next unit are looked up while rows of this one are on their way, and those of the first
// unit are looked up before the last barrier, in its shadow.
struct Units {
    const layout::Rank& rank;
    u32 unit_columns, units_per_token;
    u64 end, step, unit_idx;
    long long expert_idx;  // of this lane's slot in the unit's token

    __device__ __forceinline__ explicit Units(const layout::Rank& r)
        : rank(r),
          unit_columns(32 * kLaneColumns * kReadsPerLane),
          units_per_token((rank.params.shape.hidden + unit_columns - 1) / unit_columns),
          end(static_cast<u64>(rank.own.num_tokens) * units_per_token),
          step(blockDim.x / 32 * rank.num_ctas),
          unit_idx(threadIdx.x / 32 * rank.num_ctas + rank.cta_idx),
          expert_idx(expert_of(unit_idx)) {}

    // The expert of slot number lane_idx of a unit's token, or -1.
    __device__ __forceinline__ long long expert_of(u64 some_unit_idx) const {
        const u32 lane_idx = threadIdx.x % 32;
        if (some_unit_idx >= end || lane_idx >= rank.params.shape.num_topk) return -1;
        const long long* topk_idx = rank.own_ptr<long long>(rank.params.layout.offset.topk_idx);
        return topk_idx[some_unit_idx / units_per_token * rank.params.shape.num_topk + lane_idx];
    }
};

__device__ __forceinline__ void combine(const layout::Rank& rank, Units& units) {
    const Shape& shape = rank.params.shape;
    const u32 lane_idx = threadIdx.x % 32, unit_columns = units.unit_columns, units_per_token = units.units_per_token;
    for (u64& unit_idx = units.unit_idx; unit_idx < units.end; unit_idx += units.step) {
        const u32 token_idx = static_cast<u32>(unit_idx / units_per_token);
        const u32 first_column = static_cast<u32>(unit_idx % units_per_token) * unit_columns + lane_idx * kLaneColumns;
        const u32 active_slots = __ballot_sync(0xFFFFFFFFu, rank.is_active(units.expert_idx));
        bool is_inside[kReadsPerLane];
        float sum[kReadsPerLane][kLaneColumns] = {};
#pragma unroll
        for (u32 i = 0; i < kReadsPerLane; ++i) is_inside[i] = first_column + i * 32 * kLaneColumns < shape.hidden;
        for (u32 first_slot = 0; first_slot < shape.num_topk; first_slot += kSlotsInFlight) {
            uint4 loaded[kSlotsInFlight][kReadsPerLane];
#pragma unroll
            for (u32 k = 0; k < kSlotsInFlight; ++k) {
                if (!(active_slots >> (first_slot + k) & 1)) continue;
                const u16* row = rank.slot_row(rank.idx, rank.slot_row_idx(token_idx, first_slot + k)) + first_column;
#pragma unroll
                for (u32 i = 0; i < kReadsPerLane; ++i)
                    if (is_inside[i])
                        loaded[k][i] = ptx::load_volatile(reinterpret_cast<const uint4*>(row + i * 32 * kLaneColumns));
            }
            if (first_slot == 0) units.expert_idx = units.expert_of(unit_idx + units.step);
#pragma unroll
            for (u32 k = 0; k < kSlotsInFlight; ++k) {
                if (!(active_slots >> (first_slot + k) & 1)) continue;
#pragma unroll
                for (u32 i = 0; i < kReadsPerLane; ++i) {
                    const u32 pairs[4] = {loaded[k][i].x, loaded[k][i].y, loaded[k][i].z, loaded[k][i].w};
#pragma unroll
                    for (u32 j = 0; j < kLaneColumns; ++j)
                        sum[i][j] += __uint_as_float(j % 2 ? pairs[j / 2] & 0xFFFF0000u : pairs[j / 2] << 16);
                }
            }
        }
        u16* y_ptr = rank.own.outputs.y_ptr + static_cast<u64>(token_idx) * shape.hidden + first_column;
#pragma unroll
        for (u32 i = 0; i < kReadsPerLane; ++i) {
            u32 words[kLaneColumns / 2];
#pragma unroll
            for (u32 j = 0; j < kLaneColumns / 2; ++j)
                words[j] = ptx::cvt_bf16(sum[i][2 * j]) | static_cast<u32>(ptx::cvt_bf16(sum[i][2 * j + 1])) << 16;
            if (is_inside[i])
                *reinterpret_cast<uint4*>(y_ptr + i * 32 * kLaneColumns) =
                    make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

}  // namespace combine
