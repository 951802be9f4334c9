"""The position family: y says which token of which rank reached which expert, in which slot.

Every column of x carries one field of its token's place (rank, token): a base-4 digit d as the value 2^-d, or the
marker 1. An expert copies fields: rows of W1's up listen to one column each, rows of W2 to one column of I each, and
expert e writes to its own columns of y only. Values that are powers of two times one number keep their ratio through
every rounding of the layer, so a row of y, or a slot, is read back without a tolerance for arithmetic: digits from the
ratio of a column to its marker, slots from the marker, since slot k has the routing weight 2^-k.

Scales differ in every block; codes make up for them, so that a scale of another block moves digits.
As DeepEP's tests do: a row that is misrouted, swapped, doubled or dropped changes y, and `decode_position` says how.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaproof.cases.inputs.draws import CHOICE, W1_SF, W2_SF, X_SF, Drawn, powers, stream
from megaproof.quant import atoms, philox
from megaproof.quant.cast import BLOCK, quantise_activation
from megaproof.quant.formats import f32_bits
from megaproof.reference.operands import ExpertWeights, e4m3

if TYPE_CHECKING:
    from megaproof.cases.cases import Case

RANK_DIGITS, TOKEN_DIGITS = 4, 6
FIELDS = 1 + RANK_DIGITS + TOKEN_DIGITS
"""Marker, then the digits of rank and of token, base 4, least significant first."""
GROUP, LEVELS = 64, 3
"""64-group g of I is 2^-(g mod 3) as large as the first one."""
GATE, UP = 64.0, 0.5
"""Every gate (the clamp lowers it), and the up of a marker. Clamps below 1/2 would flatten the digits."""


@dataclass(frozen=True)
class Arrival:
    """What one expert added to a row of y: the token that reached it, in the slots of `slots`."""

    expert: int
    slots: tuple[int, ...]
    """Slots whose weights 2^-k add up to the marker; empty where no sum of them does."""
    source: tuple[int, int] | None
    """(rank, token), or None where the digits are no token's: rows mixed, cut or scaled."""


# --- making -----------------------------------------------------------------------------------------------------------


def make_position(case: Case, topk_idx: list[Tensor], device: torch.device) -> Drawn:
    """See the module. Raises ValueError for a case whose places or experts do not fit, or a clamp below 1/2."""
    shape, clamp = case.shape, case.recipe.clamp
    if shape.hidden // shape.experts < FIELDS:
        raise ValueError(f"shape {shape.name}: the position family needs {FIELDS} columns of y for each expert")
    if case.ranks > 4**RANK_DIGITS or max(case.tokens, default=0) > 4**TOKEN_DIGITS or shape.topk > 16:
        raise ValueError(f"{case.ranks} ranks of {case.tokens} tokens, top-k {shape.topk}: too many to encode")
    if clamp is not None and clamp < UP:
        raise ValueError(f"clamp {clamp} flattens the digits: it must be at least {UP}")

    x, x_sf = [], []
    for rank, tokens in enumerate(case.tokens):
        blocks = shape.hidden // BLOCK
        exponent = _exponents(case, X_SF, rank, tokens, blocks)
        field = _field_of(torch.arange(shape.hidden))
        value = -encode_place(rank, torch.arange(tokens))[:, field] - exponent.repeat_interleave(BLOCK, dim=1)
        x.append(atoms.encode_e4m3(powers(value)).to(device))
        x_sf.append(powers(exponent).to(device))
    weight = powers(-torch.arange(shape.topk)).repeat(max(case.tokens, default=0), 1)
    topk_weights = [weight[:tokens].clone().to(device) for tokens in case.tokens]
    return x, x_sf, topk_weights, functools.partial(_expert, case, device)


def encode_place(rank: int, token: Tensor) -> Tensor:
    """int64 [n] tokens of a rank -> their fields, int64 [n, FIELDS], digits 0..3 and the marker's 0."""
    ranks = torch.full_like(token, rank)
    digits = [ranks >> 2 * i & 3 for i in range(RANK_DIGITS)] + [token >> 2 * i & 3 for i in range(TOKEN_DIGITS)]
    return torch.stack([torch.zeros_like(token), *digits], dim=1)


def _field_of(column: Tensor) -> Tensor:
    return column % FIELDS


def _exponents(case: Case, purpose: int, index: int, rows: int, columns: int) -> Tensor:
    """int64 [rows, columns] in -2..2, never the same side by side: steps of 1 or 2 modulo 5 each way."""
    step = philox.words(case.seed, stream(purpose, index), rows + columns) % 2 + 1
    down, right = step[:rows].cumsum(0), step[rows:].cumsum(0)
    return (down[:, None] + right[None, :]) % 5 - 2


