// Eq. (1): tokens travel to the ranks of their experts as they are. Sources announce what they send; destinations pull.
#pragma once
#include "barrier.cuh"
#include "scheduler.cuh"

namespace dispatch {

template <typename Visit>
__device__ __forceinline__ void each_active_slot(const layout::Rank& r, Visit visit) {
    const long long* topk_idx = r.mine<long long>(r.p.layout.topk_idx);
    const u32 entries = r.own.tokens * r.p.shape.topk;
    for (u32 entry = r.block * blockDim.x + threadIdx.x; entry < entries; entry += r.blocks * blockDim.x)
        if (topk_idx[entry] >= 0) visit(entry, static_cast<u32>(topk_idx[entry]));
}

// How many rows each expert gets from this rank.
__device__ __forceinline__ void count(const layout::Rank& r) {
    each_active_slot(r, [&](u32, u32 expert) { ptx::atomic_add(&r.workspace().send_count[expert], 1); });
}

// Writes this rank's counts and its list of (token, slot) into the buffers of the destinations, expert after expert.
// Within an expert the order is that of arrival: no bit depends on it. `start`: [E], shared memory.
__device__ __forceinline__ void announce(const layout::Rank& r, u32* start) {
    const Shape& s = r.p.shape;
    const Workspace& w = r.workspace();
    for (u32 peer = threadIdx.x; peer < s.ranks; peer += blockDim.x) {
        u32 sum = 0;
        for (u32 e = 0; e < s.experts_local; ++e) {
            const u32 sent = ptx::load_relaxed(&w.send_count[peer * s.experts_local + e]);
            start[peer * s.experts_local + e] = sum;
            if (r.block == 0) r.recv_count(peer, r.rank)[e] = sent;
            sum += sent;
        }
    }
    __syncthreads();
    each_active_slot(r, [&](u32 entry, u32 expert) {
        const u32 place = start[expert] + ptx::atomic_add(&r.workspace().send_cursor[expert], 1);
        r.recv_list(expert / s.experts_local, r.rank)[place] = entry;
    });
}

// One warp copies one pool row: bytes, scales (transposed, as TMA wants them), weight and source.
__device__ __forceinline__ void pull_row(const layout::Rank& r, const scheduler::Plan& plan, u32 expert, u32 index, u64 row) {
    const Shape& s = r.p.shape;
    const Layout& l = r.p.layout;
    const u32 lane = threadIdx.x % 32;
    u32 source = 0;
    while (source + 1 < s.ranks && plan.first_row[expert * s.ranks + source + 1] <= index) ++source;
    const u32 offset = plan.list_start[source * s.experts_local + expert] + index - plan.first_row[expert * s.ranks + source];
    const u32 entry = r.recv_list(r.rank, source)[offset];
    const u64 token = entry / s.topk;
    const uint4* from = reinterpret_cast<const uint4*>(r.at<u8>(source, l.x) + token * s.hidden);
    uint4* to = reinterpret_cast<uint4*>(r.mine<u8>(l.l1_acts) + row * s.hidden);
    for (u32 i = lane; i < s.hidden / 16; i += 32) to[i] = from[i];
    const float* from_sf = r.at<float>(source, l.x_sf) + token * (s.hidden / 128);
    float* to_sf = r.mine<float>(l.l1_acts_sf) + row;
    for (u32 i = lane; i < s.hidden / 128; i += 32) to_sf[static_cast<u64>(i) * s.pool_rows] = from_sf[i];
    if (lane == 0) {
        r.mine<uint2>(l.pool_source)[row] = make_uint2(source, entry);
        r.mine<float>(l.pool_weight)[row] = r.at<float>(source, l.topk_weights)[entry];
    }
}

// The dispatch warps of all blocks, each block of the pool in its turn: GEMM 1 starts on the first while later ones travel.
__device__ __forceinline__ void pull(const layout::Rank& r, const scheduler::Plan& plan, u32 warp, u32 warps) {
    const u32 experts = r.p.shape.experts_local, pool_blocks = plan.first_block[experts];
    u32 turn = 0;  // rows seen so far: row n belongs to warp n mod all warps
    const u32 all = warps * r.blocks, own = warp * r.blocks + r.block;
    for (u32 block = 0; block < pool_blocks; ++block) {
        const u32 expert = scheduler::expert_of(plan, experts, block);
        const u32 rows = scheduler::rows_in_block(plan, expert, block);
        for (u32 i = (own + all - turn % all) % all; i < rows; i += all) {
            pull_row(r, plan, expert, (block - plan.first_block[expert]) * scheduler::kBlockM + i,
                     static_cast<u64>(block) * scheduler::kBlockM + i);
            ptx::fence_proxy_async_all();  // TMA reads what these lanes wrote
            __syncwarp();
            if (threadIdx.x % 32 == 0) ptx::reduce_add_release(&r.block_rows()[block], 1);
        }
        turn += rows;
    }
}

}  // namespace dispatch
