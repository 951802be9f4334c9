"""The number formats as field tables, with encode and decode by integer arithmetic alone.

No cast of a library is used: torch's own `.to(float8_e4m3fn)` overflows to NaN, saturates or differs between CPU and
CUDA depending on its version, and its float8_e8m0fnu rounds to nearest where a scale needs a ceiling.

Sources: OCP 8-bit Floating Point Specification (E4M3), OCP Microscaling Formats (E2M1, E8M0), PTX ISA `cvt`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

F32_NAN = 0x7FFFFFFF
"""The one NaN that SM90 arithmetic produces; every NaN result of ours is this one."""


def f32_bits(x: Tensor) -> Tensor:
    """float32 -> its 32 bits as int64 in [0, 2^32). Any shape. Raises TypeError for another dtype."""
    if x.dtype != torch.float32:
        raise TypeError(f"x has dtype {x.dtype}; it must be torch.float32")
    return x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def f32_from_bits(bits: Tensor) -> Tensor:
    """Inverse of `f32_bits`: the low 32 bits of an integer tensor as float32."""
    low = bits.to(torch.int64) & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32).view(torch.float32)


def pow2(e: Tensor) -> Tensor:
    """2^e as float32 for integer e in [-149, 127], built from bits (exp2 and ldexp are inexact on some GPUs)."""
    e = e.to(torch.int64)
    normal = (e + 127) << 23
    subnormal = 1 << (e + 149).clamp(0, 23)
    return f32_from_bits(torch.where(e >= -126, normal, subnormal))


@dataclass(frozen=True)
class Format:
    """A binary floating-point format of at most 32 bits.

    A magnitude code is `(exponent field << mantissa) | mantissa`; exponent field 0 holds zero and the subnormals.
    """

    name: str
    exponent: int
    """Width of the exponent field."""
    mantissa: int
    """Width of the mantissa field."""
    bias: int
    max_code: int
    """Largest finite magnitude code."""
    overflow: int
    """Magnitude code that a larger value, or inf, becomes: `max_code` itself where the format saturates."""
    nan_code: int
    """Code that any NaN becomes, whatever its sign."""
    rounding: str = "nearest_even"
    """'nearest_even' or 'truncate' (toward zero)."""
    storage: torch.dtype = torch.uint8
    """dtype of a tensor of codes."""

    @property
    def sign_shift(self) -> int:
        return self.exponent + self.mantissa

    @property
    def max_value(self) -> float:
        """Largest finite value."""
        return float(self.decode(torch.tensor([self.max_code], dtype=torch.int64))[0])

    def unpack(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """codes -> (sign 0|1, significand, exponent), int64: |value| = significand * 2^(exponent - mantissa).

        The significand is an integer with `mantissa` fraction bits, its leading one written out unless subnormal.
        """
        codes = codes.to(torch.int64)
        sign = (codes >> self.sign_shift) & 1
        field = (codes >> self.mantissa) & ((1 << self.exponent) - 1)
        fraction = codes & ((1 << self.mantissa) - 1)
        significand = torch.where(field > 0, fraction + (1 << self.mantissa), fraction)
        return sign, significand, field.clamp(min=1) - self.bias

    def is_nan(self, codes: Tensor) -> Tensor:
        """True where a code is a NaN. A magnitude above the infinity, or above max_code where there is none."""
        magnitude = codes.to(torch.int64) & ((1 << self.sign_shift) - 1)
        return magnitude > max(self.max_code, self.overflow)

    def decode(self, codes: Tensor) -> Tensor:
        """codes (any integer dtype) -> float32, exactly; NaN codes give 0x7fffffff."""
        sign, significand, exponent = self.unpack(codes)
        # Exact: every significand has at most 24 bits; 2^(exponent - mantissa) is a power of two that float32 holds.
        magnitude = significand.to(torch.float32) * pow2((exponent - self.mantissa).clamp(max=127))
        bits = f32_bits(magnitude)
        if self.overflow != self.max_code:  # the format has an infinity
            code = codes.to(torch.int64) & ((1 << self.sign_shift) - 1)
            bits = torch.where(code == self.overflow, 0x7F800000, bits)
        bits = bits | (sign << 31)
        return f32_from_bits(torch.where(self.is_nan(codes), F32_NAN, bits))

    def encode(self, x: Tensor) -> Tensor:
        """float32 -> codes, rounded as the format says; overflow, infinities and NaN as its fields say."""
        bits = f32_bits(x)
        sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
        field, fraction = magnitude >> 23, magnitude & 0x7FFFFF
        significand = torch.where(field > 0, fraction + (1 << 23), fraction)
        exponent = field.clamp(min=1) - 127

        min_exponent = 1 - self.bias
        # Bits to drop: those below the mantissa, and below the format's smallest subnormal.
        drop = (23 - self.mantissa + (min_exponent - exponent).clamp(min=0)).clamp(max=40)
        kept = significand >> drop
        if self.rounding == "nearest_even":
            rest, half = significand - (kept << drop), (1 << drop) >> 1
            kept = kept + ((rest > half) | ((rest == half) & (kept & 1 == 1) & (drop > 0))).to(torch.int64)
        # A carry out of the mantissa moves into the exponent field by plain addition.
        code = ((exponent - min_exponent).clamp(min=0) << self.mantissa) + kept
        code = torch.where((code > self.max_code) | (magnitude == 0x7F800000), self.overflow, code)
        code = code | (sign << self.sign_shift)
        code = torch.where(magnitude > 0x7F800000, self.nan_code, code)
        return _store(code, self.storage)

    def round(self, x: Tensor) -> Tensor:
        """float32 -> the value the format keeps of it, as float32."""
        return self.decode(self.encode(x))


@dataclass(frozen=True)
class PowerOfTwoFormat:
    """UE8M0: an unsigned power of two, 2^(code - 127); 0xff is NaN. There is no zero and no sign."""

    name: str = "UE8M0"
    bias: int = 127
    nan_code: int = 0xFF

    def decode(self, codes: Tensor) -> Tensor:
        """codes uint8 -> float32, exactly (code 0 is 2^-127, a float32 subnormal)."""
        codes = codes.to(torch.int64)
        value = pow2((codes - self.bias).clamp(max=127))
        return torch.where(codes == self.nan_code, f32_from_bits(torch.full_like(codes, F32_NAN)), value)

    def encode(self, x: Tensor) -> Tensor:
        """float32 -> the smallest power of two that is >= x, as a code; above 2^127, negative, inf or NaN: NaN."""
        bits = f32_bits(x)
        field, fraction = bits >> 23, bits & 0x7FFFFF
        above = torch.where(field > 0, fraction != 0, fraction > 1 << 22).to(torch.int64)
        code = field + above
        refused = (bits > 0x7F000000) & (bits != 1 << 31)
        return torch.where(refused, self.nan_code, code & 0xFF).to(torch.uint8)


def _store(codes: Tensor, storage: torch.dtype) -> Tensor:
    if storage == torch.int16:  # torch has no arithmetic on uint16; bfloat16 views int16
        codes = torch.where(codes >= 1 << 15, codes - (1 << 16), codes)
    return codes.to(storage)


#: FP8 of the tensor core and of every payload: no infinity, saturating at 448, one NaN a sign.
E4M3 = Format("E4M3", exponent=4, mantissa=3, bias=7, max_code=0x7E, overflow=0x7E, nan_code=0x7F)
#: FP4: no infinity, no NaN (a NaN becomes +6, PTX ISA cvt.rn.satfinite.e2m1x2).
E2M1 = Format("E2M1", exponent=2, mantissa=1, bias=1, max_code=0x7, overflow=0x7, nan_code=0x7)
#: Scale factors.
UE8M0 = PowerOfTwoFormat()
#: Output rows; NaN is 0x7fff.
BF16 = Format("BF16", 8, 7, bias=127, max_code=0x7F7F, overflow=0x7F80, nan_code=0x7FFF, storage=torch.int16)
#: What an FP8 tensor-core accumulator keeps of a sum: 13 fraction bits, cut toward zero.
E8M13 = Format(
    "E8M13",
    exponent=8,
    mantissa=13,
    bias=127,
    max_code=0x1FDFFF,
    overflow=0x1FE000,
    nan_code=0x1FFFFF,
    rounding="truncate",
    storage=torch.int32,
)
