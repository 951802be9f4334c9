"""Exact arithmetic on rationals and big integers: what correct rounding and the tensor core mean, written slowly.

Imports nothing of this project, and no floating-point operation decides a result here. Values are
`fractions.Fraction` or int, floats are passed as their bit patterns. `wgmma_element` is written from the rule in its
docstring, not from `quant/atoms.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from math import isqrt

NAN_BITS = 0x7FFFFFFF
INF_BITS = 0x7F800000
SIGN = 1 << 31

SCALE = 200
"""Fraction bits of the fixed-point powers of two below."""


def is_nan(bits: int) -> bool:
    return bits & 0x7FFFFFFF > INF_BITS


def is_inf(bits: int) -> bool:
    return bits & 0x7FFFFFFF == INF_BITS


def power(e: int) -> Fraction:
    return Fraction(1 << e) if e >= 0 else Fraction(1, 1 << -e)


def value(bits: int) -> Fraction:
    """The number a finite float32 bit pattern stands for (both zeros give 0)."""
    field, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    if field == 0xFF:
        raise ValueError(f"{bits:#010x} is not a finite float32")
    magnitude = fraction * power(-149) if field == 0 else (fraction + (1 << 23)) * power(field - 150)
    return -magnitude if bits & SIGN else magnitude


def binade(x: Fraction) -> int:
    """floor(log2(|x|)) of a non-zero rational."""
    n, d = abs(x.numerator), x.denominator
    e = n.bit_length() - d.bit_length()
    return e if abs(x) >= power(e) else e - 1


def round_float32(x: Fraction, zero: int = 0) -> int:
    """Bits of the float32 nearest to x, ties to even; `zero` is what an exact 0 becomes (0 or 0x80000000)."""
    if x == 0:
        return zero
    e = max(binade(x), -126)
    units = round(abs(x) / power(e - 23))  # Python rounds a Fraction half to even
    # (e + 126 << 23) + units: the hidden bit counts 1 in the exponent field, a carry moves into it, and a subnormal
    # (units below 2^23 at e = -126) gets field 0.
    magnitude = min((e + 126 << 23) + units, INF_BITS)
    return magnitude | (SIGN if x < 0 else 0)


def fma(a: int, b: int, c: int) -> int:
    """IEEE 754 fused multiply-add on float32 bit patterns, one rounding, nearest even; any NaN is 0x7fffffff."""
    if is_nan(a) or is_nan(b) or is_nan(c):
        return NAN_BITS
    product_sign = (a ^ b) & SIGN
    if is_inf(a) or is_inf(b):
        if 0 in (a & ~SIGN, b & ~SIGN) or (is_inf(c) and c & SIGN != product_sign):
            return NAN_BITS
        return INF_BITS | product_sign
    if is_inf(c):
        return c
    product, addend = value(a) * value(b), value(c)
    # A sum of two zeros keeps a sign they share; every other exact zero is +0 in this rounding mode.
    shared = product_sign if product == 0 and addend == 0 and c & SIGN == product_sign else 0
    return round_float32(product + addend, shared)


def e4m3_parts(code: int) -> tuple[Fraction, int]:
    """(value, exponent) of an E4M3 code that is not NaN; a subnormal has the exponent -6."""
    field, fraction = code >> 3 & 15, code & 7
    exponent = max(field, 1) - 7
    magnitude = (fraction + (8 if field else 0)) * power(exponent - 3)
    return (-magnitude if code & 0x80 else magnitude), exponent


def cut(x: Fraction, unit: Fraction) -> int:
    """x in whole units, what is left over dropped toward zero."""
    n = abs(x) // unit
    return -n if x < 0 else n


def wgmma_element(a: Sequence[int], b: Sequence[int], c: int) -> int:
    """One output element of `wgmma.mma_async m64nNk32 f32.e4m3.e4m3`, as measured on an H200.

    32 products and the accumulator are added in one go. Each has the exponent that its operands' fields give (a product
    is not normalised, a subnormal has the least exponent of its format). Below the largest exponent of a non-zero term,
    13 fraction bits count: every term is cut there toward zero, the cut terms are added exactly, and the sum keeps the
    14 leading bits of its magnitude. A sum of zero is +0. Any NaN gives 0x7fffffff; else an infinite c comes back.

    a, b: 32 E4M3 codes each; c: float32 bits. Returns float32 bits.
    """
    if is_nan(c) or any(code & 0x7F == 0x7F for code in (*a, *b)):
        return NAN_BITS
    if is_inf(c):
        return c
    terms = [(value(c), max(c >> 23 & 0xFF, 1) - 127)]
    for x, y in zip(a, b, strict=True):
        (x_value, x_exponent), (y_value, y_exponent) = e4m3_parts(x), e4m3_parts(y)
        terms.append((x_value * y_value, x_exponent + y_exponent))
    exponents = [exponent for term, exponent in terms if term]
    if not exponents:
        return 0
    unit = power(max(exponents) - 13)  # 13 fraction bits below the largest term
    total = sum(cut(term, unit) for term, _ in terms)
    surplus = max(abs(total).bit_length() - 14, 0)  # keep the 14 leading bits
    kept = (abs(total) >> surplus << surplus) * unit
    bits = round_float32(-kept if total < 0 else kept)
    if value(bits) != (-kept if total < 0 else kept):
        raise AssertionError("a tensor-core result must be a float32 without rounding")
    return bits


@cache
def _root(k: int) -> int:
    """2^(2^-k) with SCALE fraction bits: k square roots of 2, at most 2 units of the last place low."""
    return 2 << SCALE if k == 0 else isqrt(_root(k - 1) << SCALE)


def exp2_fixed(numerator: int, bits: int) -> int:
    """2^(numerator / 2^bits) for 0 <= numerator < 2^bits, as an integer with SCALE fraction bits.

    Low by less than 2^(10 - SCALE) for bits <= 32: at most 32 factors below 2, each up to 2 units low, and each product
    cut by one more.
    """
    result = 1 << SCALE
    for k in range(1, bits + 1):
        if numerator >> (bits - k) & 1:
            result = result * _root(k) >> SCALE
    return result
