// The atoms as kernels: the same contracts and the same bits as quant/atoms.py. It predicts the chip, so it uses
// neither the tensor core nor the special-function unit: products are summed as the model says, and the unit's results
// come from a capture.
#include "tensor_core.cuh"
#include "twin_atoms.cuh"

// ---- element by element ---------------------------------------------------------------------------------------------

struct MapParams {
    const void* x_ptr;  // [count], as y, z and out
    const void* y_ptr;  // null unless the function has a second operand, and a third
    const void* z_ptr;
    void* out_ptr;
    i64 count;
    Tables tables;
};

template <typename Out, typename In, typename F>
__device__ __forceinline__ void map(const MapParams& params, F f) {
    const i64 stride = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < params.count; i += stride)
        static_cast<Out*>(params.out_ptr)[i] = f(static_cast<const In*>(params.x_ptr)[i], i);
}

#define MAP_KERNEL(name, Out, In, expression)                                            \
    extern "C" __global__ void name(const __grid_constant__ MapParams params) {          \
        map<Out, In>(params, [&](In x, i64 i) -> Out { return (void)i, (expression); }); \
    }

MAP_KERNEL(map_rcp_approx, float, float, rcp_approx(x, params.tables))
MAP_KERNEL(map_ex2_approx, float, float, ex2_approx(x, params.tables))
MAP_KERNEL(map_expf, float, float, exp_precise(x, params.tables))
MAP_KERNEL(map_silu_fast, float, float, silu_fast(x, params.tables))
MAP_KERNEL(map_silu_precise, float, float, silu_precise(x, params.tables))
MAP_KERNEL(map_encode_e4m3, u8, float, encode_e4m3(x))
MAP_KERNEL(map_decode_e4m3, float, u8, decode_e4m3(x))
MAP_KERNEL(map_encode_bf16, u16, float, encode_bf16(x))
MAP_KERNEL(map_decode_bf16, float, u16, decode_bf16(x))
MAP_KERNEL(map_fma, float, float,
           one_nan(__fmaf_rn(x, static_cast<const float*>(params.y_ptr)[i],
                             static_cast<const float*>(params.z_ptr)[i])))

// ---- the FP8 tensor core --------------------------------------------------------------------------------------------

// How a term is cut exactly: with M = copysign(2^(emax + 10), p) the unit in the last place of M is 2^(emax - 13), so
// an fma that is rounded toward zero leaves M + cut(p). All sums of cut terms fit into 21 bits, so float additions of
// them are exact.

// A thread block computes kTile x kTile outputs, a thread kSide x kSide of them.
constexpr int kTile = 64, kStep = 32, kThreads = 256, kSide = 4;

struct ChainParams {
    const u8* a_ptr;         // e4m3 [num_rows, depth]
    const u8* b_ptr;         // e4m3 [num_columns, depth]
    float* acc_ptr;          // [num_rows, num_columns]: c, which the result replaces
    i64 a_stride, b_stride;  // bytes from one row to the next, a multiple of 8
    int num_rows, num_columns, depth;
};

// The operands of one k32 step in shared memory, decoded.
struct ChainStorage {
    float a_value[kStep][kTile], b_value[kStep][kTile];
    u32 a_exponent[kStep][kTile];  // each exponent twice, as two 16-bit halves
    short b_exponent[kStep][kTile];
    int a_nan[kTile], b_nan[kTile];  // whether the row of a or b holds a NaN
};

// acc = the chain of k32 steps over the whole depth from acc, in ascending k; see atoms.wgmma_chain.

