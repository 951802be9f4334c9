// What one step of the FP8 tensor core does with a term and with a sum, shared by twin.cu and the CPU emulator of the
// kernel. The rule is that of atoms.wgmma_e4m3: 33 terms are aligned to the largest exponent, cut toward zero to 13
// fraction bits and summed exactly.
#pragma once
#include "twin_atoms.cuh"

// Exponent of a term that is zero. It loses to every real one, which is at least -12, and still does when another
// exponent is added.
constexpr short kNoTerm = -1000;

// Writes value and exponent of an E4M3 code. The exponent is that of the significand before normalisation: a product's
// exponent is the sum of both. A code that is zero or NaN is no term.
__device__ __forceinline__ void decode_term(u8 code, float& value, short& exponent, bool& nan) {
    const int magnitude = code & 0x7F;
    nan = magnitude == 0x7F;
    const bool dead = nan || magnitude == 0;
    value = dead ? 0.0f : decode_e4m3(code);
    exponent = dead ? kNoTerm : static_cast<short>(max(magnitude >> 3, 1) - 7);
}

// Returns the result of a step whose terms, c included, sum up to `sum`. emax is the largest exponent, far outside of
// [-100, 100] if no product is a term.
__device__ __forceinline__ float finish_step(float c, int emax, float sum) {
    if (emax < -100 || emax > 100) {  // c alone, cut to 13 fraction bits; zero is +0
        const u32 kept = bits_of(c) & ~0x3FFu;
        return from_bits((kept & 0x7FFFFFFF) == 0 ? 0 : kept);
    }
    return from_bits(bits_of(sum) & ~0x3FFu);  // 14 significant bits
}
