"""The lattice family: inputs on which every step of the layer is exact, so that integers alone predict y.

Operands are -1, 0 and 1, scale factors powers of two that differ from block to block and cancel in the products. What
makes a sum come out as wanted, for every token and every expert:

pairs     Columns of x come in pairs of equal value, spread over the K blocks. A weight row puts random opposite codes
          on a pair: its partial sums wander, its total is 0. Only on chosen pairs do the two codes not cancel.
constant  pairs in which x is 1 for every token. They make one sentinel column in each 64-group: gate and up at their
          largest, 128 and +-14 (times the block's scale), so that the amax is 448 * 2^j.
field     groups of one-hot pairs: a token has one of CLASSES classes in each field. A gate row listens to one field and
          has a level 0, 1, 2 or 4 (times 32 * 2^s) for each class, so gates are 0 or >= 32.
free      random -1, 0, 1 for each token. An up row adds up to 14 of them, with signs: an integer in [-14, 14].

So the codes of the L2 activations are multiples of 8 up to 448, all exact. What remains to be rounded are the slots and
y. Use a clamp of None, a power of two >= 32, or any number >= 512 (the largest gate). `reference.oracle.lattice_y`
checks every one of these claims.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megaproof.quant import philox, twin
from megaproof.reference.operands import ExpertWeights, Weights, e4m3

BLOCK, GROUP = 128, 64
ONE, MINUS_ONE = 0x38, 0xB8
"""E4M3 codes of 1 and -1."""
CLASSES, COPIES = 4, 2
"""Classes of a field; pairs that say the same of one class (two, so that a gate can reach level 4)."""
CONSTANTS = 7
"""Constant pairs: 7 * 2 = 14, the largest up."""
LEVELS = (0, 0, 1, 1, 2, 2, 4, 4)
UP_TERMS = (8, 3)
"""Pairs that an up row adds up, of weight 1 and of weight 2; 14 and 0 where no block has weight 2."""

# Streams of the generator: what is drawn << 40, plus the expert or the rank.
PLAN, FREE, CLASS, TOKEN_SCALE, ROUTING, W1, W1_SIGNAL, W2, W_SCALE = (0x1A77 << 48 | i << 40 for i in range(9))

SIGNS = torch.tensor([ONE] * 96 + [MINUS_ONE] * 96 + [0] * 64, dtype=torch.uint8)
"""A random byte -> a code: 1 and -1 with 3/8 each, 0 with 1/4."""


@dataclass(frozen=True)
class LatticePlan:
    """What all tokens and experts of a layer share; tensors on the CPU."""

    seed: int
    hidden: int
    intermediate: int
    source: Tensor
    """int64 [H]: column -> pair, or H/2 + pair for a pair's second column."""
    doubled: Tensor
    """int64 [H/128]: 1 for K blocks whose products weigh 2."""
    x_exp: Tensor
    """int64 [H/128]: exponent that x_sf has in a K block and w1_sf has not."""
    fields: int
    single: int
    """Pairs in blocks of weight 1; those of weight 2 follow. Constant, field and then free pairs come first."""

    @property
    def free_from(self) -> int:
        """First free pair."""
        return CONSTANTS + self.fields * CLASSES * COPIES


def make_lattice(
    hidden: int,
    intermediate: int,
    experts: int,
    topk: int,
    tokens_per_rank: list[int] | tuple[int, ...],
    topk_idx: list[Tensor],
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Weights]:
    """x uint8 [T_r,H], x_sf float32 [T_r,H/128], topk_weights float32 [T_r,K], lists by rank, and weights(e).

    topk_idx int64 [T_r,K] is given, -1 = masked. weights(e) makes the two matrices of expert e of the layer on demand.
    All devices: the same bytes.
    Raises ValueError when sizes are not multiples of 128 or do not match.
    """
    for name, value in (("hidden", hidden), ("intermediate", intermediate)):
        if value <= 0 or value % BLOCK:
            raise ValueError(f"{name} = {value} must be a positive multiple of {BLOCK}")
    shapes = [tuple(idx.shape) for idx in topk_idx]
    if shapes != [(tokens, topk) for tokens in tokens_per_rank]:
        raise ValueError(
            f"topk_idx has shapes {shapes}; expected [tokens, {topk}] with tokens = {list(tokens_per_rank)}"
        )

    plan = make_plan(hidden, intermediate, seed)
    x, x_sf, topk_weights = [], [], []
    for rank, tokens in enumerate(tokens_per_rank):
        x.append(_tokens(plan, rank, tokens, device))
        offset = _draw(seed, TOKEN_SCALE, rank, tokens, 2)  # a token's own factor, 1 or 2
        x_sf.append(_pow2(offset.unsqueeze(1) + plan.x_exp).to(device))
        topk_weights.append(_routing_weights(seed, rank, tokens, topk).to(device))

    def weights(expert: int) -> ExpertWeights:
        if not 0 <= expert < experts:
            raise ValueError(f"expert = {expert} must be in [0, {experts})")
        return make_expert(plan, expert, device)

    return x, x_sf, topk_weights, weights


