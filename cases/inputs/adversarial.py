"""The adversarial family: inputs that stand exactly on the edges of the recipe, and sums that the tensor core cuts.

How a value is put where it is wanted. A few columns of x are probes: an 'exact' token is 1 there and 0 elsewhere, so a
row of W1 says its gate (or up) itself, as six E4M3 digits, three in the first K block and three, 2^-12 as heavy, in
the last: any fp32 number, summed without a rounding. `edges.solve` then finds, for a wanted v, a gate and an up whose
activation is exactly v. What columns of I hold goes by 64-group, see `GROUP_KINDS`; what tokens are, see `TOKEN_KINDS`.
All the rest of the weights is random, so that other tokens exercise the sums.

Gates and ups follow the clamp of the case's recipe and no other field of it. Where both forms of silu must give a
value, `edges.solve` takes gates on which they agree; for every second tie gates on which they differ, by an ulp that
shows.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaproof.cases.inputs.draws import CHOICE, SPARSE, TOPK_WEIGHTS, X_CODES, X_SF, Drawn, powers, scales, stream
from megaproof.cases.inputs.edges import CODES, DIGITS, EDGES, MIDPOINTS, SUBNORMAL, digits, limit, solve, up_unit
from megaproof.cases.inputs.families import draw_codes, expert
from megaproof.quant import philox
from megaproof.quant.cast import BLOCK
from megaproof.quant.formats import f32_bits, f32_from_bits
from megaproof.reference.operands import ExpertWeights, e4m3

if TYPE_CHECKING:
    from megaproof.cases.cases import Case

GROUP = 64
GROUP_KINDS = ("ties", "edge", "cold", "clamp", "subnormal", "zero")
"""64-group j of expert e is of kind (j + e) mod 6. ties: values halfway between two codes; edge: the amax one ulp
below 448 * 2^j, on it, or one above; cold: every gate where exp(-gate) nears the end of fp32; clamp: gates and ups on
+-c, an ulp beside it and beyond; subnormal: codes below 2^-6 and ties between them; zero: rows of W1's gate are 0."""

TOKEN_KINDS = (
    *("exact", "cancel", "minus_up", "spread", "by_subnormals", "zero"),
    *("minus_gate", "huge", "exact", "tiny", "cancel", "holes"),
)
"""Kind of a token, by its row over all ranks, modulo 12. The exact ones: plain, ups negated, gates negated, probes that
are subnormal codes. cancel: in each k32 step two columns of 448 whose products cancel in even experts, beside values
so small that little or nothing of them survives; huge, tiny: scales 2^20 or 2^-66; holes: every second block -0."""

ROUTING = (
    *(1.0, 2.0**-24, 0.5, None, -(2.0**-25), -0.25, 0.0, 2.0**-23, 2.0, None),
    *(-1.0, -0.0, 2.0**-24, 1.0, 2.0**-25, 4.0, 2.0**-24, 1.0, None),
)
"""Routing weights, by place in the batch, modulo 19; None: a random one of either sign. Two small slots break a tie of
y's rounding together, and neither does alone: so y depends on the order in which the slots are summed."""

GATE_COLUMNS, UP_COLUMNS = (5, 40, 77), (22, 54, 119)
"""Probe columns, in the first and in the last K block."""
PROBE_SCALE = 9
"""x_sf of an exact token is 2^9 in the first block and 2^-3, `DIGITS` binary digits less, in the last."""
GATE_UNIT = -2
"""A gate's digit 1 is worth 2^-2, or 2^-1 in every other block of rows."""
PAIR = (3, 20)
"""The two columns of a k32 step whose products cancel, in all blocks but those of the probes."""
SPARSE_ROWS = 4
"""Every fourth row of W2 holds two codes only, so that its outputs have few digits and BF16 ties occur."""

COLD = (-86.5, -87.0, -87.25, -87.3125, -87.33654, -87.3366, -87.5, -88.0, -88.7228, -89.0, -90.5, -104.0, -150.0)


def make_adversarial(case: Case, topk_idx: list[Tensor], device: torch.device) -> Drawn:
    """See the module. Raises ValueError where hidden or intermediate have a single block of 128."""
    if min(case.shape.hidden, case.shape.intermediate) < 2 * BLOCK:
        raise ValueError(
            f"shape {case.shape.name}: the adversarial family needs hidden and intermediate >= {2 * BLOCK}"
        )
    x, x_sf = zip(*(_tokens(case, rank, device) for rank in range(case.ranks)), strict=True)
    topk_weights = [_routing_weights(case, rank).to(device) for rank in range(case.ranks)]
    return list(x), list(x_sf), topk_weights, functools.partial(_expert, case, device)


# --- experts ----------------------------------------------------------------------------------------------------------