def _columns(word: Tensor, field: Tensor, size: int) -> Tensor:
    """A random column of `size` that carries the field."""
    return field + word % ((size - FIELDS) // FIELDS + 1) * FIELDS


def _expert(case: Case, device: torch.device, e: int) -> ExpertWeights:
    hidden, inter = case.shape.hidden, case.shape.intermediate
    word = philox.words(case.seed, stream(CHOICE, e), 2 * inter + hidden)
    w1_exp = _exponents(case, W1_SF, e, 2 * inter // BLOCK, hidden // BLOCK)
    w2_exp = _exponents(case, W2_SF, e, hidden // BLOCK, inter // BLOCK)
    rows = torch.arange(2 * inter)
    field = torch.where(rows < inter, 0, _field_of(rows - inter))
    column = _columns(word[: 2 * inter], field, hidden)
    group = torch.arange(inter) // GROUP % LEVELS
    value = torch.cat([torch.full((inter,), int(math.log2(GATE))), int(math.log2(UP)) - group])
    value = value - w1_exp[rows // BLOCK, column // BLOCK]
    w1 = torch.zeros(2 * inter, hidden, dtype=torch.uint8, device=device)
    w1[rows.to(device), column.to(device)] = atoms.encode_e4m3(powers(value)).to(device)

    rows = torch.arange(*region(case, e))
    column = _columns(word[2 * inter :][: len(rows)], _field_of(rows - rows[0]), inter)
    value = group[column] - w2_exp[rows // BLOCK, column // BLOCK]
    w2 = torch.zeros(hidden, inter, dtype=torch.uint8, device=device)
    w2[rows.to(device), column.to(device)] = atoms.encode_e4m3(powers(value)).to(device)
    return e4m3(w1, powers(w1_exp).to(device), w2, powers(w2_exp).to(device))


def region(case: Case, e: int) -> tuple[int, int]:
    """First column of y that is expert e's, and the next expert's first."""
    width = case.shape.hidden // case.shape.experts
    return e * width, (e + 1) * width


# --- reading ----------------------------------------------------------------------------------------------------------


def decode_token(codes: Tensor, codes_sf: Tensor) -> tuple[int, int] | None:
    """(rank, token) of a dispatched row, uint8 [H] and float32 [H/128]; None unless every column says the same."""
    value = atoms.decode_e4m3(codes.cpu()) * codes_sf.cpu().repeat_interleave(BLOCK)
    return _decode_fields(value, 1.0)


def decode_position(row: Tensor, case: Case) -> list[Arrival]:
    """What a row of y, or of a slot, is made of: bfloat16 or float32 [H] -> one `Arrival` for each expert in it.

    A slot holds one arrival, unless the recipe folds weights in the combine: then its marker always says slot 0.
    """
    value, one, arrivals = row.cpu().to(torch.float32), marker(case), []
    for e in range(case.shape.experts):
        part = value[slice(*region(case, e))]
        if not bool((part == 0).all()):
            weight = float(part[0]) / one
            source = _decode_fields(part, float(part[0])) if weight else None
            arrivals.append(Arrival(e, _slots(weight, case.shape.topk), source))
    return arrivals


def marker(case: Case) -> float:
    """What a marker of weight 1 has become when it reaches a slot: silu(gate) * up, quantised."""
    recipe = case.recipe
    gate = torch.tensor([GATE if recipe.clamp is None else min(GATE, recipe.clamp)])
    v = (atoms.silu(gate, recipe.silu == "fast") * UP).expand(1, GROUP)
    code, sf = quantise_activation(v, GROUP, recipe.activation_scale, recipe.zero_group)
    return float(atoms.decode_e4m3(code)[0, 0] * sf[0, 0])


def _slots(weight: float, topk: int) -> tuple[int, ...]:
    """Slots whose weights add up to `weight`, which BF16 may have rounded."""
    total = weight * 2 ** (topk - 1)
    if not math.isfinite(total) or not 0 < round(total) < 1 << topk or abs(total - round(total)) > 2.0**-7 * total:
        return ()
    return tuple(k for k in range(topk) if round(total) >> (topk - 1 - k) & 1)


def _decode_fields(value: Tensor, one: float) -> tuple[int, int] | None:
    """Values of the columns 0, 1, ... of one place -> (rank, token), or None where two copies disagree."""
    ratio = (value / one).to(torch.float32)
    digit = 127 - (f32_bits(ratio * 1.25) >> 23)  # nearest power of two, BF16's rounding of a sum of slots apart
    near = (ratio * powers(digit.clamp(-126, 126)) - 1).abs() <= 2.0**-7
    field = _field_of(torch.arange(len(value)))
    found = torch.zeros(FIELDS, dtype=torch.int64).index_copy_(0, field, digit)
    if not bool((near & (digit == found[field]) & (digit >= 0) & (digit <= 3)).all()) or int(found[0]) != 0:
        return None
    weights = 4 ** torch.arange(max(RANK_DIGITS, TOKEN_DIGITS))
    rank, token = found[1 : 1 + RANK_DIGITS], found[1 + RANK_DIGITS :]
    return int((rank * weights[:RANK_DIGITS]).sum()), int((token * weights[:TOKEN_DIGITS]).sum())
