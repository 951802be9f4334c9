"""Rows for SwiGLU and its re-quantisation that hold every hard case, each counted."""

from __future__ import annotations

import torch
from torch import Tensor

from megaproof.quant import philox, twin
from megaproof.quant.formats import f32_from_bits
from megaproof.quant.recipe import Recipe
from megaproof.reference import swiglu

WEIGHTS = (1.0, -0.75, 0.0, -0.0, 0.3, 1e-30, 2.0**-149, 3.0e38, float("inf"), float("nan"), -1.0, 0.6)
"""Routing weights of the last rows; the others are random in (0, 1)."""
HARD = 24
"""Rows that get a weight of WEIGHTS."""


def rows(count: int, inter: int, seed: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(gate_up float32 [count, 2 * inter], weight float32 [count]); groups of 64 columns are of one kind each."""
    word = philox.words(seed, 1, 2 * count * inter, device=device).reshape(count, 2 * inter)
    normal = _normal(philox.words(seed, 2, 2 * count * inter, device=device)).reshape(count, 2 * inter)
    group = torch.arange(2 * inter, device=device) % inter // 64
    is_gate = torch.arange(2 * inter, device=device) < inter
    kind = (torch.arange(count, device=device)[:, None] * 5 + group[None, :]) % 16
    uniform = (word >> 8).to(torch.float32) * 2.0**-24

    x = normal * 8  # kinds 0-4: both sides of every clamp
    x = torch.where(kind == 5, f32_from_bits(word), x)  # any bits: NaN, infinities, subnormals, huge
    x = torch.where(kind == 6, torch.where(is_gate, -80 - 30 * uniform, normal), x)  # gates from -80 to -110
    x = torch.where(kind == 7, torch.where(is_gate, 0.0, normal), x)  # groups of zeros
    x = torch.where(kind == 8, f32_from_bits(word & 0x807FFFFF), x)  # subnormals alone
    # One big element a group: the rest lands among the subnormal codes.
    x = torch.where(kind == 9, torch.where(word % 64 == 0, normal * 64, normal / 64), x)
    # gate 64: silu is 64 exactly. up a small integer of five bits: half of the codes are ties.
    tie = torch.where(is_gate, 64.0, (word % 63 - 31).to(torch.float32))
    x = torch.where(kind == 10, tie, x)
    x = torch.where(kind == 11, f32_from_bits((word & 0x80000003) + 0x41200000 - 1), x)  # +-10 and its neighbours
    x = torch.where(kind == 12, torch.where(word & 1 == 0, 0.0, -0.0), x)
    x = torch.where(kind == 13, torch.where(word % 16 == 0, f32_from_bits(_special(word >> 8)), x), x)
    x = torch.where(kind == 14, normal * 1e18, x)  # products at the end of fp32
    x = torch.where(kind == 15, f32_from_bits(word & 0x80FFFFFF | 0x1E000000), x)  # and at its beginning

    weight = (philox.words(seed, 3, count, device=device) + 1 >> 8).to(torch.float32) * 2.0**-24
    hard = torch.tensor(WEIGHTS, device=device).repeat(-(-HARD // len(WEIGHTS)))[: min(HARD, count)]
    weight[count - len(hard) :] = hard
    return x.contiguous(), weight


def expected(recipe: Recipe, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (4), (5) by the reference, on the compiled twin."""
    gate, up = (half.float().contiguous() for half in gate_up.chunk(2, dim=1))
    return swiglu.requantise(recipe, swiglu.activate(recipe, gate, up, weight, twin.arith(gate.device)))


def coverage(gate_up: Tensor, codes: Tensor, scales: Tensor, clamp: float) -> dict[str, int]:
    """How many elements of each hard case there are; codes and scales are those of the reference."""
    gate, up = gate_up.chunk(2, dim=1)
    tiny = torch.finfo(torch.float32).tiny
    return {
        "gate above the clamp": int((gate > clamp).sum()),
        "gate below minus the clamp": int((gate < -clamp).sum()),
        "up above the clamp": int((up > clamp).sum()),
        "up below minus the clamp": int((up < -clamp).sum()),
        "gates below -90": int(((gate < -90) & gate.isfinite()).sum()),
        "NaN": int(gate_up.isnan().sum()),
        "infinities": int(gate_up.isinf().sum()),
        "subnormals": int(((gate_up != 0) & (gate_up.abs() < tiny)).sum()),
        "zero groups": int((scales <= tiny).sum()),
        "codes -0": int((codes == 0x80).sum()),
        "codes NaN": int((codes == 0x7F).sum()),
        "codes saturated": int((codes & 0x7F == 0x7E).sum()),
        "codes subnormal": int((((codes & 0x7F) < 8) & (codes & 0x7F != 0)).sum()),
    }


def _normal(word: Tensor) -> Tensor:
    """About normal: the sum of four bytes, centred."""
    total = sum((word >> shift & 0xFF) for shift in (0, 8, 16, 24))
    return ((total - 510).to(torch.float32) + (word % 1021).to(torch.float32) / 1021) / 147.8


def _special(word: Tensor) -> Tensor:
    bits = torch.tensor([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F7FFFFF, 0xFF7FFFFF], device=word.device)
    return bits[word % len(bits)]
