// The functions of kernel/ptx.cuh for the machine of machine.hpp, under the same names; this file takes the place of
// ptx.cuh. The arithmetic is that of quant/twin.cu, which predicts the chip.
#pragma once
#include "cuda.hpp"

// The twin's functions belong to the machine, the kernel's to the kernel.
#undef __device__
#undef __forceinline__
#define __device__ MACHINE
#define __forceinline__
#include "../../quant/tensor_core.cuh"
#include "../../quant/twin_atoms.cuh"
#undef __device__
#undef __forceinline__
#define __device__
#define __forceinline__ inline

// The kernel runs on a stack of the host, so its thread block finds its shared memory through the machine.
#define DYNAMIC_SHARED_MEMORY(name) u8* const name = emu::dynamic_shared()

namespace emu {

inline Tables tables;  // set before a run

// 32 codes of a row as decode_term decodes them; nan: whether any code is a NaN.
struct Terms {
    float values[32];
    int exponents[32];
    bool nan = false;
};

struct Decoder {
    float values[256];
    int exponents[256];
    bool nans[256];

    Decoder() {
        for (u32 code = 0; code < 256; ++code) {
            short exponent;
            decode_term(code, values[code], exponent, nans[code]);
            exponents[code] = exponent;
        }
    }
};

MACHINE Terms terms_of(const u8* codes) {
    static const Decoder decoder;
    Terms found;
    for (u32 k = 0; k < 32; ++k) {
        found.values[k] = decoder.values[codes[k]], found.exponents[k] = decoder.exponents[codes[k]];
        found.nan |= decoder.nans[codes[k]];
    }
    return found;
}

// Returns c plus 32 products as the tensor core adds them up.
MACHINE float wgmma_step(float c, const Terms& a, const Terms& b) {
    int emax = kNoTerm;
    for (u32 k = 0; k < 32; ++k) emax = max(emax, a.exponents[k] + b.exponents[k]);
    if (a.nan || b.nan || c != c) return from_bits(kNaN);
    if (emax < -100) return finish_step(c, emax, 0.0f);
    if (c != 0.0f) emax = max(emax, max(static_cast<int>(bits_of(c) >> 23 & 0xFF), 1) - 127);
    const float scale = pow2(13 - emax);
    int total = static_cast<int>(c * scale);
    for (u32 k = 0; k < 32; ++k) total += static_cast<int>(a.values[k] * b.values[k] * scale);  // cut toward zero
    return from_bits(bits_of(static_cast<float>(total)) & ~0x3FFu) * pow2(emax - 13);
}

// Where the 128-byte swizzle stores what has this address without it. Tiles are aligned to 1,024 bytes.
MACHINE const u8* swizzled(u64 address) { return reinterpret_cast<const u8*>(address ^ (address >> 7 & 7) << 4); }

}  // namespace emu

