"""One generator for every input and weight: Philox4x32-10, counter-based, integers only.

Word i of (seed, stream) is lane i mod 4 of block i div 4; the counter is (block, stream) as two 64-bit halves and the
key is the seed. The same words on every device, in any order, from any start, so an expert's weights need no memory.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaproof.quant.host_state import guarded

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """One block: four 32-bit counter words (int64 tensors of one shape) and a two-word key -> four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _mul32(MULTIPLIERS[0], c0)
        high1, low1 = _mul32(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


@guarded
def words(seed: int, stream: int, count: int, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Words start .. start + count of (seed, stream): int64 [count] in [0, 2^32). seed, stream in [0, 2^64)."""
    check(seed, stream)
    first, last = start // 4, (start + count + 3) // 4
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    low, high = (torch.full_like(block, stream >> shift & MASK) for shift in (0, 32))
    lanes = philox4x32((block & MASK, block >> 32, low, high), (seed & MASK, seed >> 32))
    return torch.stack(lanes, dim=1).reshape(-1)[start - 4 * first :][:count]


@guarded
def codes(seed: int, stream: int, count: int, lut: Tensor) -> Tensor:
    """uint8 [count] on lut's device: byte j of the stream (little-endian in its word) through lut, uint8 [256]."""
    check_lut(lut)
    w = words(seed, stream, (count + 3) // 4, device=lut.device)
    as_bytes = torch.stack([w >> shift & 0xFF for shift in (0, 8, 16, 24)], dim=1).reshape(-1)[:count]
    return lut[as_bytes]


def check(seed: int, stream: int) -> None:
    """Raises ValueError when seed or stream does not fit 64 bits."""
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{name} = {value} must be in [0, 2^64)")


def check_lut(lut: Tensor) -> None:
    """Raises ValueError unless lut is uint8 [256]: a shorter one would be read past its end."""
    if lut.dtype != torch.uint8 or tuple(lut.shape) != (256,):
        raise ValueError(f"lut is {lut.dtype} {list(lut.shape)}; it must be torch.uint8 [256]")


def _mul32(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit numbers, in int64 without overflow."""
    low = m * (x & 0xFFFF)  # < 2^48
    high = m * (x >> 16) + (low >> 16)  # < 2^48 + 2^32
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