def _expert(case: Case, device: torch.device, e: int) -> ExpertWeights:
    hidden, inter, clamp = case.shape.hidden, case.shape.intermediate, case.recipe.clamp
    lut = "spread" if e % 4 == 3 else "gaussian"
    w1, w1_sf, w2, w2_sf = expert(case, device, lut, -12, e).tensors()
    w1_sf, w2_sf = w1_sf.cpu(), w2_sf.cpu()

    if e % 2 == 0:
        steps = _steps(w1)
        steps[..., PAIR[1]] = steps[..., PAIR[0]] ^ 0x80

    blocks = inter // BLOCK
    jitter = torch.arange(blocks) % 2
    units = torch.cat([GATE_UNIT + jitter, up_unit(clamp) + jitter])  # of each block of W1's rows
    w1_sf[:, 0] = powers(units - PROBE_SCALE)
    w1_sf[:, -1] = powers(units - PROBE_SCALE)
    for column in (1, -2):  # beside them, no power of two
        w1_sf[:, column] *= torch.where(f32_bits(w1_sf[:, column]) & 0x7FFFFF == 0, 1.25, 1.0)
    values = torch.cat(wanted_rows(case, e))
    table = digits(values, powers(units).repeat_interleave(BLOCK))
    for half, (own, other) in enumerate(((GATE_COLUMNS, UP_COLUMNS), (UP_COLUMNS, GATE_COLUMNS))):
        rows = slice(half * inter, (half + 1) * inter)
        for start, part in ((0, table[rows, :3]), (hidden - BLOCK, table[rows, 3:])):
            for column, code in zip(own, part.to(device).unbind(1), strict=True):
                w1[rows, start + column] = code
            for column in other:
                w1[rows, start + column] = 0
    for j in range(inter // GROUP):
        if GROUP_KINDS[(j + e) % len(GROUP_KINDS)] == "zero":
            w1[j * GROUP : (j + 1) * GROUP] = 0

    _make_sparse(case, e, w2, w2_sf)
    return e4m3(w1, w1_sf.to(device), w2, w2_sf.to(device))


def _steps(codes: Tensor) -> Tensor:
    """The k32 steps between the probes' blocks: a view [..., steps, 32] of codes [..., H]."""
    return codes[..., BLOCK:-BLOCK].unflatten(-1, (-1, 32))


def wanted_rows(case: Case, e: int) -> tuple[Tensor, Tensor]:
    """Gate and up that expert e gives an exact token, float32 [I] each."""
    inter, clamp, gates, ups = case.shape.intermediate, case.recipe.clamp, [], []
    word = philox.words(case.seed, stream(CHOICE, e), inter).reshape(-1, GROUP)
    for j, draw in enumerate(word):
        kind = GROUP_KINDS[(j + e) % len(GROUP_KINDS)]
        gate, up = (
            _BY_KIND[kind](clamp, draw) if kind in _BY_KIND else _solved(kind, clamp, draw, (j + e) // len(GROUP_KINDS))
        )
        sign = torch.where(draw >> 30 & 1 == 1, -1.0, 1.0)
        gates.append(gate)
        ups.append(up * sign)
    return torch.cat(gates), torch.cat(ups)


def _solved(kind: str, clamp: float | None, draw: Tensor, turn: int) -> tuple[Tensor, Tensor]:
    """Values of one kind, and one that makes the amax, somewhere in the group."""
    targets = {"ties": MIDPOINTS, "edge": CODES[1:-1], "subnormal": SUBNORMAL}[kind]
    gate, up = (t[draw % len(targets)] for t in solve(clamp, targets))
    if kind == "ties":
        other = (t[draw % len(targets)] for t in solve(clamp, targets, False))
        gate, up = (torch.where(draw >> 20 & 1 == 1, a, b) for a, b in zip((gate, up), other, strict=True))
    edge = turn % len(EDGES) if kind == "edge" else 1
    at = int(draw[0] >> 16) % GROUP
    for values, found in zip((gate, up), solve(clamp, EDGES), strict=True):
        values[at] = found[edge]
    return gate, up


def _cold(clamp: float | None, draw: Tensor) -> tuple[Tensor, Tensor]:
    up = limit(clamp) * torch.tensor([1.0, 0.5, 0.25, 0.75])[draw >> 8 & 3]
    return torch.tensor(COLD)[draw % len(COLD)], up


def _clamp(clamp: float | None, draw: Tensor) -> tuple[Tensor, Tensor]:
    """On the clamp, one ulp beside it, far beyond, and the same below zero."""
    c = torch.tensor([limit(clamp)])
    below, above = (f32_from_bits(f32_bits(c) + step) if float(c) else c for step in (-1, 1))
    sides = torch.cat([c, below, above, 1.5 * c, -c, -below, -above, -1.5 * c, -0.0 * c, 0.125 * c])
    return sides[draw % len(sides)], sides[(draw >> 8) % len(sides)]


def _zero(clamp: float | None, draw: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(GROUP), torch.full((GROUP,), limit(clamp))


_BY_KIND = {"cold": _cold, "clamp": _clamp, "zero": _zero}


def _make_sparse(case: Case, e: int, w2: Tensor, w2_sf: Tensor) -> None:
    """Every fourth row keeps two columns of one 64-group, in a block whose scale is a power of two; in place."""
    rows = torch.arange(0, case.shape.hidden, SPARSE_ROWS)
    block_row = torch.arange(w2_sf.shape[0])
    column_block = (block_row + e) % w2_sf.shape[1]
    w2_sf[block_row, column_block] = powers(-10 + block_row % 2)  # another value than any power of two beside it
    word = philox.words(case.seed, stream(SPARSE, e), 2 * len(rows)).reshape(2, -1)
    start = column_block[rows // BLOCK] * BLOCK + (word[0] >> 8) % 2 * GROUP
    first = start + word[0] % GROUP
    second = start + (word[0] % GROUP + 1 + word[1] % (GROUP - 1)) % GROUP
    rows, first, second = (t.to(w2.device) for t in (rows, first, second))
    kept = w2[rows, first], w2[rows, second]
    w2[::SPARSE_ROWS] = 0
    for column, code in zip((first, second), kept, strict=True):
        w2[rows, column] = code


# --- tokens -----------------------------------------------------------------------------------------------------------


def _tokens(case: Case, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, hidden = case.tokens[rank], case.shape.hidden
    first = sum(case.tokens[:rank])
    luts = ("gaussian", "spread", "subnormal")
    parts = {lut: draw_codes(case, X_CODES, rank, lut, (tokens, hidden), device) for lut in luts}
    x = parts["gaussian"].clone()
    x_sf = scales(case.seed, stream(X_SF, rank), tokens * hidden // BLOCK, -7).reshape(tokens, hidden // BLOCK)
    for token in range(tokens):
        kind = TOKEN_KINDS[(first + token) % len(TOKEN_KINDS)]
        row = x[token]
        if kind in ("spread", "huge"):
            row[:] = parts["spread"][token]
        if kind in ("huge", "tiny"):
            x_sf[token] *= 2.0**20 if kind == "huge" else 2.0**-66
        elif kind == "zero":
            row[:] = 0
        elif kind == "holes":
            row.view(-1, BLOCK)[1::2] = 0x80
        elif kind == "cancel":
            _cancel(row, parts["subnormal"][token])
        elif kind in EXACT:
            _probe(row, x_sf[token], kind)
    return x, x_sf.to(device)


def _cancel(row: Tensor, small: Tensor) -> None:
    """448 in two columns of each step; beside them subnormals, or in every second block values up to 1."""
    larger = torch.where(small & 7 == 0, small, small & 0x80 | (small & 7) << 3)
    odd = (torch.arange(row.shape[0], device=row.device) // BLOCK) % 2 == 1
    row[:] = torch.where(odd, larger, small)
    for column in PAIR:
        _steps(row)[:, column] = 0x7E


EXACT = {
    "exact": (0x38, 0x38, 0),
    "minus_up": (0x38, 0xB8, 0),
    "minus_gate": (0xB8, 0x38, 0),
    "by_subnormals": (4, 4, 7),
}
"""Kind -> codes of the probes of gate and up, and by how many binades the scale makes up for them."""


def _probe(row: Tensor, row_sf: Tensor, kind: str) -> None:
    gate, up, shift = EXACT[kind]
    row[:] = 0
    for start, exponent in ((0, PROBE_SCALE), (row.shape[0] - BLOCK, PROBE_SCALE - DIGITS)):
        row[[start + column for column in GATE_COLUMNS]] = gate
        row[[start + column for column in UP_COLUMNS]] = up
        row_sf[start // BLOCK] = 2.0 ** (exponent + shift)


def _routing_weights(case: Case, rank: int) -> Tensor:
    tokens, topk = case.tokens[rank], case.shape.topk
    word = philox.words(case.seed, stream(TOPK_WEIGHTS, rank), tokens * topk)
    random = ((word >> 8) - (1 << 23)).to(torch.float32) * 2.0**-23
    place = (sum(case.tokens[:rank]) * topk + torch.arange(tokens * topk)) % len(ROUTING)
    fixed = torch.tensor([torch.nan if w is None else w for w in ROUTING])[place]
    return torch.where(fixed.isnan(), random, fixed).reshape(tokens, topk)
