// Where the time of each role goes. The marks are compiled in with PHASES alone, for `phases`; the shipped kernel has
// none.
#pragma once
#include "params.cuh"

namespace phase {

// What a role does, in the names that the report of phases prints. The clocks of a thread block are kept by thread 0,
// the producer (the lane that elect.sync chooses), and by thread 0 of both math warpgroups.
enum Phase : u32 { kPrologue, kWait, kOperands, kLoad, kL1, kL1Epilogue, kL2, kL2Epilogue, kMeet, kCombine, kPhases };

#ifdef PHASES
// The clock of one role: cycles spent in each phase, and the time of its last mark. The rows stand behind the status.
struct Row {
    u64 spent[kPhases], last;
};

__device__ __noinline__ void add(const Params& params, u32 phase) {
    Row& row = reinterpret_cast<Row*>(params.barrier.status_ptr + 1)[blockIdx.x * 3 + threadIdx.x / 128];
    const u64 now = ptx::clock();
    if (phase < kPhases) row.spent[phase] += now - row.last;
    row.last = now;
}
#endif

// Adds the time since this thread's last mark to `phase`. With kPhases that time is not counted.
__device__ __forceinline__ void mark(const Params& params, u32 phase) {
#ifdef PHASES
    if (threadIdx.x % 128 == 0) add(params, phase);
#endif
}

}  // namespace phase
