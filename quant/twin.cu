// The atoms compiled for a GPU: same contracts, same bits as quant/atoms.py. Predicts the chip, so it uses neither the
// tensor core nor the special-function unit: products are summed as the model says, and tables come from a capture.

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
__device__ __forceinline__ float one_nan(float x) { return x != x ? from_bits(kNaN) : x; }

// ---- scalar atoms ---------------------------------------------------------------------------------------------------

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

// ---- element by element ---------------------------------------------------------------------------------------------

struct MapParams {
    const void* x;
    const void* y;
    const void* z;
    void* out;
    i64 count;
    Tables tables;
};

template <typename Out, typename In, typename F>
__device__ __forceinline__ void map(const MapParams& p, F f) {
    const i64 stride = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += stride)
        static_cast<Out*>(p.out)[i] = f(static_cast<const In*>(p.x)[i], i);
}

#define MAP_KERNEL(name, Out, In, expression)                                       \
    extern "C" __global__ void name(const __grid_constant__ MapParams p) {          \
        map<Out, In>(p, [&](In x, i64 i) -> Out { return (void)i, (expression); }); \
    }

MAP_KERNEL(map_rcp_approx, float, float, rcp_approx(x, p.tables))
MAP_KERNEL(map_ex2_approx, float, float, ex2_approx(x, p.tables))
MAP_KERNEL(map_expf, float, float, exp_precise(x, p.tables))
MAP_KERNEL(map_silu_fast, float, float, silu_fast(x, p.tables))
MAP_KERNEL(map_silu_precise, float, float, silu_precise(x, p.tables))
MAP_KERNEL(map_encode_e4m3, u8, float, encode_e4m3(x))
MAP_KERNEL(map_decode_e4m3, float, u8, decode_e4m3(x))
MAP_KERNEL(map_encode_bf16, u16, float, encode_bf16(x))
MAP_KERNEL(map_decode_bf16, float, u16, decode_bf16(x))
MAP_KERNEL(map_fma, float, float,
           one_nan(__fmaf_rn(x, static_cast<const float*>(p.y)[i], static_cast<const float*>(p.z)[i])))

// ---- the FP8 tensor core --------------------------------------------------------------------------------------------

// Exact trick for the cut: with M = copysign(2^(emax + 10), p) the unit in the last place of M is 2^(emax - 13), and
// fma rounded toward zero leaves M + cut(p). All sums of cut terms fit 21 bits, so float additions are exact.

constexpr int kTile = 64, kStep = 32, kThreads = 256, kSide = 4;
constexpr short kNoTerm = -1000;

struct ChainParams {
    const u8* a;  // [rows, depth], a_stride bytes from row to row
    const u8* b;  // [columns, depth]
    float* acc;   // [rows, columns], in place
    i64 a_stride, b_stride;
    int rows, columns, depth;
};

struct ChainStorage {
    float a_value[kStep][kTile], b_value[kStep][kTile];
    u32 a_exponent[kStep][kTile];  // the exponent twice, as two 16-bit halves
    short b_exponent[kStep][kTile];
    int a_nan[kTile], b_nan[kTile];
};

__device__ __forceinline__ void decode_term(u8 code, float& value, short& exponent, bool& nan) {
    const int magnitude = code & 0x7F;
    nan = magnitude == 0x7F;
    const bool dead = nan || magnitude == 0;
    value = dead ? 0.0f : decode_e4m3(code);
    exponent = dead ? kNoTerm : static_cast<short>(max(magnitude >> 3, 1) - 7);
}

__device__ __forceinline__ float finish_step(float c, int emax, float sum) {
    if (emax < -100 || emax > 100) {  // c alone, cut to 13 fraction bits; zero is +0
        const u32 kept = bits_of(c) & ~0x3FFu;
        return from_bits((kept & 0x7FFFFFFF) == 0 ? 0 : kept);
    }
    return from_bits(bits_of(sum) & ~0x3FFu);  // 14 significant bits
}

