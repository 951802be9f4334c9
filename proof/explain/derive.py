"""Derives one element of y by hand, in words: every number with its bits and the equation that made it.

Displayed values come from the readable atoms, term by term (`proof/explain/anatomy.py`); whole rows come from the rooms
of the layer with the compiled twin. Wherever the two meet they must agree, and the last line is checked against the
layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaproof.proof.explain.anatomy import Line, Section, agree, hexadecimal, number, promoted, silu
from megaproof.quant import atoms, scale, twin
from megaproof.quant.cast import BLOCK, group_amax
from megaproof.quant.formats import f32_bits, f32_from_bits, pow2
from megaproof.quant.recipe import Recipe
from megaproof.reference import gemm, layout, swiglu
from megaproof.reference.arguments import check
from megaproof.reference.layer import moe_layer
from megaproof.reference.operands import ExpertWeights, Weights


class ExplainError(ValueError):
    """A question about an element that does not exist; names it and its range."""


@dataclass(frozen=True)
class Question:
    """Which element to derive, and what to show of the way there."""

    rank: int
    token: int
    column: int
    slot: int | None = None
    """Show this slot in full and the others in one line; None: all in full."""
    k_block: int | None = None
    """Block of 128 columns of H shown in GEMM 1; None: the one that moves the gate most."""
    activation: int | None = None
    """Column of I shown; its group is the block shown in GEMM 2. None: the one that moves the output most."""
    full: bool = False
    """Every block of GEMM 1 gets a line, as those of GEMM 2 always do."""


@dataclass(frozen=True)
class Explanation:
    """The derivation of y[rank][token, column]."""

    question: Question
    sections: list[Section]
    y: Tensor
    """bfloat16 scalar, as derived."""
    layer: Tensor
    """bfloat16 scalar, as `moe_layer` computes it."""

    @property
    def holds(self) -> bool:
        return hexadecimal(self.y) == hexadecimal(self.layer)

    @property
    def verdict(self) -> str:
        """The last line."""
        q = self.question
        place = f"y[{q.rank}][{q.token}, {q.column}] of the layer"
        if self.holds:
            return f"equals {place}: {hexadecimal(self.layer)}"
        return f"derived {hexadecimal(self.y)}, but {place} is {hexadecimal(self.layer)}"

    def value(self, key: str) -> Line:
        """The line that was put under a key, such as 'slot0.q'. Raises KeyError."""
        for section in self.sections:
            for line in section.lines:
                if line.key == key:
                    return line
        raise KeyError(key)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "element": {name: getattr(self.question, name) for name in ("rank", "token", "column")},
            "sections": [section.as_dict() for section in self.sections],
            "y": hexadecimal(self.y),
            "layer": hexadecimal(self.layer),
            "holds": self.holds,
        }


@dataclass(frozen=True)
class _Slot:
    """One active slot of the token. What is worked by hand is on the CPU, an expert's tensors are where they came."""

    k: int
    expert: int
    weight: Tensor
    acts: Tensor
    acts_sf: Tensor
    weights: ExpertWeights


