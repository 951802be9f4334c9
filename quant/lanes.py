"""Thirty-two lanes at a time: the inner loops of the CPU twin, as LLVM vector operations for numba.

LLVM's own vectoriser leaves these reductions scalar; written as <32 x i32> they become whatever vectors the CPU has.
Integer sums and maxima are exact in any order, so the vector width changes no bit.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from megaproof.quant.philox import MULTIPLIERS, ROUNDS, WEYL

LANES = 32
BLOCKS = 8
"""Philox blocks side by side."""
NO_TERM = -64
"""Exponent of a zero operand. It loses to every real sum, which is at least -12, and the sum of two fits in a byte."""

_I1, _I8, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES, _INTS, _FLOATS = (ir.VectorType(t, LANES) for t in (_I8, _I32, _F32))
_LONGS = ir.VectorType(_I64, BLOCKS)


def _splat(scalar: ir.Type, value: float, lanes: int = LANES) -> ir.Constant:
    return ir.Constant(ir.VectorType(scalar, lanes), [ir.Constant(scalar, value)] * lanes)


def _everywhere(builder, scalar, vector):  # noqa: ANN001, ANN202
    """Returns a vector whose lanes all hold a scalar that is only known at run time."""
    undefined, mask = ir.Constant(vector, ir.Undefined), ir.VectorType(_I32, vector.count)
    one = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(mask, [ir.Constant(_I32, 0)] * vector.count))


def _joined(builder, a, b):  # noqa: ANN001, ANN202
    """Returns a vector of the lanes of a, followed by those of b."""
    count = 2 * a.type.count
    mask = ir.Constant(ir.VectorType(_I32, count), [ir.Constant(_I32, n) for n in range(count)])
    return builder.shuffle_vector(a, b, mask)


def _pointer(context, builder, array_type, array, index, vector):  # noqa: ANN001, ANN202
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _reduce(builder, name, vector, scalar):  # noqa: ANN001, ANN202
    suffix = f"v{LANES}i{scalar.width}"
    signature = ir.FunctionType(scalar, [vector.type])
    function = builder.module.declare_intrinsic(f"llvm.vector.reduce.{name}.{suffix}", fnty=signature)
    return builder.call(function, [vector])


@intrinsic
def decode(typingctx, codes, i, value, exponent, j):  # noqa: ANN001, ANN201
    """E4M3 codes[i : i + 32] -> value[j : j + 32] (float32), exponent[j : j + 32] (int8, unnormalised).

    Zero codes get exponent NO_TERM; a NaN's are those of 480, and mean nothing. Returns whether any code was a NaN.
    """

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        array, start, out_value, out_exponent, out_start = args
        codes = builder.load(_pointer(context, builder, signature.args[0], array, start, _BYTES), align=1)
        magnitude = builder.and_(codes, _splat(_I8, 0x7F))
        nan = builder.icmp_signed("==", magnitude, _splat(_I8, 0x7F))
        zero = builder.icmp_signed("==", magnitude, _splat(_I8, 0))
        field = builder.lshr(magnitude, _splat(_I8, 3))
        field = builder.select(builder.icmp_signed("<", field, _splat(_I8, 1)), _splat(_I8, 1), field)
        power = builder.select(zero, _splat(_I8, NO_TERM), builder.sub(field, _splat(_I8, 7)))
        target = _pointer(context, builder, signature.args[3], out_exponent, out_start, _BYTES)
        builder.store(power, target, align=1)

        code = builder.zext(codes, _INTS)
        magnitude = builder.and_(code, _splat(_I32, 0x7F))
        bits = builder.add(builder.shl(magnitude, _splat(_I32, 20)), _splat(_I32, 120 << 23))
        # Of a subnormal this is 1.m * 2^-7; 1.m * 2^-6 less 2^-6 is 0.m * 2^-6.
        below = builder.icmp_signed("<", magnitude, _splat(_I32, 8))
        bits = builder.add(bits, builder.select(below, _splat(_I32, 1 << 23), _splat(_I32, 0)))
        hidden = builder.select(below, _splat(_F32, 2.0**-6), _splat(_F32, 0.0))
        size = builder.bitcast(builder.fsub(builder.bitcast(bits, _FLOATS), hidden), _INTS)
        sign = builder.shl(builder.and_(code, _splat(_I32, 0x80)), _splat(_I32, 24))
        target = _pointer(context, builder, signature.args[2], out_value, out_start, _FLOATS)
        builder.store(builder.bitcast(builder.or_(size, sign), _FLOATS), target, align=4)
        return _reduce(builder, "or", nan, _I1)

    return types.boolean(codes, types.intp, value, exponent, types.intp), codegen


@intrinsic
def max_exponent(typingctx, a, i, b, j):  # noqa: ANN001, ANN201
    """max over k of a[i + k] + b[j + k], exponents of `decode`, 32 lanes. Below -12 where every product is zero."""

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        array_a, start_a, array_b, start_b = args
        x = builder.load(_pointer(context, builder, signature.args[0], array_a, start_a, _BYTES), align=1)
        y = builder.load(_pointer(context, builder, signature.args[2], array_b, start_b, _BYTES), align=1)
        return builder.sext(_reduce(builder, "smax", builder.add(x, y), _I8), _I32)

    return types.int32(a, types.intp, b, types.intp), codegen


@intrinsic
def cut_sum(typingctx, a, i, b, j, scale):  # noqa: ANN001, ANN201
    """sum over k of int(a[i + k] * b[j + k] * scale), each cut toward zero, int32, 32 lanes."""

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        array_a, start_a, array_b, start_b, factor = args
        x = builder.load(_pointer(context, builder, signature.args[0], array_a, start_a, _FLOATS), align=4)
        y = builder.load(_pointer(context, builder, signature.args[2], array_b, start_b, _FLOATS), align=4)
        factors = _everywhere(builder, factor, _FLOATS)
        terms = builder.fptosi(builder.fmul(builder.fmul(x, y), factors), _INTS)
        return _reduce(builder, "add", terms, _I32)

    return types.int32(a, types.intp, b, types.intp, types.float32), codegen


@intrinsic
def philox(typingctx, seed, stream, block, raw):  # noqa: ANN001, ANN201
    """raw[0 : 128] = the 16 bytes of each of the blocks `block` to `block + 7`, all uint64; see quant/philox.py."""

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        seed, stream, block, array = args
        low, shift = _splat(_I64, 0xFFFFFFFF, BLOCKS), _splat(_I64, 32, BLOCKS)

        def halves(x):  # noqa: ANN001, ANN202
            return builder.and_(x, low), builder.lshr(x, shift)

        steps = ir.Constant(_LONGS, [ir.Constant(_I64, n) for n in range(BLOCKS)])
        c0, c1 = halves(builder.add(_everywhere(builder, block, _LONGS), steps))
        c2, c3 = halves(_everywhere(builder, stream, _LONGS))
        k0, k1 = halves(_everywhere(builder, seed, _LONGS))
        for _ in range(ROUNDS):
            low0, high0 = halves(builder.mul(_splat(_I64, MULTIPLIERS[0], BLOCKS), c0))
            low1, high1 = halves(builder.mul(_splat(_I64, MULTIPLIERS[1], BLOCKS), c2))
            c0, c2 = (builder.xor(builder.xor(p, c), k) for p, c, k in ((high1, c1, k0), (high0, c3, k1)))
            c1, c3 = low1, low0
            k0 = builder.and_(builder.add(k0, _splat(_I64, WEYL[0], BLOCKS)), low)
            k1 = builder.and_(builder.add(k1, _splat(_I64, WEYL[1], BLOCKS)), low)
        words = [builder.trunc(c, ir.VectorType(_I32, BLOCKS)) for c in (c0, c1, c2, c3)]
        first, last = (_joined(builder, *pair) for pair in (words[:2], words[2:]))
        order = [word % 2 * BLOCKS + word // 2 * 2 * BLOCKS + n for n in range(BLOCKS) for word in range(4)]
        mask = ir.Constant(ir.VectorType(_I32, 4 * BLOCKS), [ir.Constant(_I32, place) for place in order])
        zero = ir.Constant(_I64, 0)
        target = _pointer(context, builder, signature.args[3], array, zero, _INTS)
        builder.store(builder.shuffle_vector(first, last, mask), target, align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64, raw), codegen


@intrinsic
def fma(typingctx, a, b, c):  # noqa: ANN001, ANN201
    """llvm.fma.f32: one rounding on every CPU, in hardware or by libm."""

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen
