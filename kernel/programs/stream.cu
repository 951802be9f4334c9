// A plain bulk read: the rate at which this card's memory feeds a kernel that does nothing else. It is measured beside
// the layer, so that shares of it are those of the card and the day. One warp starts the copies, another one waits for
// them.
#include "../ptx.cuh"

struct StreamParams {
    const u8* data_ptr;  // 16-byte aligned
    u64 num_bytes;       // a multiple of 16
};

// 192 KB are under way in each thread block, which is nearly all that shared memory holds.
constexpr u32 kPieceBytes = 32 * 1024, kNumStages = 6;
constexpr u32 kNumThreads = 64;

struct StreamStorage {
    alignas(128) u8 pieces[kNumStages][kPieceBytes];
    u64 full_barriers[kNumStages], empty_barriers[kNumStages];
};
static_assert(sizeof(StreamStorage) == SHARED_BYTES);

// Where a warp is in the ring of pieces: a stage, and the parity of the phase of its barriers.
struct StreamState {
    u32 stage_idx = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage_idx == kNumStages) stage_idx = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void stream_wait(u64* mbarrier, u32 parity) {
    while (!ptx::mbarrier_try_wait(mbarrier, parity)) {
    }
}

// The pieces go round the thread blocks, so that neighbours read neighbouring memory at the same time.
extern "C" __global__ void __launch_bounds__(kNumThreads, 1) stream_read(const __grid_constant__ StreamParams params) {
    DYNAMIC_SHARED_MEMORY(shared);
    auto& storage = *reinterpret_cast<StreamStorage*>(shared);
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < kNumStages; ++i)
            ptx::mbarrier_init(&storage.full_barriers[i], 1), ptx::mbarrier_init(&storage.empty_barriers[i], 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    StreamState state;
    const u64 step = static_cast<u64>(gridDim.x) * kPieceBytes, start = static_cast<u64>(blockIdx.x) * kPieceBytes;
    if (threadIdx.x < 32) {
        if (!ptx::elect_one()) return;
        for (u64 at = start; at < params.num_bytes; at += step, state.advance()) {
            const u64 num_left = params.num_bytes - at;
            const u32 num_bytes = num_left < kPieceBytes ? static_cast<u32>(num_left) : kPieceBytes;
            u64* full_barrier = &storage.full_barriers[state.stage_idx];
            stream_wait(&storage.empty_barriers[state.stage_idx], state.parity ^ 1);
            ptx::mbarrier_arrive_expect(full_barrier, num_bytes);
            ptx::bulk_load(storage.pieces[state.stage_idx], params.data_ptr + at, num_bytes, full_barrier);
        }
    } else {
        // Every piece is waited for: a thread block must not end while its copies are under way, and would not have
        // read.
        for (u64 at = start; at < params.num_bytes; at += step, state.advance()) {
            stream_wait(&storage.full_barriers[state.stage_idx], state.parity);
            __syncwarp();
            if (threadIdx.x == 32) ptx::mbarrier_arrive(&storage.empty_barriers[state.stage_idx]);
        }
    }
}
