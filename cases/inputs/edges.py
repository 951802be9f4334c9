"""Gates and ups whose activation stands exactly on an edge of the recipe, and the E4M3 digits that say them."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from megaproof.cases.inputs.draws import powers
from megaproof.quant import atoms
from megaproof.quant.formats import f32_bits, f32_from_bits

DIGITS = 12
"""Binary digits by which the last three E4M3 digits of a value weigh less than its first three."""
LARGEST = 16.0
"""Stands for the clamp where there is none below it."""


def limit(clamp: float | None) -> float:
    """The clamp, or what stands for it."""
    return LARGEST if clamp is None else min(clamp, LARGEST)


def up_unit(clamp: float | None) -> int:
    """Exponent of an up's digit 1: ups near the clamp have a leading digit of 128 to 255."""
    return int(f32_bits(torch.tensor([max(limit(clamp), 2.0**-20)]))[0] >> 23) - 127 - 7


def digits(value: Tensor, unit: Tensor) -> Tensor:
    """float32 [n] -> E4M3 codes uint8 [n, 6], most significant first, each cut toward zero.

    value = unit * (the first three + 2^-12 * the last three), exactly where |value| / unit is in [4, 448].
    """
    rest, out = value.double() / unit.double(), []
    for place in range(6):
        if place == 3:
            rest = rest * 2.0**DIGITS
        magnitude = rest.abs().clamp(max=448.0).to(torch.float32)  # double has at most 24 digits left here
        grid = powers(((f32_bits(magnitude) >> 23) - 127 - 3).clamp(min=-9)).double()
        digit = (magnitude.double() / grid).floor() * grid
        digit = torch.where(rest < 0, -digit, digit)
        out.append(atoms.encode_e4m3(digit.to(torch.float32)))
        rest = rest - digit
    return torch.stack(out, dim=1)


@functools.cache
def solve(clamp: float | None, targets: tuple[float, ...], agree: bool = True) -> tuple[Tensor, Tensor]:
    """For each target t: gate and up, float32 [n], with fl(silu(gate) * up) = t * 2^`level`, neither beyond the clamp.

    That is the fast silu; the precise one is the same (agree) or another, and then so is fl(silu(gate) * up). Up lies
    where its digits say it exactly. Where nothing fits (a clamp of 0) both are 0.
    """
    top = limit(clamp)
    gates = torch.arange(15, 7, -1) * powers(torch.arange(1, -40, -1))[:, None]  # 4 binary digits, from the largest
    gates = gates.reshape(-1)[None, gates.reshape(-1) <= top]
    fast, precise = (atoms.silu(gates, mode) for mode in (True, False))
    wanted = torch.tensor(targets)[:, None] * powers(level(clamp))
    up = wanted / fast
    unit = 2.0 ** up_unit(clamp)
    forms = fast == precise if agree else precise * up != wanted
    fits = forms & (fast * up == wanted) & (up.abs() <= top) & (up.abs() >= 4 * unit)
    first = fits.to(torch.uint8).argmax(1)
    found = fits.any(1)
    return torch.where(found, gates[0, first], 0.0), torch.where(found, up[torch.arange(len(first)), first], 0.0)


def level(clamp: float | None) -> int:
    """Largest j for which 448 * 2^j, and one ulp more, is an activation."""
    top = torch.tensor([max(limit(clamp), 2.0**-20)])
    most = float(atoms.silu(top, True)[0] * top[0]) * (1 - 2.0**-10) / 448
    return int(f32_bits(torch.tensor([most]))[0] >> 23) - 127


CODES = tuple(atoms.decode_e4m3(torch.arange(127)).tolist())
"""Magnitudes of the codes."""
MIDPOINTS = tuple((low + high) / 2 for low, high in itertools.pairwise(CODES))
SUBNORMAL = (*CODES[1:8], *MIDPOINTS[:8])
EDGES = tuple(f32_from_bits(torch.tensor([0x43DFFFFF, 0x43E00000, 0x43E00001])).tolist())
"""One ulp below 448, 448, one above."""