def make_plan(hidden: int, intermediate: int, seed: int) -> LatticePlan:
    """The pairs, from a permutation of the columns within the blocks of each weight."""
    blocks = hidden // BLOCK
    doubled = (torch.arange(blocks) % 4 >= 2).long()
    column_doubled = doubled.repeat_interleave(BLOCK)
    order = torch.argsort(philox.words(seed, PLAN, hidden), stable=True)
    first, second = [], []
    for weight in (0, 1):
        columns = order[column_doubled[order] == weight]
        first.append(columns[0::2])
        second.append(columns[1::2])
    source = torch.empty(hidden, dtype=torch.int64)
    source[torch.cat(first + second)] = torch.arange(hidden)
    single = first[0].numel()
    fields = min(8, (single - CONSTANTS) // (2 * CLASSES * COPIES))
    x_exp = _draw(seed, PLAN, 1, blocks, 7) - 3
    return LatticePlan(seed, hidden, intermediate, source, doubled, x_exp, fields, single)


def make_expert(plan: LatticePlan, expert: int, device: torch.device | str) -> ExpertWeights:
    """One expert's weights: noise that cancels over each pair, and the pairs that count."""
    seed, hidden, intermediate = plan.seed, plan.hidden, plan.intermediate
    pairs, lut = hidden // 2, SIGNS.to(device)
    noise = twin.codes(seed, W1 + expert, 2 * intermediate * pairs, lut).view(2 * intermediate, pairs)
    halves = torch.stack([noise, (noise ^ 0x80) * (noise != 0)], dim=1)  # [2I, 2, H/2]
    rows, where, total, side = (t.to(device) for t in _signals(plan, expert))
    code = torch.where(total > 0, ONE, MINUS_ONE).to(torch.uint8)
    for half in (0, 1):  # a total of +-2 sets both codes, +-1 one of them
        halves[rows, half, where] = torch.where((total.abs() == 2) | (side == half), code, 0)
    w1 = _columns(halves.view(2 * intermediate, hidden), plan.source)
    w2 = twin.codes(seed, W2 + expert, hidden * intermediate, lut).view(hidden, intermediate)

    inner, outer = intermediate // BLOCK, hidden // BLOCK
    gate, up = _draw(seed, W_SCALE, 2 * expert, 2 * inner, 2).split(inner)
    rows_exp = torch.cat([5 + gate, -up])  # gates are multiples of 2^5 = 32; ups stay within 28
    w1_exp = rows_exp.unsqueeze(1) + (plan.doubled - plan.x_exp)
    w2_exp = _draw(seed, W_SCALE, 2 * expert + 1, outer * inner, 4).view(outer, inner) - 4
    return e4m3(w1, _pow2(w1_exp).to(device), w2, _pow2(w2_exp).to(device))


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index]; on a CPU by numpy, in a third of the time."""
    if x.device.type != "cpu":
        return x[:, index.to(x.device)]
    return torch.from_numpy(np.take(x.numpy(), index.numpy(), axis=1))


def _tokens(plan: LatticePlan, rank: int, tokens: int, device: torch.device | str) -> Tensor:
    """x uint8 [tokens, H] of one rank: both columns of a pair get the pair's code."""
    pairs = plan.hidden // 2
    code = twin.codes(plan.seed, FREE + rank, tokens * pairs, SIGNS.to(device)).view(tokens, pairs)
    code[:, :CONSTANTS] = ONE
    chosen = _draw(plan.seed, CLASS, rank, tokens * plan.fields, CLASSES).view(tokens, plan.fields, 1, 1)
    one_hot = (chosen == torch.arange(CLASSES).view(-1, 1)).expand(-1, -1, -1, COPIES).flatten(1)
    code[:, CONSTANTS : plan.free_from] = (one_hot * ONE).to(torch.uint8).to(device)
    return _columns(code, plan.source % pairs).contiguous()


