"""Operand triples for fma: random ones hardly ever round in an interesting way, so each family aims at one place."""

from __future__ import annotations

import torch
from torch import Tensor

from megaproof.quant import philox

SEED = 0xF3A
FAMILIES = ("bits", "near", "cancel", "subnormal")


def triples(family: str, count: int, part: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """a, b, c float32 [count] of one part of a family.

    bits: any 32 bits each. near: c within 32 binades of the product, half of them with short significands, for ties.
    cancel: c is the rounded product with the other sign, up to 2 ulp off. subnormal: product and c around 2^-126.
    """
    stream = part * len(FAMILIES) + FAMILIES.index(family)
    a, b, c, d = philox.words(SEED, stream, 4 * count, device=device).view(4, count)
    if family == "near":
        short = torch.where(d >> 16 & 1 == 1, 0xFFFFF000, 0xFFFFFFFF)
        a, b = _with_field(a & short, 64 + (a >> 23 & 127)), _with_field(b & short, 64 + (b >> 23 & 127))
        c = _with_field(c & short, (a >> 23 & 255) + (b >> 23 & 255) - 127 + (d & 63) - 32)
    elif family == "cancel":
        a, b = _with_field(a, 64 + (a >> 23 & 127)), _with_field(b, 64 + (b >> 23 & 127))
        product = (_to_float(a) * _to_float(b)).view(torch.int32).to(torch.int64)
        c = ((product ^ 0x80000000) + d % 5 - 2) & 0xFFFFFFFF
    elif family == "subnormal":
        field = 1 + (a >> 23 & 127)
        a, b = _with_field(a, field), _with_field(b, 127 + 128 - field - (d & 31))
        c = c & 0x81FFFFFF
    return tuple(_to_float(word) for word in (a, b, c))


def _with_field(word: Tensor, field: Tensor) -> Tensor:
    """Random bits with another exponent field, kept among the normal numbers."""
    return (word & 0x807FFFFF) | field.clamp(1, 254) << 23


def _to_float(bits: Tensor) -> Tensor:
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