namespace ptx {

// ---- arithmetic -----------------------------------------------------------------------------------------------------

MACHINE float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
MACHINE float fma_rn_sat(float a, float b, float c) {
    const float d = fmaf(a, b, c);
    return d != d ? 0.0f : fminf(fmaxf(d, 0.0f), 1.0f);
}
MACHINE float fma_rm(float a, float b, float c) {
    const double exact = static_cast<double>(a) * b + c;
    const float d = static_cast<float>(exact);
    return d > exact ? nextafterf(d, -INFINITY) : d;
}
MACHINE float rcp_rn(float x) { return 1.0f / x; }
MACHINE float rcp_approx(float x) { return ::rcp_approx(x, emu::tables); }
MACHINE float ex2_approx(float x) { return ::ex2_approx(x, emu::tables); }
MACHINE u16 cvt_e4m3x2(float high, float low) { return static_cast<u16>(encode_e4m3(high) << 8 | encode_e4m3(low)); }
MACHINE u16 cvt_bf16(float x) { return encode_bf16(x); }

// ---- order: every write is seen at once, so a fence at most lets other fibers go on ---------------------------------

MACHINE void fence_proxy_async() {}
MACHINE void fence_proxy_async_all() {}
MACHINE void fence_system() { emu::yield(); }
MACHINE void fence_mbarrier_init() {}
MACHINE u32 load_acquire(const u32* address) { return emu::yield(), *address; }
MACHINE u32 load_relaxed(const u32* address) { return *address; }
MACHINE uint4 load_volatile(const uint4* address) { return *address; }
MACHINE u32 load_volatile(const u32* address) { return *address; }
MACHINE u32 atomic_add(u32* address, u32 value) {
    emu::yield();
    const u32 before = *address;
    *address += value;
    return before;
}
MACHINE u32 atomic_add_shared(u32* address, u32 value) { return atomic_add(address, value); }
MACHINE u32 atomic_add_acq_rel(u32* address, u32 value) { return atomic_add(address, value); }
MACHINE u32 atomic_cas(u32* address, u32 expected, u32 value) {
    const u32 before = *address;
    if (before == expected) *address = value;
    return before;
}
MACHINE void reduce_add_release(u32* address, u32 value) { atomic_add(address, value); }
MACHINE void reduce_add_release_system(u32* address, u32 value) { atomic_add(address, value); }
MACHINE u64 global_timer() { return emu::yield(), 1000 * emu::machine->steps; }  // a step counts as a microsecond

// ---- shared memory --------------------------------------------------------------------------------------------------

template <typename Tag>
inline u32& shared_word() {
    static const char key = 0;
    return emu::shared_word(&key);
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

MACHINE void mbarrier_init(u64* barrier, u32 arrivals) { emu::machine->mbarriers[barrier] = {arrivals, arrivals}; }
MACHINE void mbarrier_arrive(u64* barrier) { emu::yield(), emu::arrive(barrier); }
MACHINE void mbarrier_arrive_expect(u64* barrier, u32 bytes) { emu::yield(), emu::arrive(barrier, bytes); }
MACHINE bool mbarrier_test_wait(u64* barrier, u32 parity) {
    emu::yield();
    return emu::mbarrier(barrier).phase != parity;
}
// As on the chip it may return before the phase has completed; here it does so only after other fibers have run.
MACHINE bool mbarrier_try_wait(u64* barrier, u32 parity) {
    if (mbarrier_test_wait(barrier, parity)) return true;
    emu::block_on(emu::mbarrier(barrier).waiting, "an mbarrier");
    return emu::mbarrier(barrier).phase != parity;
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

// What the emulator's host writes: the base, rows, columns, bytes from one row to the next, and the rows of a box of
// 128 columns.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

MACHINE void tma_load_2d(void* target, const TensorMap& map, u64* barrier, int column, int row) {
    const u8* base = reinterpret_cast<const u8*>(map.opaque[0]);
    const u64 rows = map.opaque[1], columns = map.opaque[2], stride = map.opaque[3], box = map.opaque[4];
    emu::machine->jobs.push_back([=] {
        const u64 to = reinterpret_cast<u64>(target);
        for (u64 r = 0; r < box; ++r)
            for (u64 c = 0; c < 128; c += 16) {
                u8* place = const_cast<u8*>(emu::swizzled(to + r * 128 + c));
                if (row + r < rows && column + c < columns) memcpy(place, base + (row + r) * stride + column + c, 16);
                else memset(place, 0, 16);
            }
        emu::landed(barrier, box * 128);
    });
    emu::yield();
}
MACHINE bool elect_one() { return __syncwarp(), threadIdx.x % 32 == 31; }  // which lane it is must not matter
MACHINE void prefetch_l1(const void*) {}
MACHINE void prefetch_tensor_map(const TensorMap&) {}
MACHINE void bulk_load(void* target, const void* source, u32 bytes, u64* barrier) {
    emu::machine->jobs.push_back([=] {
        memcpy(target, source, bytes);
        emu::landed(barrier, bytes);
    });
    emu::yield();
}
MACHINE void bulk_load_once(void* target, const void* source, u32 bytes, u64* barrier) {
    bulk_load(target, source, bytes, barrier);
}
MACHINE void bulk_store(void* target, const void* source, u32 bytes) {
    emu::Fiber* fiber = emu::machine->current;
    fiber->stores_under_way += 1;
    emu::machine->jobs.push_back([=] {
        memcpy(target, source, bytes);
        if (--fiber->stores_under_way == 0) emu::wake(fiber->store_waiters);
    });
}
MACHINE void bulk_store_wait() {
    emu::Fiber* fiber = emu::machine->current;
    while (fiber->stores_under_way != 0) emu::block_on(fiber->store_waiters, "its bulk stores");
}

// ---- registers of a role --------------------------------------------------------------------------------------------

MACHINE void set_registers(u32 registers) {
    emu::Block& block = *emu::machine->current->block;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        emu::Warp& warp = emu::warp();
        if (registers <= warp.registers) {
            block.free_registers += 32 * (warp.registers - registers);
            emu::wake(block.want_registers);
        } else {
            while (block.free_registers < 32 * (registers - warp.registers))
                emu::block_on(block.want_registers, "registers");
            block.free_registers -= 32 * (registers - warp.registers);
        }
        warp.registers = registers;
    }
    __syncwarp();
}
template <u32 kRegisters>
inline void more_registers() {
    set_registers(kRegisters);
}
template <u32 kRegisters>
inline void fewer_registers() {
    set_registers(kRegisters);
}

// ---- wgmma: operands are read when it is waited for, the latest moment at which the chip may read them --------------

MACHINE void wgmma_fence() {}
MACHINE void wgmma_commit() { emu::yield(); }
MACHINE void pin(float&) {}
MACHINE void pin(u32&) {}
MACHINE u64 descriptor_swizzle_128(const void* matrix) { return reinterpret_cast<u64>(matrix) >> 4; }

MACHINE void multiply(const emu::Product& product) {
    const u32 row = product.thread / 32 * 16 + product.thread % 32 / 4, column = product.thread % 4 * 2;
    const u64 first_a = (product.desc_a << 4) + row * 128, first_b = (product.desc_b << 4) + column * 128;
    const auto load = [](u64 address) {
        u8 codes[32];
        memcpy(codes, emu::swizzled(address), 16), memcpy(codes + 16, emu::swizzled(address + 16), 16);
        return emu::terms_of(codes);
    };
    const emu::Terms a[2] = {load(first_a), load(first_a + 8 * 128)};
    for (u32 j = 0; j < product.num_sums / 4; ++j)
        for (u32 i = 0; i < 2; ++i) {
            const emu::Terms b = load(first_b + (8 * j + i) * 128);
            for (u32 half = 0; half < 2; ++half) {
                float& sum = product.sums[4 * j + 2 * half + i];
                sum = emu::wgmma_step(product.scale_d ? sum : 0.0f, a[half], b);
            }
        }
}

template <int kN>
inline void wgmma_ss(float (&d)[kN / 2], u64 desc_a, u64 desc_b, bool scale_d) {
    emu::machine->current->chain.push_back({d, desc_a, desc_b, threadIdx.x % 128, kN / 2, scale_d});
}
MACHINE void wgmma_wait_all() {
    emu::yield();
    for (const emu::Product& product : emu::machine->current->chain) multiply(product);
    emu::machine->current->chain.clear();
}
template <int kPending>
inline void wgmma_wait() {
    static_assert(kPending == 0);
    wgmma_wait_all();
}

}  // namespace ptx
