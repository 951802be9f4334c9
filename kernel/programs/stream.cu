// A plain bulk read: what the memory of this card gives to a kernel that does nothing else, so that shares are of today.
#include "../ptx.cuh"

struct StreamParams {
    const u8* data;  // 16-byte aligned
    u64 bytes;       // a multiple of 16
};

constexpr u32 kPiece = 32 * 1024, kStages = 6, kThreads = 64;  // a warp that asks, a warp that waits

struct StreamStorage {
    alignas(128) u8 pieces[kStages][kPiece];
    u64 full[kStages], empty[kStages];
};
static_assert(sizeof(StreamStorage) == SHARED_BYTES);

// Place in the ring: index and parity of the barriers' phase.
struct StreamPlace {
    u32 index = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++index == kStages) index = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void stream_wait(u64* barrier, u32 parity) {
    while (!ptx::mbarrier_try_wait(barrier, parity)) {
    }
}

// Pieces go round the blocks, so neighbours read neighbouring memory at the same time.
extern "C" __global__ void __launch_bounds__(kThreads, 1) stream_read(const __grid_constant__ StreamParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    auto& s = *reinterpret_cast<StreamStorage*>(shared);
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < kStages; ++i) ptx::mbarrier_init(&s.full[i], 1), ptx::mbarrier_init(&s.empty[i], 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    StreamPlace place;
    const u64 step = static_cast<u64>(gridDim.x) * kPiece, start = static_cast<u64>(blockIdx.x) * kPiece;
    if (threadIdx.x < 32) {
        if (!ptx::elect_one()) return;
        for (u64 at = start; at < p.bytes; at += step, place.advance()) {
            const u64 left = p.bytes - at;
            const u32 bytes = left < kPiece ? static_cast<u32>(left) : kPiece;
            u64* full = &s.full[place.index];
            stream_wait(&s.empty[place.index], place.parity ^ 1);
            ptx::mbarrier_arrive_expect(full, bytes);
            ptx::bulk_load(s.pieces[place.index], p.data + at, bytes, full);
        }
    } else {
        // Every piece is waited for: a block that ended before its copies would not have read, and would be illegal.
        for (u64 at = start; at < p.bytes; at += step, place.advance()) {
            stream_wait(&s.full[place.index], place.parity);
            __syncwarp();
            if (threadIdx.x == 32) ptx::mbarrier_arrive(&s.empty[place.index]);
        }
    }
}
