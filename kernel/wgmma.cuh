// Warpgroup matrix multiply-accumulate (PTX ISA 9.7.15): the tensor-core instructions of ptx.cuh, which includes this
// file.
#pragma once

namespace ptx {

// wgmma.fence: needed before the first wgmma of a warpgroup, and whenever other instructions have written registers
// that the next wgmma reads.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of all wgmma that this warpgroup has issued since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps a value in its register while asynchronous wgmma use that register: the compiler can neither move nor copy the
// value across this line.
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void pin(u32& value) { asm volatile("" : "+r"(value)::"memory"); }

// Returns the same value by a permutation that the compiler cannot see through, so that the result may be in another
// register. A vector store demands neighbouring registers; this ends the demand at the store, and the source stays
// free.
__device__ __forceinline__ float in_any_register(float value) {
    asm volatile("prmt.b32 %0, %1, %1, 0x3210;" : "=f"(value) : "f"(value));
    return value;
}

// Shared-memory matrix descriptor of a K-major matrix without swizzle (PTX ISA 9.7.15.5.1.2). The matrix is made of
// core matrices of 8 rows x 16 bytes, whose 128 bytes are contiguous. `k_stride` is the number of bytes from one core
// matrix to the next along K (LBO), `row_stride` along M or N (SBO).
__device__ __forceinline__ u64 descriptor_no_swizzle(const void* matrix, u32 k_stride, u32 row_stride) {
    return static_cast<u64>((shared_address(matrix) & 0x3FFFF) >> 4) |
           static_cast<u64>((k_stride & 0x3FFFF) >> 4) << 16 | static_cast<u64>((row_stride & 0x3FFFF) >> 4) << 32;
}

// Shared-memory matrix descriptor of a tile with 128-byte rows in the 128-byte swizzle, as TMA writes it. 8 rows are
// 1,024 bytes, and the tile must be aligned to 1,024 bytes. A step of 32 columns along K adds 32 bytes to the address.
__device__ __forceinline__ u64 descriptor_swizzle_128(const void* matrix) {
    return static_cast<u64>((shared_address(matrix) & 0x3FFFF) >> 4) | static_cast<u64>(1) << 16 |
           static_cast<u64>(1024 >> 4) << 32 | static_cast<u64>(1) << 62;
}

// wgmma_ss and wgmma_rs: D[64, N] (+)= A[64, 32] B[N, 32]^T in e4m3 with f32 accumulators, by the 128 threads of a
// warpgroup. With scale_d = false D is not read and counts as +0. wgmma_ss takes A and B through descriptors, wgmma_rs
// takes A from registers. Lane l of warp w holds in d[4 j + 2 h + i] row 16 w + l / 4 + 8 h and column 8 j + 2 (l % 4)
// + i of D, and in a[h + 2 v] the bytes of row 16 w + l / 4 + 8 h and columns 16 v + 4 (l % 4) + 0..3 of A (PTX ISA,
// figures of 9.7.15.5.1.1).
template <int kN>
struct WgmmaE4m3;

// The operand lists of the six widths: the names of the first 4, 8, ... accumulators, and the accumulators themselves.
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                   \
    NAMES_32                                                                                       \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128                                                                                  \
    NAMES_64                                                                                       \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
    "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "   \
    "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "   \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define REGISTERS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define REGISTERS_8(i) REGISTERS_4(i), REGISTERS_4(i + 4)
#define REGISTERS_16(i) REGISTERS_8(i), REGISTERS_8(i + 8)
#define REGISTERS_32(i) REGISTERS_16(i), REGISTERS_16(i + 16)
#define REGISTERS_64(i) REGISTERS_32(i), REGISTERS_32(i + 32)
#define REGISTERS_128(i) REGISTERS_64(i), REGISTERS_64(i + 64)

// COUNT = N / 2 accumulators. P0..P5 = COUNT, COUNT + 1, ... are the numbers of the operands behind them, which asm
// takes as literals only.
#define WGMMA_E4M3(N, COUNT, P0, P1, P2, P3, P4, P5)                                                                 \
    template <>                                                                                                      \
    struct WgmmaE4m3<N> {                                                                                            \
        static __device__ __forceinline__ void ss(float (&d)[COUNT], u64 desc_a, u64 desc_b, bool scale_d) {         \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2                                                    \
                         ", 0;\n"                                                                                    \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" NAMES_##COUNT                  \
                         "}, %" #P0 ", %" #P1 ", p, 1, 1;\n}"                                                        \
                         : REGISTERS_##COUNT(0)                                                                      \
                         : "l"(desc_a), "l"(desc_b), "r"(static_cast<u32>(scale_d)));                                \
        }                                                                                                            \
        static __device__ __forceinline__ void rs(float (&d)[COUNT], const u32 (&a)[4], u64 desc_b, bool scale_d) {  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5                                                    \
                         ", 0;\n"                                                                                    \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" NAMES_##COUNT                  \
                         "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1;\n}"                        \
                         : REGISTERS_##COUNT(0)                                                                      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(static_cast<u32>(scale_d))); \
        }                                                                                                            \
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
