// Where the time of each role goes. Built in only with PHASES, see kernel/phases.py: the shipped kernel has none of it.
#pragma once
#include "params.cuh"

namespace phase {

// Roles 0: producer, 1 and 2: the math warpgroups; one thread of each keeps the clock, for the
// producer thread 0, which is also the one that elect.sync chooses.
enum Phase : u32 { kPrologue, kWait, kOperands, kLoad, kL1, kL1Epilogue, kL2, kL2Epilogue, kMeet, kCombine, kPhases };

#ifdef PHASES
struct Row {
    u64 spent[kPhases], last;  // clock cycles
};

__device__ __noinline__ void add(const Params& p, u32 phase) {
    Row& row = reinterpret_cast<Row*>(p.status + 1)[blockIdx.x * 3 + threadIdx.x / 128];
    u64 now;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
    if (phase < kPhases) row.spent[phase] += now - row.last;
    row.last = now;
}
#endif

// The time since this thread's last mark belongs to `phase`; kPhases: to nothing.
__device__ __forceinline__ void mark(const Params& p, u32 phase) {
#ifdef PHASES
    if (threadIdx.x % 128 == 0) add(p, phase);
#endif
}

}  // namespace phase
