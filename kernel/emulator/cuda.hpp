// What CUDA C++ has built in, as far as the kernel uses it, on the machine of machine.hpp.
//
// Kernels become inline functions, so that only the one that entry.hpp runs is compiled.
#pragma once
#include <cmath>
#include "machine.hpp"

#define __device__
#define __global__ inline
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n)
#define __grid_constant__
#define __launch_bounds__(...)

// The kernel's grids have one dimension.
struct EmuIndex {
    unsigned x;
};
#define threadIdx (EmuIndex{emu::machine->current->thread})
#define blockIdx (EmuIndex{emu::machine->current->block->index})
#define blockDim (EmuIndex{emu::machine->threads})
#define gridDim (EmuIndex{emu::machine->grid})

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
MACHINE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
MACHINE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename T, typename U>
inline auto min(T a, U b) {
    return a < b ? a : b;
}
template <typename T, typename U>
inline auto max(T a, U b) {
    return a < b ? b : a;
}

MACHINE unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
MACHINE float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
template <typename T>
inline T __ldg(const T* address) {
    return *address;
}

MACHINE unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
    unsigned out = 0;
    for (unsigned i = 0; i < 4; ++i)
        out |= static_cast<unsigned>(bytes >> (8 * (selector >> 4 * i & 7)) & 0xFF) << 8 * i;
    return out;
}

MACHINE void __syncthreads() {
    emu::Block& block = *emu::machine->current->block;
    emu::meet(block.barriers[0], block.live, "__syncthreads");
}

MACHINE int __syncthreads_or(int value) {
    emu::Block& block = *emu::machine->current->block;
    __syncthreads();  // all threads have read the answer of the call before
    if (value) block.any = true;
    __syncthreads();
    const int any = block.any;
    __syncthreads();
    block.any = false;
    return any;
}

MACHINE void __syncwarp() { emu::meet(emu::warp().gate, 32, "__syncwarp"); }

template <typename T>
inline T emu_shuffle(T value, unsigned source, const char* kind) {
    static_assert(sizeof(T) == 4);
    return __builtin_bit_cast(
        T, emu::exchange(__builtin_bit_cast(unsigned, value), [=](const unsigned* all) { return all[source]; }, kind));
}
template <typename T>
inline T __shfl_sync(unsigned, T value, int source) {
    return emu_shuffle(value, source & 31, "__shfl_sync");
}
template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return emu_shuffle(value, threadIdx.x % 32 ^ mask, "__shfl_xor_sync");
}
template <typename T>
inline T __shfl_up_sync(unsigned, T value, unsigned distance) {
    const unsigned lane = threadIdx.x % 32;
    return emu_shuffle(value, lane < distance ? lane : lane - distance, "__shfl_up_sync");
}
MACHINE int __popc(unsigned bits) { return __builtin_popcount(bits); }
MACHINE int __ffs(int bits) { return __builtin_ffs(bits); }
MACHINE unsigned __ballot_sync(unsigned, bool predicate) {
    return emu::exchange(
        predicate,
        [](const unsigned* all) {
            unsigned bits = 0;
            for (unsigned lane = 0; lane < 32; ++lane) bits |= all[lane] << lane;
            return bits;
        },
        "__ballot_sync");
}

MACHINE float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MACHINE float __fdiv_rn(float a, float b) { return a / b; }
