// Every line of inline PTX of this project, one function each. No header of CUDA is included or needed.
// Source: PTX ISA 9.0; the sections are named at the functions. What the instructions compute is measured, see quant/atoms.py.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

namespace ptx {

// ---- fp32 (PTX ISA 9.7.3) -------------------------------------------------------------------------------------------

// fl(a * b + c), one rounding to nearest even, subnormals kept.
__device__ __forceinline__ float fma_rn(float a, float b, float c) {
    float d;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

// fma_rn clamped to [0, 1]; NaN gives +0.
__device__ __forceinline__ float fma_rn_sat(float a, float b, float c) {
    float d;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

// a * b + c rounded once, toward minus infinity.
__device__ __forceinline__ float fma_rm(float a, float b, float c) {
    float d;
    asm("fma.rm.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

// fl(1 / x), IEEE, subnormals kept.
__device__ __forceinline__ float rcp_rn(float x) {
    float d;
    asm("rcp.rn.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// 1 / x by the special-function unit.
__device__ __forceinline__ float rcp_approx(float x) {
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// 2^x by the special-function unit.
__device__ __forceinline__ float ex2_approx(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// ---- conversions (PTX ISA 9.7.9.22) ---------------------------------------------------------------------------------

// Two e4m3 codes, nearest even, saturating: `high` goes to bits 8-15, `low` to bits 0-7.
__device__ __forceinline__ u16 cvt_e4m3x2(float high, float low) {
    u16 d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
    return d;
}

// BF16 bits, nearest even.
__device__ __forceinline__ u16 cvt_bf16(float x) {
    u16 d;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
    return d;
}

// ---- ordering and addresses -----------------------------------------------------------------------------------------

// Generic-proxy writes to shared memory become visible to wgmma and TMA; every writing thread, before the barrier
// (PTX ISA 9.7.13.4).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory, and toward it: what was written becomes visible to TMA, what TMA will read is what is seen.
__device__ __forceinline__ void fence_proxy_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Loads, stores and counters with a stated order (PTX ISA 8, memory consistency model). System scope: peers read them too.
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

// Never from a stale cache line: written by peers during this launch.
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

// In shared memory.
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

// Nanoseconds, the same clock on every multiprocessor.
__device__ __forceinline__ u64 global_timer() {
    u64 ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

// The 32-bit shared-window address of a pointer into shared memory.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- barriers in shared memory (PTX ISA 9.7.13.15) ------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes mbarrier_init visible to the asynchronous proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces `bytes` of asynchronous copies that complete on this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Whether the phase of this parity has completed, at once.
__device__ __forceinline__ bool mbarrier_test_wait(u64* barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// Whether the phase of this parity has completed; may suspend the thread for a while first.
__device__ __forceinline__ bool mbarrier_try_wait(u64* barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// ---- asynchronous copies (PTX ISA 9.7.9.25, 9.7.9.27) ---------------------------------------------------------------

// One lane of a warp whose lanes are all here, always the same one (PTX ISA 9.7.13.14). The compiler then knows that it is alone:
// behind any other condition it goes through the lanes at each copy, since what describes a copy has to be uniform.
__device__ __forceinline__ bool elect_one() {
    u32 elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

// An opaque tensor map (CUtensorMap); the host encodes it.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// A box of a 2-D tensor to shared memory; column and row of its first element. Completes on `barrier`.
__device__ __forceinline__ void tma_load_2d(void* target, const TensorMap& map, u64* barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(target)),
        "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}

// The map to where TMA looks for it, so that the first box does not wait for it.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The line of an address to L1.
__device__ __forceinline__ void prefetch_l1(const void* address) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(address) : "memory");
}

// `bytes` (a multiple of 16) of plain memory to shared memory. Completes on `barrier`.
__device__ __forceinline__ void bulk_load(void* target, const void* source, u32 bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(target)),
        "l"(source), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// The same of bytes that nobody reads again soon: L2 gives up their lines first.
__device__ __forceinline__ void bulk_load_once(void* target, const void* source, u32 bytes, u64* barrier) {
    asm volatile(
        "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n}" ::"r"(
            shared_address(target)),
        "l"(source), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// `bytes` (a multiple of 16) of shared memory to plain memory, as part of this thread's bulk group.
__device__ __forceinline__ void bulk_store(void* target, const void* source, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(shared_address(source)),
                 "r"(bytes)
                 : "memory");
}

// Closes this thread's bulk group and waits until its writes are done.
__device__ __forceinline__ void bulk_store_wait() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}

// ---- registers of a role (PTX ISA 9.7.19.5) -------------------------------------------------------------------------

template <u32 kRegisters>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <u32 kRegisters>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- warpgroup matrix multiply-accumulate (PTX ISA 9.7.15) ----------------------------------------------------------

// Before the first wgmma of a warpgroup, and whenever registers it reads were written by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins a register around asynchronous wgmma: the compiler may neither move nor copy it across this line.
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void pin(u32& value) { asm volatile("" : "+r"(value)::"memory"); }

// The value in a register that need not be its own: what a vector store wants of the order of registers ends here.
__device__ __forceinline__ float in_any_register(float value) {
    asm volatile("prmt.b32 %0, %1, %1, 0x3210;" : "=f"(value) : "f"(value));
    return value;
}

// Shared-memory matrix descriptor, K-major, no swizzle (PTX ISA 9.7.15.5.1.2): core matrices of 8 rows x 16 bytes, each
// 128 bytes in a row. `k_stride`: bytes from one core matrix to the next along K (LBO), `row_stride`: along M or N (SBO).
__device__ __forceinline__ u64 descriptor_no_swizzle(const void* matrix, u32 k_stride, u32 row_stride) {
    return static_cast<u64>((shared_address(matrix) & 0x3FFFF) >> 4) | static_cast<u64>((k_stride & 0x3FFFF) >> 4) << 16 |
           static_cast<u64>((row_stride & 0x3FFFF) >> 4) << 32;
}

// The same for a tile of 128-byte rows in the 128-byte swizzle, as TMA lays it down: 8 rows x 128 bytes are 1,024 bytes,
// which is also the alignment of the tile. A step of 32 columns adds 32 bytes to the address.
__device__ __forceinline__ u64 descriptor_swizzle_128(const void* matrix) {
    return static_cast<u64>((shared_address(matrix) & 0x3FFFF) >> 4) | static_cast<u64>(1) << 16 |
           static_cast<u64>(1024 >> 4) << 32 | static_cast<u64>(1) << 62;
}

// D[64, N] (+)= A[64, 32] B[N, 32]^T in e4m3, f32 accumulators, by the 128 threads of a warpgroup. scale_d false: D is not
// read and counts as +0. Lane l of warp w holds, in d[4 j + 2 h + i], row 16 w + l / 4 + 8 h and column 8 j + 2 (l % 4) + i;
// in a[h + 2 v], the bytes of row 16 w + l / 4 + 8 h and columns 16 v + 4 (l % 4) + 0..3 (PTX ISA figures of 9.7.15.5.1.1).
//   wgmma_ss: A and B through descriptors.   wgmma_rs: A from registers.
template <int kN>
struct WgmmaE4m3;

// The operand lists of the six widths: names of the first 4, 8, ... registers, and the registers themselves.
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                              \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "  \
             "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128                                                                                             \
    NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "  \
             "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "    \
             "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "    \
             "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define REGISTERS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define REGISTERS_8(i) REGISTERS_4(i), REGISTERS_4(i + 4)
#define REGISTERS_16(i) REGISTERS_8(i), REGISTERS_8(i + 8)
#define REGISTERS_32(i) REGISTERS_16(i), REGISTERS_16(i + 16)
#define REGISTERS_64(i) REGISTERS_32(i), REGISTERS_32(i + 32)
#define REGISTERS_128(i) REGISTERS_64(i), REGISTERS_64(i + 64)

// COUNT = N / 2 accumulators; P0..P5 = COUNT, COUNT + 1, ...: asm operands are numbered by literals only.
#define WGMMA_E4M3(N, COUNT, P0, P1, P2, P3, P4, P5)                                                                   \
    template <>                                                                                                       \
    struct WgmmaE4m3<N> {                                                                                             \
        static __device__ __forceinline__ void ss(float (&d)[COUNT], u64 desc_a, u64 desc_b, bool scale_d) {          \
            asm volatile(                                                                                             \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                                     \
                "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" NAMES_##COUNT "}, %" #P0 ", %" #P1       \
                ", p, 1, 1;\n}"                                                                                       \
                : REGISTERS_##COUNT(0)                                                                                \
                : "l"(desc_a), "l"(desc_b), "r"(static_cast<u32>(scale_d)));                                          \
        }                                                                                                             \
        static __device__ __forceinline__ void rs(float (&d)[COUNT], const u32 (&a)[4], u64 desc_b, bool scale_d) {   \
            asm volatile(                                                                                             \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5 ", 0;\n"                                                     \
                "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" NAMES_##COUNT "}, {%" #P0 ", %" #P1      \
                ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1;\n}"                                                        \
                : REGISTERS_##COUNT(0)                                                                                \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(static_cast<u32>(scale_d)));           \
        }                                                                                                             \
    };

WGMMA_E4M3(8, 4, 4, 5, 6, 7, 8, 9)
WGMMA_E4M3(16, 8, 8, 9, 10, 11, 12, 13)
WGMMA_E4M3(32, 16, 16, 17, 18, 19, 20, 21)
WGMMA_E4M3(64, 32, 32, 33, 34, 35, 36, 37)
WGMMA_E4M3(128, 64, 64, 65, 66, 67, 68, 69)
WGMMA_E4M3(256, 128, 128, 129, 130, 131, 132, 133)

#undef WGMMA_E4M3
#undef REGISTERS_128
#undef REGISTERS_64
#undef REGISTERS_32
#undef REGISTERS_16
#undef REGISTERS_8
#undef REGISTERS_4
#undef NAMES_128
#undef NAMES_64
#undef NAMES_32
#undef NAMES_16
#undef NAMES_8
#undef NAMES_4

template <int kN>
__device__ __forceinline__ void wgmma_ss(float (&d)[kN / 2], u64 desc_a, u64 desc_b, bool scale_d) {
    WgmmaE4m3<kN>::ss(d, desc_a, desc_b, scale_d);
}

template <int kN>
__device__ __forceinline__ void wgmma_rs(float (&d)[kN / 2], const u32 (&a)[4], u64 desc_b, bool scale_d) {
    WgmmaE4m3<kN>::rs(d, a, desc_b, scale_d);
}

}  // namespace ptx
