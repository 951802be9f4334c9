// Every instruction of PTX that the kernels write themselves, one function each; wgmma.cuh, included at the end, has
// those of the tensor core. No header of CUDA is included or needed. Source: PTX ISA 9.0; the comments name its
// sections. What the instructions compute was measured on the chip, see quant/atoms.py.
//
// kernel/emulator/ptx.hpp defines the same functions for a CPU, and takes the place of this file there.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

namespace ptx {

// ---- fp32 (PTX ISA 9.7.3) -------------------------------------------------------------------------------------------

// Returns fl(a * b + c): one rounding to nearest even; subnormals are kept.
__device__ __forceinline__ float fma_rn(float a, float b, float c) {
    float d;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

// Returns fma_rn(a, b, c) clamped to [0, 1]; NaN becomes +0.
__device__ __forceinline__ float fma_rn_sat(float a, float b, float c) {
    float d;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

// Returns a * b + c, rounded once, toward minus infinity.
__device__ __forceinline__ float fma_rm(float a, float b, float c) {
    float d;
    asm("fma.rm.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

// Returns fl(1 / x) as IEEE 754 rounds it; subnormals are kept.
__device__ __forceinline__ float rcp_rn(float x) {
    float d;
    asm("rcp.rn.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// Returns 1 / x as the special-function unit approximates it.
__device__ __forceinline__ float rcp_approx(float x) {
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// Returns 2^x as the special-function unit approximates it.
__device__ __forceinline__ float ex2_approx(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// ---- conversions (PTX ISA 9.7.9.22) ---------------------------------------------------------------------------------

// Returns two e4m3 codes, rounded to nearest even and saturated at 448: that of `high` in bits 8-15, that of `low` in
// bits 0-7.
__device__ __forceinline__ u16 cvt_e4m3x2(float high, float low) {
    u16 d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
    return d;
}

// Returns the bits of a BF16, rounded to nearest even.
__device__ __forceinline__ u16 cvt_bf16(float x) {
    u16 d;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
    return d;
}

// ---- ordering and addresses -----------------------------------------------------------------------------------------

// Makes this thread's writes to shared memory visible to wgmma and TMA. Every writing thread executes it before the
// barrier that tells of the writes (PTX ISA 9.7.13.4).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders this thread's accesses to global and shared memory with those of TMA and bulk copies, in both directions: they
// read what this thread has written or seen.
__device__ __forceinline__ void fence_proxy_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Orders this thread's accesses before and after it for all GPUs of the system.
__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Loads and atomics with a stated order (PTX ISA 8, memory consistency model). Their scope is the system where peers
// access the same word, else the GPU.
__device__ __forceinline__ u32 load_acquire(const u32* address) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ u32 load_relaxed(const u32* address) {
    u32 value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// Volatile loads never return a stale cache line; peers write what is read through them during the launch.
__device__ __forceinline__ uint4 load_volatile(const uint4* address) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ u32 load_volatile(const u32* address) {
    u32 value;
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ u32 atomic_add(u32* address, u32 value) {
    u32 before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
    return before;
}

// The counter is in shared memory.
__device__ __forceinline__ u32 atomic_add_shared(u32* address, u32 value) {
    u32 before;
    asm volatile("atom.relaxed.cta.shared::cta.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(address))), "r"(value)
                 : "memory");
    return before;
}

__device__ __forceinline__ u32 atomic_add_acq_rel(u32* address, u32 value) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
    return before;
}

__device__ __forceinline__ u32 atomic_cas(u32* address, u32 expected, u32 value) {
    u32 before;
    asm volatile("atom.relaxed.sys.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(before)
                 : "l"(address), "r"(expected), "r"(value)
                 : "memory");
    return before;
}

__device__ __forceinline__ void reduce_add_release(u32* address, u32 value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void reduce_add_release_system(u32* address, u32 value) {
    asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Returns nanoseconds of a clock that all multiprocessors share.
__device__ __forceinline__ u64 global_timer() {
    u64 ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

// Returns cycles of this multiprocessor's own clock.
__device__ __forceinline__ u64 clock() {
    u64 cycles;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles)::"memory");
    return cycles;
}

// Returns the 32-bit address in the shared window of a pointer into shared memory.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- variables in shared memory -------------------------------------------------------------------------------------

// Declares `name`, the bytes of the thread block's dynamic shared memory. It is a macro because the declaration has to
// stand in the kernel's own code: behind a function the compiler knows less about the addresses.
#define DYNAMIC_SHARED_MEMORY(name) extern __shared__ __align__(1024) u8 name[]

// Returns a word of static shared memory; there is one for each type Tag.
template <typename Tag>
__device__ __forceinline__ u32& shared_word() {
    __shared__ u32 word;
    return word;
}

// ---- mbarriers, the barriers in shared memory (PTX ISA 9.7.13.15) ---------------------------------------------------

__device__ __forceinline__ void mbarrier_init(u64* mbarrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(arrivals) : "memory");
}

// Makes mbarrier_init visible to the asynchronous proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u64* mbarrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(mbarrier)) : "memory");
}

// Arrives, and tells the mbarrier to expect `bytes` of asynchronous copies before its phase can complete.
__device__ __forceinline__ void mbarrier_arrive_expect(u64* mbarrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(bytes)
                 : "memory");
}

// Returns whether the phase of this parity has completed, without waiting.
__device__ __forceinline__ bool mbarrier_test_wait(u64* mbarrier, u32 parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(mbarrier)), "r"(parity)
                 : "memory");
    return done != 0;
}

// Returns whether the phase of this parity has completed. The thread may be suspended for a while first, so false means
// only that the caller has to ask again.
__device__ __forceinline__ bool mbarrier_try_wait(u64* mbarrier, u32 parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(mbarrier)), "r"(parity)
                 : "memory");
    return done != 0;
}

// ---- asynchronous copies (PTX ISA 9.7.9.25, 9.7.9.27) ---------------------------------------------------------------

// Returns true for one lane of the warp, always the same one (PTX ISA 9.7.13.14); all 32 lanes call it together. Code
// behind any other condition, threadIdx.x == 0 for example, is compiled to a loop over the lanes around each copy,
// since the operands of a copy must be uniform in the warp.
__device__ __forceinline__ bool elect_one() {
    u32 elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

// CUtensorMap, which the host encodes.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Copies a box of a 2-D tensor, whose first element is at (row, column), to shared memory. Completes on `mbarrier`.
__device__ __forceinline__ void tma_load_2d(void* target, const TensorMap& map, u64* mbarrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(target)),
        "l"(&map), "r"(shared_address(mbarrier)), "r"(column), "r"(row)
        : "memory");
}

// Brings a tensor map into the cache in which TMA looks for it, so that the first box does not wait for it.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Brings the line of an address into the L1 cache.
__device__ __forceinline__ void prefetch_l1(const void* address) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(address) : "memory");
}

// Copies `bytes` (a multiple of 16) of global memory to shared memory. Completes on `mbarrier`.
__device__ __forceinline__ void bulk_load(void* target, const void* source, u32 bytes, u64* mbarrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(target)),
                 "l"(source), "r"(bytes), "r"(shared_address(mbarrier))
                 : "memory");
}

// As bulk_load, for bytes that are not read again soon: their lines are the first that the L2 cache evicts.
__device__ __forceinline__ void bulk_load_once(void* target, const void* source, u32 bytes, u64* mbarrier) {
    asm volatile(
        "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], policy;\n}" ::"r"(shared_address(target)),
        "l"(source), "r"(bytes), "r"(shared_address(mbarrier))
        : "memory");
}

// Copies `bytes` (a multiple of 16) of shared memory to global memory, as part of this thread's bulk group.
__device__ __forceinline__ void bulk_store(void* target, const void* source, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
                 "r"(shared_address(source)), "r"(bytes)
                 : "memory");
}

// Closes this thread's bulk group and waits until its writes have been done.
__device__ __forceinline__ void bulk_store_wait() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}

// ---- registers of a role (PTX ISA 9.7.19.5) -------------------------------------------------------------------------

// All threads of a warpgroup call these. more_registers waits until other warps have given back enough registers.
template <u32 kRegisters>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <u32 kRegisters>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace ptx

#include "wgmma.cuh"