extern "C" __global__ void __launch_bounds__(kThreads) wgmma_chain(const __grid_constant__ ChainParams p) {
    __shared__ ChainStorage s;
    const int tiles_n = (p.columns + kTile - 1) / kTile;
    const int row0 = blockIdx.x / tiles_n * kTile, column0 = blockIdx.x % tiles_n * kTile;
    const int ty = threadIdx.x / 16 * kSide, tx = threadIdx.x % 16 * kSide;
    if (threadIdx.x < kTile) s.a_nan[threadIdx.x] = s.b_nan[threadIdx.x] = 0;
    __syncthreads();

    float acc[kSide][kSide];
    for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) {
            const bool inside = row0 + ty + i < p.rows && column0 + tx + j < p.columns;
            acc[i][j] = inside ? p.acc[static_cast<i64>(row0 + ty + i) * p.columns + column0 + tx + j] : 0.0f;
        }

    for (int k0 = 0; k0 < p.depth; k0 += kStep) {
        // Four threads a row, eight codes each.
        const int row = threadIdx.x / 4, part = threadIdx.x % 4 * 8;
        u64 a_codes = 0, b_codes = 0;
        if (row0 + row < p.rows) a_codes = *reinterpret_cast<const u64*>(p.a + (row0 + row) * p.a_stride + k0 + part);
        if (column0 + row < p.columns)
            b_codes = *reinterpret_cast<const u64*>(p.b + (column0 + row) * p.b_stride + k0 + part);
        for (int i = 0; i < 8; ++i) {
            float value;
            short exponent;
            bool nan;
            decode_term(a_codes >> (8 * i), value, exponent, nan);
            s.a_value[part + i][row] = value;
            s.a_exponent[part + i][row] = static_cast<u16>(exponent) * 0x10001u;
            if (nan) s.a_nan[row] = 1;
            decode_term(b_codes >> (8 * i), value, exponent, nan);
            s.b_value[part + i][row] = value;
            s.b_exponent[part + i][row] = exponent;
            if (nan) s.b_nan[row] = 1;
        }
        __syncthreads();

        u32 emax2[kSide][kSide / 2];  // two neighbouring outputs a word
        for (int i = 0; i < kSide; ++i)
            for (int j = 0; j < kSide / 2; ++j) emax2[i][j] = static_cast<u16>(kNoTerm) * 0x10001u;
#pragma unroll 8
        for (int k = 0; k < kStep; ++k) {
            const uint4 ea = *reinterpret_cast<const uint4*>(&s.a_exponent[k][ty]);
            const uint2 eb = *reinterpret_cast<const uint2*>(&s.b_exponent[k][tx]);
            const u32 a_pair[kSide] = {ea.x, ea.y, ea.z, ea.w}, b_pair[kSide / 2] = {eb.x, eb.y};
#pragma unroll
            for (int i = 0; i < kSide; ++i)
#pragma unroll
                for (int j = 0; j < kSide / 2; ++j)
                    emax2[i][j] = __viaddmax_s16x2(a_pair[i], b_pair[j], emax2[i][j]);
        }

        float sum[kSide][kSide];
        u32 cut[kSide][kSide];  // bits of 2^(emax + 10)
        int emax[kSide][kSide];
#pragma unroll
        for (int i = 0; i < kSide; ++i)
#pragma unroll
            for (int j = 0; j < kSide; ++j) {
                const u32 c = bits_of(acc[i][j]);
                int largest = static_cast<short>(emax2[i][j / 2] >> (j % 2 * 16));
                if (largest > -100 && (c & 0x7FFFFFFF) != 0) largest = max(largest, max(int(c >> 23 & 0xFF), 1) - 127);
                emax[i][j] = largest;
                cut[i][j] = static_cast<u32>(min(max(largest, -100), 100) + 10 + 127) << 23;
                const float big = from_bits((c & 0x80000000u) | cut[i][j]);
                sum[i][j] = __fadd_rz(acc[i][j], big) - big;
            }
#pragma unroll 8
        for (int k = 0; k < kStep; ++k) {
            const float4 a4 = *reinterpret_cast<const float4*>(&s.a_value[k][ty]);
            const float4 b4 = *reinterpret_cast<const float4*>(&s.b_value[k][tx]);
            const float av[kSide] = {a4.x, a4.y, a4.z, a4.w}, bv[kSide] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
            for (int i = 0; i < kSide; ++i)
#pragma unroll
                for (int j = 0; j < kSide; ++j) {
                    const u32 sign = (bits_of(av[i]) & 0x80000000u) ^ (bits_of(bv[j]) & 0x80000000u);
                    const float big = from_bits(sign | cut[i][j]);
                    sum[i][j] += __fmaf_rz(av[i], bv[j], big) - big;
                }
        }
#pragma unroll
        for (int i = 0; i < kSide; ++i)
#pragma unroll
            for (int j = 0; j < kSide; ++j)
                if ((bits_of(acc[i][j]) >> 23 & 0xFF) != 0xFF)  // infinities and NaN pass through
                    acc[i][j] = finish_step(acc[i][j], emax[i][j], sum[i][j]);
        __syncthreads();
    }

    for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j)
            if (row0 + ty + i < p.rows && column0 + tx + j < p.columns) {
                const bool nan = s.a_nan[ty + i] | s.b_nan[tx + j];
                p.acc[static_cast<i64>(row0 + ty + i) * p.columns + column0 + tx + j] =
                    nan ? from_bits(kNaN) : one_nan(acc[i][j]);
            }
}

// ---- the generator: Philox4x32-10, quant/philox.py --------------------------------------------------------------------

struct CodesParams {
    const u8* lut;  // [256]
    u8* out;        // 16 bytes a block, blocks of 16 padded up
    i64 blocks;
    u64 seed, stream;
};

extern "C" __global__ void philox_codes(const __grid_constant__ CodesParams p) {
    __shared__ u8 lut[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) lut[i] = p.lut[i];
    __syncthreads();
    const i64 stride = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 block = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; block < p.blocks; block += stride) {
        u32 c[4] = {static_cast<u32>(block), static_cast<u32>(block >> 32), static_cast<u32>(p.stream),
                    static_cast<u32>(p.stream >> 32)};
        u32 k0 = static_cast<u32>(p.seed), k1 = static_cast<u32>(p.seed >> 32);
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const u64 p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
            c[0] = static_cast<u32>(p1 >> 32) ^ c[1] ^ k0, c[1] = static_cast<u32>(p1);
            c[2] = static_cast<u32>(p0 >> 32) ^ c[3] ^ k1, c[3] = static_cast<u32>(p0);
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        u32 word[4];
        for (int lane = 0; lane < 4; ++lane) {
            word[lane] = 0;
            for (int byte = 0; byte < 4; ++byte) word[lane] |= static_cast<u32>(lut[c[lane] >> (8 * byte) & 0xFF]) << (8 * byte);
        }
        reinterpret_cast<uint4*>(p.out)[block] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}
