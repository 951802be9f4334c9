"""Inputs for the tensor-core probes: families of tiles, each aimed at one part of the instruction's behaviour.

Drawn from Philox4x32, so a family, a width and a part number name the same bytes on every machine; goldens keep the
outputs and the sha256 of the inputs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof.quant import philox

SEED = 0x51C0


@dataclass(frozen=True)
class Family:
    """How operands and accumulators of a tile are drawn.

    codes: distribution of the e4m3 bytes (`_luts`). c: distribution of the accumulators (`_accumulators`).
    steps: k32 steps of the chain. scale_d: whether the first step reads the accumulators at all.
    """

    codes: str
    c: str
    steps: int = 1
    scale_d: bool = True
    cancel: bool = False


FAMILIES = {
    "numbers": Family("numbers", "near"),  # every code but NaN, accumulators that reach into the sum
    "from_zero": Family("numbers", "zero"),
    "nan_codes": Family("all", "near"),  # all 256 codes
    "wide_c": Family("numbers", "bits"),  # any 32 bits, NaN and infinity included
    "subnormal_c": Family("rare", "subnormal"),  # most sums are the accumulator alone
    "special_c": Family("sparse", "special"),
    "sparse": Family("sparse", "near"),  # few terms, of far-apart exponents
    "subnormal_codes": Family("subnormal", "small"),
    "cancel": Family("numbers", "near", cancel=True),  # products cancel in pairs but one
    "ignored_c": Family("numbers", "bits", scale_d=False),
    "chain": Family("numbers", "bits", steps=4, scale_d=False),  # one 128-wide block of the layer
    "chain_c": Family("sparse", "near", steps=4),
    "long": Family("numbers", "near", steps=16),
}

SPECIAL = (
    *(0x00000000, 0x80000000, 0x7F800000, 0xFF800000),  # zeros, infinities
    *(0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF),  # NaN, quiet and signalling
    *(0x7F7FFFFF, 0xFF7FFFFF, 0x00800000, 0x80800000),  # largest, smallest normal
    *(0x00000001, 0x807FFFFF, 0x3F800000, 0xBF7FFFFF),  # subnormal, about one
)


def tiles(family: str, n: int, cases: int, part: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """a uint8 [cases, 64, K], b uint8 [cases, N, K], c float32 [cases, 64, N] of one part of a family."""
    spec = FAMILIES[family]
    depth = 32 * spec.steps
    # One stream an operand: part, family, width and role never share one.
    stream = ((part * len(FAMILIES) + list(FAMILIES).index(family)) * 1024 + n) * 4
    lut = _lut(spec.codes).to(device)
    a = philox.codes(SEED, stream, cases * 64 * depth, lut).view(cases, 64, depth)
    b = philox.codes(SEED, stream + 1, cases * n * depth, lut).view(cases, n, depth)
    if spec.cancel:
        a[..., 16:32] = a[..., :16]
        b[..., 16:31] = b[..., :15] ^ 0x80
    bits = _accumulators(spec.c, philox.words(SEED, stream + 2, cases * 64 * n, device=device))
    return a, b, _to_float(bits).view(cases, 64, n)


def input_digest(a: Tensor, b: Tensor, c: Tensor) -> str:
    """sha256 of the bytes of a, b and c in turn."""
    digest = hashlib.sha256()
    for t in (a, b, c.view(torch.int32)):
        digest.update(t.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _lut(kind: str) -> Tensor:
    """uint8 [256]: random byte -> e4m3 code."""
    code = torch.arange(256)
    if kind == "all":
        return code.to(torch.uint8)
    if kind == "subnormal":  # exponent field 0 or 1
        return (code & 0x8F).to(torch.uint8)
    if kind in ("sparse", "rare"):  # zeros of both signs in 3/4 and 15/16; the rest spread over the codes
        zeros, stride = (192, 4) if kind == "sparse" else (240, 16)
        code = torch.where(code < zeros, (code & 1) << 7, (code - zeros) * stride + code % stride)
    return torch.where(code & 0x7F == 0x7F, code ^ 1, code).to(torch.uint8)  # no NaN


def _accumulators(kind: str, word: Tensor) -> Tensor:
    """int64 random words -> int64 fp32 bits."""
    if kind == "bits":
        return word
    if kind == "zero":
        return word & 0x80000000
    if kind == "subnormal":
        return word & 0x807FFFFF
    if kind == "special":
        return torch.tensor(SPECIAL, device=word.device)[word >> 16 & 15]
    low = {"near": 107, "small": 97}[kind]  # exponents -20 .. 43 and -30 .. 33: from below the sum to above it
    return (word & 0x807FFFFF) | ((word >> 23 & 63) + low) << 23


def _to_float(bits: Tensor) -> Tensor:
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