extern "C" __global__ void __launch_bounds__(kThreads) wgmma_chain(const __grid_constant__ ChainParams params) {
    __shared__ ChainStorage storage;
    const int tiles_n = (params.num_columns + kTile - 1) / kTile;
    const int row0 = blockIdx.x / tiles_n * kTile, column0 = blockIdx.x % tiles_n * kTile;
    const int ty = threadIdx.x / 16 * kSide, tx = threadIdx.x % 16 * kSide;
    if (threadIdx.x < kTile) storage.a_nan[threadIdx.x] = storage.b_nan[threadIdx.x] = 0;
    __syncthreads();

    float acc[kSide][kSide];
    for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) {
            const bool inside = row0 + ty + i < params.num_rows && column0 + tx + j < params.num_columns;
            acc[i][j] =
                inside ? params.acc_ptr[static_cast<i64>(row0 + ty + i) * params.num_columns + column0 + tx + j] : 0.0f;
        }

    for (int k0 = 0; k0 < params.depth; k0 += kStep) {
        // Four threads decode a row of either operand, eight codes each.
        const int row = threadIdx.x / 4, part = threadIdx.x % 4 * 8;
        u64 a_codes = 0, b_codes = 0;
        if (row0 + row < params.num_rows)
            a_codes = *reinterpret_cast<const u64*>(params.a_ptr + (row0 + row) * params.a_stride + k0 + part);
        if (column0 + row < params.num_columns)
            b_codes = *reinterpret_cast<const u64*>(params.b_ptr + (column0 + row) * params.b_stride + k0 + part);
        for (int i = 0; i < 8; ++i) {
            float value;
            short exponent;
            bool nan;
            decode_term(a_codes >> (8 * i), value, exponent, nan);
            storage.a_value[part + i][row] = value;
            storage.a_exponent[part + i][row] = static_cast<u16>(exponent) * 0x10001u;
            if (nan) storage.a_nan[row] = 1;
            decode_term(b_codes >> (8 * i), value, exponent, nan);
            storage.b_value[part + i][row] = value;
            storage.b_exponent[part + i][row] = exponent;
            if (nan) storage.b_nan[row] = 1;
        }
        __syncthreads();

        u32 emax2[kSide][kSide / 2];  // largest exponents, those of two neighbouring outputs in a word
        for (int i = 0; i < kSide; ++i)
            for (int j = 0; j < kSide / 2; ++j) emax2[i][j] = static_cast<u16>(kNoTerm) * 0x10001u;
#pragma unroll 8
        for (int k = 0; k < kStep; ++k) {
            const uint4 ea = *reinterpret_cast<const uint4*>(&storage.a_exponent[k][ty]);
            const uint2 eb = *reinterpret_cast<const uint2*>(&storage.b_exponent[k][tx]);
            const u32 a_pair[kSide] = {ea.x, ea.y, ea.z, ea.w}, b_pair[kSide / 2] = {eb.x, eb.y};
#pragma unroll
            for (int i = 0; i < kSide; ++i)
#pragma unroll
                for (int j = 0; j < kSide / 2; ++j) emax2[i][j] = __viaddmax_s16x2(a_pair[i], b_pair[j], emax2[i][j]);
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
            const float4 a4 = *reinterpret_cast<const float4*>(&storage.a_value[k][ty]);
            const float4 b4 = *reinterpret_cast<const float4*>(&storage.b_value[k][tx]);
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
            if (row0 + ty + i < params.num_rows && column0 + tx + j < params.num_columns) {
                const bool nan = storage.a_nan[ty + i] | storage.b_nan[tx + j];
                params.acc_ptr[static_cast<i64>(row0 + ty + i) * params.num_columns + column0 + tx + j] =
                    nan ? from_bits(kNaN) : one_nan(acc[i][j]);
            }
}

// ---- the generator: Philox4x32-10, quant/philox.py ------------------------------------------------------------------

struct CodesParams {
    const u8* lut_ptr;  // [256]
    u8* out_ptr;        // [16 * num_blocks]: a Philox block gives 16 bytes
    i64 num_blocks;
    u64 seed, stream;
};

extern "C" __global__ void philox_codes(const __grid_constant__ CodesParams params) {
    __shared__ u8 lut[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) lut[i] = params.lut_ptr[i];
    __syncthreads();
    const i64 stride = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 block_idx = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; block_idx < params.num_blocks;
         block_idx += stride) {
        u32 c[4] = {static_cast<u32>(block_idx), static_cast<u32>(block_idx >> 32), static_cast<u32>(params.stream),
                    static_cast<u32>(params.stream >> 32)};
        u32 k0 = static_cast<u32>(params.seed), k1 = static_cast<u32>(params.seed >> 32);
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
            for (int byte = 0; byte < 4; ++byte)
                word[lane] |= static_cast<u32>(lut[c[lane] >> (8 * byte) & 0xFF]) << (8 * byte);
        }
        reinterpret_cast<uint4*>(params.out_ptr)[block_idx] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}
