"""How tensors hold numbers: the bits of an element, its value, and how many codes lie between two of them."""

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
    """How the elements of a tensor are stored."""

    name: str
    dtype: torch.dtype
    width: int
    """Bits of an element."""
    mantissa: int
    """Stored mantissa bits; 0 for an integer."""
    largest: int
    """The largest magnitude code that is not a NaN."""
    codes: Format | None = None
    """Decodes and encodes; None for float32 and integers."""

    @property
    def bytes(self) -> int:
        """Bytes of an element."""
        return self.width // 8

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

    def tensor(self, bits: Tensor) -> Tensor:
        """Inverse of `unsigned`: integer bits, in [0, 2^width), -> a tensor of `dtype` of the same shape."""
        return _signed(bits, self.width).to(_INTEGER[self.bytes]).view(self.dtype)

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
    """The bits as two's complement, int64."""
    return torch.where(bits >= 1 << width - 1, bits - (1 << width), bits)


E4M3_CODES = Stored("E4M3", torch.uint8, 8, 3, 0x7E, E4M3)
BF16_VALUES = Stored("BF16", torch.bfloat16, 16, 7, 0x7F80, BF16)
FP32_VALUES = Stored("fp32", torch.float32, 32, 23, 0x7F800000)
INT32_COUNTS = Stored("int32", torch.int32, 32, 0, 0)
