// The scalar atoms for a GPU: the same contracts and the same bits as quant/atoms.py. They predict the special-function
// unit, so they do not use it: its results come from captured tables. twin.cu is made of them, and so is the CPU
// emulator of the kernel.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr u32 kNaN = 0x7FFFFFFFu;
constexpr float kLog2E = 0x1.715476p+0f;

__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float from_bits(u32 b) { return __uint_as_float(b); }
__device__ __forceinline__ float pow2(int e) { return from_bits(static_cast<u32>(e + 127) << 23); }  // e in [-126, 127]
// Returns x, with any NaN as the one that SM90 arithmetic produces.
__device__ __forceinline__ float one_nan(float x) { return x != x ? from_bits(kNaN) : x; }

// ---- scalar atoms ---------------------------------------------------------------------------------------------------

// What the special-function unit returned when it was captured; 2^23 results each.
struct Tables {
    const int* rcp;  // fp32 bits of rcp.approx over [1, 2)
    const int* ex2;  // fp32 bits of ex2.approx over [0, 1)
};

__device__ float rcp_approx(float x, Tables tables) {
    const u32 bits = bits_of(x), sign = bits & 0x80000000u, field = bits >> 23 & 0xFF, mantissa = bits & 0x7FFFFF;
    if (x != x) return from_bits(kNaN);
    if (field == 0) return from_bits(sign | 0x7F800000u);
    if (field > 253 || (field == 253 && mantissa != 0)) return from_bits(sign);
    return from_bits(sign | (static_cast<u32>(tables.rcp[mantissa]) + ((127u - field) << 23)));
}

__device__ float ex2_approx(float x, Tables tables) {
    const u32 bits = bits_of(x);
    if (x != x) return from_bits(kNaN);
    const int field = bits >> 23 & 0xFF;
    i64 fixed = 0;  // |x| cut to 23 fraction bits
    if (field > 0) {
        const i64 significand = (bits & 0x7FFFFF) | 0x800000;
        fixed = field >= 127 ? significand << min(field - 127, 16) : significand >> min(127 - field, 31);
    }
    int index = static_cast<int>(fixed & 0x7FFFFF);
    i64 n = fixed >> 23;
    if (bits >> 31) {
        n = -n;
        if (index != 0) n -= 1, index = 0x7FFFFF - index;  // one's complement
    }
    if (n > 127) return from_bits(0x7F800000u);
    if (n < -126) return 0.0f;
    return from_bits(static_cast<u32>(tables.ex2[index]) + (static_cast<u32>(n) << 23));
}

__device__ float exp_precise(float x, Tables tables) {
    float t = __fmaf_rn(x, from_bits(0x3BBB989Du), 0.5f);
    t = t != t ? 0.0f : fminf(fmaxf(t, 0.0f), 1.0f);
    const int n = static_cast<int>(floor(static_cast<double>(t) * 252.0)) - 126;
    float f = __fmaf_rn(x, kLog2E, static_cast<float>(-n));
    f = __fmaf_rn(x, from_bits(0x32A57060u), f);
    return one_nan(ex2_approx(f, tables) * pow2(n));
}

__device__ float silu_fast(float x, Tables tables) {
    return one_nan(x * rcp_approx(1.0f + ex2_approx(-x * kLog2E, tables), tables));
}

__device__ float silu_precise(float x, Tables tables) {
    return one_nan(x * __fdiv_rn(1.0f, 1.0f + exp_precise(-x, tables)));
}

__device__ u8 encode_e4m3(float x) {
    const u32 bits = bits_of(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000u) return 0x7F;
    if (magnitude >= 0x43E00000u) return sign | 0x7E;  // 448
    if (magnitude < 0x3C800000u)                       // below 2^-6: a multiple of 2^-9, nearest even
        return sign | (bits_of(from_bits(magnitude) + 16384.0f) - 0x46800000u);
    const u32 rounded = (magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20;
    return sign | min(rounded - (120u << 3), 0x7Eu);
}

__device__ float decode_e4m3(u8 code) {
    const u32 magnitude = code & 0x7F, sign = static_cast<u32>(code & 0x80) << 24;
    if (magnitude == 0x7F) return from_bits(kNaN);
    if (magnitude < 8) return from_bits(bits_of(static_cast<float>(magnitude) * 0x1p-9f) | sign);
    return from_bits(((magnitude << 20) + (120u << 23)) | sign);
}

__device__ u16 encode_bf16(float x) {
    const u32 bits = bits_of(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000u) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

__device__ float decode_bf16(u16 code) { return one_nan(from_bits(static_cast<u32>(code) << 16)); }