def _routing_weights(seed: int, rank: int, tokens: int, topk: int) -> Tensor:
    """+-2^-3 ... +-2^0 and, one time in 16, 0. Masked slots get one too: it must not matter."""
    draw = _draw(seed, ROUTING, rank, tokens * topk, 64).view(tokens, topk)
    magnitude = _pow2(-(draw & 3))
    signed = torch.where(draw & 4 != 0, -magnitude, magnitude)
    return torch.where(draw >> 3 >= 7, torch.where(draw & 4 != 0, 0.0, signed), signed)


def _signals(plan: LatticePlan, expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs whose codes don't cancel: (row of w1, pair, total of the two codes, half that holds a total of +-1)."""
    size, groups = plan.intermediate, plan.intermediate // GROUP
    up_terms = UP_TERMS if plan.doubled.any() else (sum(UP_TERMS) + UP_TERMS[1], 0)
    per_row = CLASSES + sum(up_terms) + 3
    draw = philox.words(plan.seed, W1_SIGNAL + expert, size * per_row + groups)
    by_row, sentinel_draw = draw[: size * per_row].view(size, per_row), draw[size * per_row :]
    column = torch.arange(size)
    sentinel = torch.arange(groups) * GROUP + sentinel_draw % GROUP
    is_sentinel = torch.zeros(size, dtype=torch.bool).index_fill(0, sentinel, True)
    parts = []

    def add(rows: Tensor, pairs: Tensor, total: Tensor, side: Tensor) -> None:
        shape = torch.broadcast_shapes(rows.shape, pairs.shape, total.shape, side.shape)
        every = [t.expand(shape).reshape(-1) for t in (rows, pairs, total, side)]
        keep = every[2] != 0
        parts.append([t[keep] for t in every])

    # Gates: one field a row, a level for each class, as the sum of two copies' totals.
    field_pair = CONSTANTS + by_row[:, -1] % plan.fields * CLASSES * COPIES
    level = torch.tensor(LEVELS)[by_row[:, :CLASSES] % len(LEVELS)].masked_fill(is_sentinel.unsqueeze(1), 0)
    for copy in range(COPIES):
        total = (level - 2 * copy).clamp(0, 2)
        pair = field_pair.unsqueeze(1) + torch.arange(CLASSES) * COPIES + copy
        add(column.unsqueeze(1), pair, total, by_row[:, :CLASSES] >> 8 & 1)

    # Ups: distinct free pairs, each with a sign; those in blocks of weight 2 count twice.
    at = CLASSES
    for start, count, terms in zip(
        (plan.free_from, plan.single),
        (plan.single - plan.free_from, plan.hidden // 2 - plan.single),
        up_terms,
        strict=True,
    ):
        if terms:
            step = count // terms
            spread = torch.arange(terms) * step + by_row[:, at : at + terms] % step
            pair = start + (spread + by_row[:, -2:-1] % count) % count
            total = (1 - 2 * (by_row[:, at : at + terms] >> 30 & 1)).masked_fill(is_sentinel.unsqueeze(1), 0)
            add(size + column.unsqueeze(1), pair, total, by_row[:, at : at + terms] >> 29 & 1)
        at += terms

    # Sentinels: the largest gate, level 4, and an up of +-14.
    both = torch.zeros(1, 1, dtype=torch.int64)
    sign = 1 - 2 * (sentinel_draw.unsqueeze(1) >> 20 & 1)
    add(sentinel.unsqueeze(1), torch.arange(2), both + 2, both)
    add(size + sentinel.unsqueeze(1), torch.arange(CONSTANTS), 2 * sign, both)
    first, second, third, fourth = (torch.cat(column) for column in zip(*parts, strict=True))
    return first, second, third, fourth


def _pow2(exponent: Tensor) -> Tensor:
    """2^e as float32, from its bits."""
    return (exponent + 127 << 23).to(torch.int32).view(torch.float32)


def _draw(seed: int, stream: int, index: int, count: int, below: int) -> Tensor:
    """int64 [count] in [0, below): one word each, on the CPU."""
    return philox.words(seed, stream + index, count) % below
