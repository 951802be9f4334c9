"""float32 bit patterns between numpy and torch, the comparison the tests here share, and raw bits to draw from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Source:
    """Raw bits of a counter-based generator; `random_raw` is the part of numpy that keeps its stream for good."""

    def __init__(self, seed: int, stream: int = 0) -> None:
        self._generator = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))

    def words(self, *shape: int) -> np.ndarray:
        """uint32 of any shape, all 32 bits random."""
        raw = self._generator.random_raw(int(np.prod(shape)))
        return (raw >> np.uint64(32)).astype(np.uint32).reshape(shape)

    def below(self, limit: int, *shape: int) -> np.ndarray:
        """Integers in [0, limit) as uint32; the bias of at most limit / 2^32 does not matter to a test."""
        return self.words(*shape) % np.uint32(limit)

    def floats(self, low: int, high: int, *shape: int) -> np.ndarray:
        """float32 bits with an exponent field in [low, high], random sign and mantissa."""
        field = self.below(high - low + 1, *shape) + np.uint32(low)
        return (self.words(*shape) & np.uint32(0x807FFFFF)) | field << np.uint32(23)

    def codes(self, *shape: int) -> np.ndarray:
        """E4M3 codes over everything but NaN, uint8."""
        codes = self.words(*shape).astype(np.uint8)
        return np.where(codes & 0x7F == 0x7F, codes ^ np.uint8(0x55), codes)

    def narrow_codes(self, *shape: int) -> np.ndarray:
        """E4M3 codes of magnitude 1/8 to 15, as in a quantised tensor: many terms of a sum lose bits, few dominate."""
        return (self.below(56, *shape) + 32).astype(np.uint8) | (self.words(*shape).astype(np.uint8) & 0x80)


def to_float(bits: np.ndarray) -> Tensor:
    """uint32 bit patterns -> float32 tensor of the same shape."""
    return torch.from_numpy(np.ascontiguousarray(bits, dtype=np.uint32).view(np.float32))


def to_bits(x: Tensor) -> np.ndarray:
    """float32 tensor -> uint32 bit patterns."""
    if x.dtype != torch.float32:
        raise TypeError(f"x is {x.dtype}: it must be float32")
    return x.contiguous().numpy().view(np.uint32)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Every element equal as an integer, NaN payloads included; a failure names the count and the first place."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {actual.shape} against {expected.shape}")
    if not expected.size:
        raise AssertionError(f"{what}: nothing was compared")
    different = np.argwhere(actual != expected)
    if len(different):
        first = tuple(different[0])
        got, want = int(actual[first]), int(expected[first])
        where = ", ".join(map(str, first))
        raise AssertionError(
            f"{what}: {len(different)} of {expected.size} differ, first at ({where}): {got:#x} != {want:#x}"
        )