def explain(
    recipe: Recipe,
    x: Sequence[Tensor],
    x_sf: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    topk_weights: Sequence[Tensor],
    weights: Weights,
    question: Question,
    *,
    experts: int,
    whole: bool = False,
) -> Explanation:
    """The derivation of one element of y; tensors as `moe_layer` takes them.

    The verdict recomputes the layer for the token alone (y does not depend on the batch), with `whole` for the batch.
    Raises `ExplainError` for a question out of range, `ArgumentError` as the layer does, and `Disagreement` where two
    ways to one value differ.
    """
    problem = check(recipe, x, x_sf, topk_idx, topk_weights, experts, None)
    r, t = question.rank, question.token
    _in_range("rank", r, problem.ranks, f"of {problem.ranks} ranks")
    _in_range("token", t, problem.tokens[r], f"of rank {r}, which has {problem.tokens[r]} tokens")
    _in_range("column", question.column, problem.hidden, f"of hidden size {problem.hidden}")
    if question.k_block is not None:
        _in_range("k-block", question.k_block, problem.hidden // BLOCK, f"of {problem.hidden // BLOCK} blocks of H")
    chosen, factors = topk_idx[r][t].tolist(), topk_weights[r][t].cpu()
    if question.slot is not None:
        _in_range("slot", question.slot, problem.topk, f"of {problem.topk} slots")
        if chosen[question.slot] < 0:
            raise ExplainError(f"slot {question.slot} of token {t} of rank {r} is masked: it has no row in any stage")

    once = functools.cache(weights)

    sections, total = [_routes(chosen, factors, r, t, problem.experts_per_rank)], torch.zeros(())
    sums = Section(f"Combine token {t} of rank {r}, column {question.column}", "Eq. (8)")
    for k, e in enumerate(chosen):
        if e < 0:
            continue
        slot = _Slot(k, e, factors[k], x[r][t].cpu(), x_sf[r][t].cpu(), once(e))
        parts, value = _through_expert(recipe, slot, question)
        if question.slot in (None, k):
            sections += parts
        wide = atoms.decode_bf16(value)
        folded = recipe.weight_fold == "in_combine"
        total = atoms.fma(slot.weight, wide, total) if folded else total + wide
        sums.put(f"slot {k}, expert {e}", value, "its BF16 row", f"combine{k}.slot")
        sums.put("  sum", total, "fma(weight, slot, sum)" if folded else "fl(sum + slot)", f"combine{k}.sum")
    y = atoms.encode_bf16(total)
    if all(e < 0 for e in chosen):
        sums.say("no active slot", "the sum stays +0")
    sums.put("y", y, "BF16, nearest even", "y")
    sections.append(sums)

    arguments = [list(tensors) for tensors in (x, x_sf, topk_idx, topk_weights)]
    if not whole:
        arguments = [[part[[t]] if rank == r else part[:0] for rank, part in enumerate(parts)] for parts in arguments]
    again = moe_layer(recipe, *arguments, weights if whole else once, experts=experts)
    return Explanation(question, sections, y, again.y[r][t if whole else 0, question.column].cpu())


def _in_range(name: str, value: int, size: int, of: str) -> None:
    if not 0 <= value < size:
        legal = f"must be in [0, {size})" if size else "can't be chosen: there is none"
        raise ExplainError(f"{name} = {value} {legal} ({of})")


def _routes(chosen: list[int], factors: Tensor, rank: int, token: int, local: int) -> Section:
    section = Section(f"Dispatch token {token} of rank {rank}", "Eq. (1)")
    for k, e in enumerate(chosen):
        if e < 0:
            section.say(f"slot {k}: masked", "no row, and its routing weight is never read")
        else:
            section.put(
                f"slot {k}: expert {e}, rank {layout.owner(e, local)}", factors[k], "routing weight", f"slot{k}.weight"
            )
    return section


def _through_expert(recipe: Recipe, slot: _Slot, question: Question) -> tuple[list[Section], Tensor]:
    """Eq. (2) to (7) of one slot: (sections, the BF16 element of its row)."""
    c, size = question.column, recipe.activation_granularity
    w1, w2 = slot.weights
    device, fast = w1.codes.device, twin.arith(w1.codes.device)
    gate, up = gemm.gemm1(recipe, slot.acts[None].to(device), slot.acts_sf[None].to(device), w1, fast)
    v = swiglu.activate(recipe, gate, up, slot.weight[None].to(device), fast)
    q, q_sf = swiglu.requantise(recipe, v)
    out = gemm.gemm2(recipe, q, q_sf, w2.of_blocks([c // BLOCK]), fast)[0, c % BLOCK].cpu()
    row, row_sf = w2.codes[c].cpu(), w2.scales[c // BLOCK].cpu()
    gate, up, v, q, q_sf = (t.cpu() for t in (gate, up, v, q, q_sf))

    j = question.activation
    if j is None:
        moved = atoms.decode_e4m3(q[0]) * atoms.decode_e4m3(row) * q_sf[0].repeat_interleave(size)
        j = int((moved * row_sf.repeat_interleave(BLOCK)).nan_to_num().abs().argmax())
    _in_range("activation", j, len(row), f"of intermediate size {len(row)}")

    first = _gemm1(recipe, slot, question, j, gate[0, j], up[0, j])
    second = _activation(recipe, slot, j, gate[0, j], up[0, j], v[0])
    third = _requantisation(recipe, slot, j, v[0], q[0, j], q_sf[0, j // size])
    fourth = Section(f"Slot {slot.k}, GEMM 2: column {c}, block {j // size} of {size}", "Eq. (6), Eq. (7)")
    by_hand = promoted(fourth, q[0], q_sf[0], row, row_sf, size, j // size, "out", every=True)
    agree(f"slot {slot.k}: GEMM 2 by hand and by the twin", by_hand, out)
    fourth.put("out", out, f"after all {len(row) // size} blocks", f"slot{slot.k}.out")
    value = atoms.encode_bf16(out)
    fourth.put("slot row", value, "BF16, nearest even", f"slot{slot.k}.slots")
    return [first, second, third, fourth], value


def _gemm1(recipe: Recipe, slot: _Slot, question: Question, j: int, gate: Tensor, up: Tensor) -> Section:
    (w1, w1_sf, _), block = slot.weights.l1, question.k_block
    inter, blocks = len(w1) // 2, len(slot.acts) // BLOCK
    if block is None:
        product = atoms.decode_e4m3(slot.acts) * atoms.decode_e4m3(w1[j].cpu())
        part = product.reshape(blocks, BLOCK).sum(1) * slot.acts_sf * w1_sf[j // BLOCK].cpu()
        block = int(part.nan_to_num().abs().argmax())
    section = Section(f"Slot {slot.k}, GEMM 1: activation column {j}, K block {block}", "Eq. (2), Eq. (3)")
    for name, row, twin_value in (("gate", j, gate), ("up", inter + j, up)):
        section.say(f"{name}: row {row} of w1 of expert {slot.expert}")
        h = promoted(
            section,
            slot.acts,
            slot.acts_sf,
            w1[row].cpu(),
            w1_sf[row // BLOCK].cpu(),
            BLOCK,
            block,
            name,
            question.full,
        )
        if recipe.l1_rounding == "bf16":
            section.put(f"{name} before rounding", h, f"after all {blocks} blocks")
            h = atoms.decode_bf16(atoms.encode_bf16(h))
        agree(f"slot {slot.k}: {name} by hand and by the twin", h, twin_value)
        note = "float(bf16(.)), l1_rounding bf16" if recipe.l1_rounding == "bf16" else f"after all {blocks} blocks"
        section.put(name, h, note, f"slot{slot.k}.{name}")
    return section


def _activation(recipe: Recipe, slot: _Slot, j: int, gate: Tensor, up: Tensor, row: Tensor) -> Section:
    section = Section(f"Slot {slot.k}, activation: column {j}", "Eq. (4)")
    gate, up = swiglu.clamp(recipe, gate, up)
    rule = "no clamp" if recipe.clamp is None else f"clamp {recipe.clamp:g}"
    section.put("gate", gate, f"{rule}, above only", f"slot{slot.k}.gate_clamped")
    section.put("up", up, f"{rule}, both sides", f"slot{slot.k}.up_clamped")
    activated = silu(section, gate, recipe.silu == "fast")
    section.put("silu(gate)", activated, "fl(gate * sigmoid)", f"slot{slot.k}.silu")
    v = activated * up
    section.put("silu * up", v)
    if recipe.weight_fold == "before_quantisation":
        v = v * slot.weight
        section.put("v", v, f"fl(. * {float(slot.weight):.9g}), the routing weight", f"slot{slot.k}.v")
    else:
        section.put("v", v, "the routing weight waits for Eq. (8)", f"slot{slot.k}.v")
    if not bool(torch.isnan(v)):
        agree(f"slot {slot.k}: v by hand and by the twin", v, row[j])
    return section


def _requantisation(recipe: Recipe, slot: _Slot, j: int, v: Tensor, code: Tensor, sf: Tensor) -> Section:
    size = recipe.activation_granularity
    group = slice(j // size * size, (j // size + 1) * size)
    title = f"Slot {slot.k}, re-quantisation: columns {group.start}..{group.stop - 1}"
    section, key = Section(title, "Eq. (5)"), f"slot{slot.k}"
    amax = group_amax(v[None, group], size)[0, 0]
    section.put("amax", amax, f"of |v| over {size} columns", f"{key}.amax")
    if recipe.activation_scale == "ue8m0":
        scaled = scale.amax_over_448(amax)
        bits = int(f32_bits(scaled.reshape(1)))
        e = min(126, max(-126, (bits >> 23 & 0xFF) - 127 + (1 if bits & 0x7FFFFF else 0)))
        factor = pow2(torch.tensor(-e))
        section.put("scaled", scaled, "fl(amax * fl(1/448))", f"{key}.scaled")
        section.say(f"e = {e}", "the least e with 2^e >= scaled, in [-126, 126]", e, f"{key}.e")
        public = recipe.zero_group == "public" and number(scaled) == 0
        stored = torch.zeros(()) if public else pow2(torch.tensor(e))
        note = "0 of a zero group, as the public kernel" if public else "2^e"
    else:
        floor = torch.maximum(amax, torch.tensor(scale.FP32_FLOOR, dtype=torch.float32))
        stored = floor * f32_from_bits(torch.tensor(scale.RECIPROCAL_448_BITS))
        factor, note = torch.div(torch.ones(()), stored), "fl(max(amax, 1e-10) * fl(1/448))"
    agree(f"slot {slot.k}: scale factor by hand and by the room", stored, sf)
    section.put("l2_acts_sf", stored, note, f"{key}.l2_acts_sf")
    section.put("factor", factor, "2^-e" if recipe.activation_scale == "ue8m0" else "fl(1 / l2_acts_sf)")
    scaled_v = v[j] * factor
    section.put("v * factor", scaled_v)
    q = atoms.encode_e4m3(scaled_v)
    agree(f"slot {slot.k}: code by hand and by the room", q, code)
    section.put("l2_acts", q, "E4M3, nearest even, saturating at 448", f"{key}.l2_acts")
    return section
