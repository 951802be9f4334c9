"""What the input families draw from: streams of the generator, tables of codes, scales. Integers decide every byte."""

from __future__ import annotations

import functools
import statistics

import torch
from torch import Tensor

from megaproof.quant import philox
from megaproof.quant.formats import E4M3, f32_from_bits, pow2
from megaproof.reference.operands import Weights

X_CODES, X_SF, TOPK, TOPK_WEIGHTS, MASK, W1_CODES, W1_SF, W2_CODES, W2_SF, CHOICE, SPARSE = range(1, 12)
"""Streams of the generator, one a purpose; the low half of a stream is the rank or the expert."""

Drawn = tuple[list[Tensor], list[Tensor], list[Tensor], Weights]
"""What a family makes: x, x_sf and topk_weights, lists by rank, and weights(e)."""


def stream(purpose: int, index: int) -> int:
    """The stream of one purpose for one rank or expert."""
    return purpose << 32 | index


@functools.cache
def code_lut(kind: str) -> Tensor:
    """uint8 [256]: a random byte -> an E4M3 code.

    'gaussian' (sigma 96), 'spread' (every finite code), 'subnormal', 'heavy' (each binade half as likely as the one
    below it, up to 448).
    """
    byte = torch.arange(256)
    if kind == "gaussian":
        normal = statistics.NormalDist(0, 96)
        return E4M3.encode(torch.tensor([normal.inv_cdf((b + 0.5) / 256) for b in range(256)]))
    if kind == "spread":
        return torch.where(byte & 0x7F == 0x7F, byte & 0x80, byte).to(torch.uint8)
    if kind == "subnormal":
        return (byte & 0x87).to(torch.uint8)
    if kind == "heavy":
        # Rank 127 of a sign is the rarest: 2^-r of all magnitudes are r binades or more above the least one.
        rank = byte & 0x7F
        magnitude = torch.tensor([min(448.0, 3.5 * 128 / (128 - int(r))) for r in rank])
        return E4M3.encode(torch.where(byte < 0x80, magnitude, -magnitude))
    raise KeyError(kind)


def scales(seed: int, stream: int, count: int, exponent: int) -> Tensor:
    """float32 [count]: 2^(exponent -1 .. +1) times a random mantissa.

    Every fifth is a plain power of two: never two neighbours, along a row or (where a row is no multiple of five) down
    a column, so that neighbouring blocks always differ.
    """
    word = philox.words(seed, stream, 2 * count).reshape(count, 2)
    field = 127 + exponent - 1 + word[:, 0] % 3
    mantissa = torch.where(torch.arange(count) % 5 == 2, 0, word[:, 1] & 0x7FFFFF)
    return f32_from_bits(field << 23 | mantissa)


def powers(exponent: Tensor | int) -> Tensor:
    """2^e as float32, for integer e."""
    return pow2(torch.as_tensor(exponent))


def uniform_weights(seed: int, rank: int, tokens: int, topk: int) -> Tensor:
    """Routing weights in (0, 1], float32 [tokens, topk], every slot another one."""
    word = philox.words(seed, stream(TOPK_WEIGHTS, rank), tokens * topk)
    return (((word >> 8) + 1).to(torch.float32) * 2.0**-24).reshape(tokens, topk)
