"""Thirty-two lanes at a time: the inner loops of the CPU twin, as LLVM vector operations for numba.

LLVM's own vectoriser leaves these reductions scalar; written as <32 x i32> they become whatever vectors the CPU has.
Integer sums and maxima are exact in any order, so the vector width changes no bit.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 32
NO_TERM = -1000
"""Exponent of a zero operand; it loses to every real one even after another exponent was added."""

_I1, _I8, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES, _INTS, _FLOATS = (ir.VectorType(t, LANES) for t in (_I8, _I32, _F32))


def _splat(scalar: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(ir.VectorType(scalar, LANES), [ir.Constant(scalar, value)] * LANES)


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
    """E4M3 codes[i : i + 32] -> value[j : j + 32] (float32), exponent[j : j + 32] (int32, unnormalised).

    Zero and NaN codes get value 0 and exponent NO_TERM; returns whether any code was a NaN.
    """

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        array, start, out_value, out_exponent, out_start = args
        source = _pointer(context, builder, signature.args[0], array, start, _BYTES)
        code = builder.zext(builder.load(source, align=1), _INTS)
        magnitude = builder.and_(code, _splat(_I32, 0x7F))
        nan = builder.icmp_signed("==", magnitude, _splat(_I32, 0x7F))
        dead = builder.or_(nan, builder.icmp_signed("==", magnitude, _splat(_I32, 0)))

        subnormal = builder.fmul(builder.sitofp(magnitude, _FLOATS), _splat(_F32, 2.0**-9))
        normal = builder.add(builder.shl(magnitude, _splat(_I32, 20)), _splat(_I32, 120 << 23))
        below = builder.icmp_signed("<", magnitude, _splat(_I32, 8))
        bits = builder.select(below, builder.bitcast(subnormal, _INTS), normal)
        bits = builder.select(dead, _splat(_I32, 0), bits)
        sign = builder.shl(builder.and_(code, _splat(_I32, 0x80)), _splat(_I32, 24))
        target = _pointer(context, builder, signature.args[2], out_value, out_start, _FLOATS)
        builder.store(builder.bitcast(builder.or_(bits, sign), _FLOATS), target, align=4)

        field = builder.lshr(magnitude, _splat(_I32, 3))
        field = builder.select(builder.icmp_signed("==", field, _splat(_I32, 0)), _splat(_I32, 1), field)
        power = builder.select(dead, _splat(_I32, NO_TERM), builder.sub(field, _splat(_I32, 7)))
        target = _pointer(context, builder, signature.args[3], out_exponent, out_start, _INTS)
        builder.store(power, target, align=4)
        return _reduce(builder, "or", nan, _I1)

    return types.boolean(codes, types.intp, value, exponent, types.intp), codegen


@intrinsic
def max_exponent(typingctx, a, i, b):  # noqa: ANN001, ANN201
    """max over k of a[i + k] + b[k], int32, 32 lanes."""

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        array_a, start, array_b = args
        zero = ir.Constant(_I64, 0)
        x = builder.load(_pointer(context, builder, signature.args[0], array_a, start, _INTS), align=4)
        y = builder.load(_pointer(context, builder, signature.args[2], array_b, zero, _INTS), align=4)
        return _reduce(builder, "smax", builder.add(x, y), _I32)

    return types.int32(a, types.intp, b), codegen


@intrinsic
def cut_sum(typingctx, a, i, b, scale):  # noqa: ANN001, ANN201
    """sum over k of int(a[i + k] * b[k] * scale), each cut toward zero, int32, 32 lanes."""

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        array_a, start, array_b, factor = args
        zero = ir.Constant(_I64, 0)
        x = builder.load(_pointer(context, builder, signature.args[0], array_a, start, _FLOATS), align=4)
        y = builder.load(_pointer(context, builder, signature.args[2], array_b, zero, _FLOATS), align=4)
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), factor, ir.Constant(_I32, 0))
        everywhere = ir.Constant(_INTS, [ir.Constant(_I32, 0)] * LANES)
        factors = builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), everywhere)
        terms = builder.fptosi(builder.fmul(builder.fmul(x, y), factors), _INTS)
        return _reduce(builder, "add", terms, _I32)

    return types.int32(a, types.intp, b, types.float32), codegen


@intrinsic
def fma(typingctx, a, b, c):  # noqa: ANN001, ANN201
    """llvm.fma.f32: one rounding on every CPU, in hardware or by libm."""

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen
