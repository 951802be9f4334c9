// Registers of a thread, by role: the one place where they are shared out. A launch gives every thread the same number;
// setmaxnreg then moves registers from the roles that only wait and copy to the math warpgroups, whose 64 accumulators
// and 128 sums a thread have to stay in registers. A warpgroup can only take what others have given back, so the sum
// over the warpgroups must not grow: a larger one would wait for ever.
#pragma once
#include "ptx.cuh"

namespace registers {

// The fused kernel, three warpgroups: 168 is what __launch_bounds__(384, 1) lets ptxas use. 224 hold the math role
// without a spill; dispatch, producer and scout need at most 56.
constexpr u32 kAtLaunch = 168, kMath = 224, kOthers = 56;
static_assert(kOthers + 2 * kMath == 3 * kAtLaunch);

// The GEMMs alone (dense.cu, grouped.cu): their producer needs fewer, so the math warpgroups get all the rest.
constexpr u32 kGemmMath = 232, kGemmProducer = 40;
static_assert(kGemmProducer + 2 * kGemmMath == 3 * kAtLaunch);

}  // namespace registers
