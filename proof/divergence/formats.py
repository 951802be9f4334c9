"""The formats in which stages are stored: bits, their values, and how many codes lie between two of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof.quant.formats import BF16, E4M3, Format, f32_bits, f32_from_bits

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unsigned(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor of at most 4 bytes an element, int64 on the CPU, never negative."""
    width = tensor.element_size()
    return tensor.cpu().contiguous().view(_INTEGER[width]).to(torch.int64) & ((1 << 8 * width) - 1)


@dataclass(frozen=True)
class Stored:
    """How the elements of a stage are stored."""

    name: str
    dtype: torch.dtype
    width: int
    """Bits of an element."""
    mantissa: int
    """Stored mantissa bits; 0 for an integer."""
    largest: int
    """The largest magnitude code that is not a NaN."""
    codes: Format | None = None

    @property
    def sign(self) -> int:
        """The sign bit as a mask; 0 for an integer."""
        return 1 << self.width - 1 if self.mantissa else 0

    def is_nan(self, bits: Tensor) -> Tensor:
        """True where the bits are a NaN of either sign and any payload."""
        return (bits & ~self.sign) > self.largest if self.mantissa else torch.zeros_like(bits, dtype=torch.bool)

    def values(self, bits: Tensor) -> Tensor:
        """The numbers, float64, exactly."""
        if not self.mantissa:
            return _signed(bits, self.width).double()
        return (self.codes.decode(bits) if self.codes else f32_from_bits(bits)).double()

    def encode(self, values: Tensor) -> Tensor:
        """float64 numbers -> bits, rounded to nearest even and saturating as the format does."""
        if not self.mantissa:
            return values.to(torch.int64) & ((1 << self.width) - 1)
        narrow = values.to(torch.float32)
        return unsigned(self.codes.encode(narrow)) if self.codes else f32_bits(narrow)

    def ordered(self, bits: Tensor) -> Tensor:
        """Integers in the order of the numbers, one apart where two numbers are neighbours; both zeros are 0."""
        if not self.mantissa:
            return _signed(bits, self.width)
        magnitude = bits & ~self.sign
        return torch.where(bits & self.sign != 0, -magnitude, magnitude)

    def ulps(self, a: Tensor, b: Tensor) -> Tensor:
        """How many steps lie between two bit patterns, int64; -1 where either is a NaN."""
        apart = (self.ordered(a) - self.ordered(b)).abs()
        return torch.where(self.is_nan(a) | self.is_nan(b), -1, apart)

    def show(self, bits: int) -> str:
        """'0x3a = 1.25'."""
        value = float(self.values(torch.tensor([bits]))[0])
        number = f"{value:.0f}" if not self.mantissa else f"{value:.9g}"
        return f"0x{bits:0{self.width // 4}x} = {number}"


def _signed(bits: Tensor, width: int) -> Tensor:
    return torch.where(bits >= 1 << width - 1, bits - (1 << width), bits)


_E4M3 = Stored("E4M3", torch.uint8, 8, 3, 0x7E, E4M3)
_BF16 = Stored("BF16", torch.bfloat16, 16, 7, 0x7F80, BF16)
_FP32 = Stored("fp32", torch.float32, 32, 23, 0x7F800000)
_INT32 = Stored("int32", torch.int32, 32, 0, 0)

STORED = {
    "l1_acts": _E4M3,
    "l1_acts_sf": _FP32,
    "l2_acts": _E4M3,
    "l2_acts_sf": _FP32,
    "slots": _BF16,
    "y": _BF16,
    "stats": _INT32,
}
"""The format of each stage of the trace."""
EQUATIONS = {
    "l1_acts": "Eq. (1) dispatch",
    "l1_acts_sf": "Eq. (1) dispatch",
    "l2_acts": "Eq. (2)-(5) GEMM 1, SwiGLU, re-quantisation: codes",
    "l2_acts_sf": "Eq. (2)-(5) GEMM 1, SwiGLU, re-quantisation: scale factors",
    "slots": "Eq. (6), (7) GEMM 2, output row",
    "y": "Eq. (8) combine",
    "stats": "Eq. (9) statistics",
}
"""The equations that lead from the stages before to a stage."""
