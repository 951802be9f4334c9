"""The whole layer, one line an equation, for R ranks in one process. Read it beside `reference/equations.md`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megaproof.quant.host_state import guarded, plain
from megaproof.quant.recipe import Recipe
from megaproof.quant.twin import arith as compiled_arith
from megaproof.reference import dispatch, gemm, scatter, swiglu
from megaproof.reference.arguments import check, check_same_width, check_source, check_weights
from megaproof.reference.combine import combine
from megaproof.reference.operands import ExpertWeights, Weights
from megaproof.reference.remembering import Remembering
from megaproof.reference.stages import POOL_STAGES, STAGES
from megaproof.reference.stats import accumulate


@dataclass(frozen=True)
class LayerResult:
    """What the layer returns."""

    y: list[Tensor]
    """bfloat16 [T_r, H] by rank."""
    stats: list[Tensor]
    """int32 [E_loc] by rank."""
    trace: dict[str, Tensor] | None = None
    """One tensor for each stage of `reference.stages.STAGES`, and 'rows', int64 [n, 3]: the active slots in (rank,
    token, slot) order, to which the rows of the stages before y belong. y is [sum of T_r, H] and stats [E], rank after
    rank."""


@guarded
def moe_layer(
    recipe: Recipe,
    x: Sequence[Tensor],
    x_sf: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    topk_weights: Sequence[Tensor],
    weights: Weights,
    stats: Sequence[Tensor] | None = None,
    trace: bool = False,
    *,
    experts: int | None = None,
    arith: ModuleType | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LayerResult:
    """One MoE layer, bit for bit.

    Lists by rank: x uint8 [T_r, H], x_sf float32 [T_r, H/128], topk_idx int64 [T_r, K] (-1 = masked),
    topk_weights float32 [T_r, K], stats int32 [E_loc] (counts so far). weights(e) gives expert e's two matrices, see
    `operands.ExpertWeights`; expert e lives on rank `layout.owner(e, E_loc)`. experts: E, where stats do not say it.
    arith: the atoms to compute with (default: the compiled twin of x's device); it changes the speed and no bit.
    progress(done, total) is called after each expert that received a row.

    Inputs are not written. Raises `ArgumentError` naming argument, value and rule.
    """
    dimensions = check(recipe, x, x_sf, topk_idx, topk_weights, experts, stats)
    arith = arith or compiled_arith(dimensions.device)

    where = dispatch.routes(topk_idx)
    weight = torch.cat(list(topk_weights))[where.row, where.slot]  # [n]
    l1_acts, l1_acts_sf = dispatch.pull(x, x_sf, where)  # Eq. (1)  [n, H]

    inner, slots = through_experts(  # Eq. (2) to (7)  l2_acts [n, I], l2_acts_sf [n, I/group]; slots [n, H]
        recipe, where, l1_acts, l1_acts_sf, weight, weights, arith, trace, progress
    )

    y = combine(recipe, slots, where, weight, dimensions.tokens, dimensions.topk, arith)  # Eq. (8)  [T_r, H]
    counts = accumulate(stats, where, dimensions.ranks, dimensions.experts_per_rank)  # Eq. (9)  [E_loc]
    if not trace:
        return LayerResult(y, counts)
    stages = {**inner, "l1_acts": l1_acts, "l1_acts_sf": l1_acts_sf, "slots": slots}
    stages |= {"y": torch.cat(y), "stats": torch.cat(counts)}
    return LayerResult(y, counts, {name: stages[name] for name in STAGES} | {"rows": where.triples()})


@guarded
def through_experts(
    recipe: Recipe,
    where: dispatch.Routes,
    l1_acts: Tensor,
    l1_acts_sf: Tensor,
    weight: Tensor,
    weights: Weights,
    arith: ModuleType,
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Eq. (2) to (7): n routed rows through the experts that they name.

    l1_acts uint8 [n, H], l1_acts_sf float32 [n, H/128], weight float32 [n]; row i belongs to where's place i.
    Returns (the stages of the pool that the experts make, by name; slots bfloat16 [n, H]) in the same order: l2_acts
    uint8 [n, I], l2_acts_sf float32 [n, I/group]. Stages of the pool are [0, 0] with keep off, and without rows, whose
    weights would say I.
    Raises `ArgumentError` when weights(e) returned what does not fit.
    """
    check_source(weights)
    hidden, device = l1_acts.shape[1], l1_acts.device

    def expert(e: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        rows = where.of_expert(e)  # m of the n rows

        def compute(acts: Tensor, acts_sf: Tensor, weight: Tensor) -> dict[str, Tensor]:
            return _through_one(recipe, _checked(recipe, weights, e, hidden), acts, acts_sf, weight, arith)

        own = l1_acts[rows], l1_acts_sf[rows], weight[rows]
        remembers = isinstance(weights, Remembering)
        made = weights.once((e, recipe, arith), compute, *own) if remembers else compute(*own)  # type: ignore[attr-defined]
        out = made.pop("slots")
        return rows, made, out

    slots = torch.empty(len(where), hidden, dtype=torch.bfloat16, device=device)
    busy = where.expert.unique().tolist()
    parts: list[tuple[Tensor, dict[str, Tensor]]] = []
    width = 0
    for done, (rows, made, out) in enumerate(_side_by_side(guarded(expert), busy, device), start=1):
        width = width or made["l2_acts"].shape[1]
        check_same_width(busy[done - 1], made["l2_acts"].shape[1], width)
        slots[rows] = out
        if keep:
            parts.append((rows, made))
        if progress:
            progress(done, len(busy))
    return _in_row_order(parts, recipe), slots


def _through_one(
    recipe: Recipe, w: ExpertWeights, l1_acts: Tensor, l1_acts_sf: Tensor, weight: Tensor, arith: ModuleType
) -> dict[str, Tensor]:
    """Eq. (2) to (7): m rows through one expert. Returns the stages that it makes, m rows each, by name."""
    gate, up = gemm.gemm1(recipe, l1_acts, l1_acts_sf, w.l1, arith)  # Eq. (2), Eq. (3)  [m, I]
    v = swiglu.activate(recipe, gate, up, weight, arith)  # Eq. (4)  [m, I]
    l2_acts, l2_acts_sf = swiglu.requantise(recipe, v)  # Eq. (5)  [m, I]
    made = {"l2_acts": l2_acts, "l2_acts_sf": l2_acts_sf}
    out = gemm.gemm2(recipe, l2_acts, l2_acts_sf, w.l2, arith)  # Eq. (6)  [m, H]
    return {**made, "slots": scatter.to_slot(out, arith)}  # Eq. (7)  [m, H]


def _checked(recipe: Recipe, weights: Weights, e: int, hidden: int) -> ExpertWeights:
    found = weights(e)
    check_weights(recipe, e, found, hidden)
    return ExpertWeights(*(w._replace(codes=plain(w.codes), scales=plain(w.scales)) for w in found))


def _side_by_side(expert: Callable[[int], Any], busy: list[int], device: torch.device) -> Iterator[Any]:
    """expert(e) for each e, in order; on a CPU torch.get_num_threads() at a time. They share no sum: no bit moves."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        yield from map(expert, busy)
        return
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="expert") as pool:
        yield from pool.map(expert, busy)


def _in_row_order(parts: list[tuple[Tensor, dict[str, Tensor]]], recipe: Recipe) -> dict[str, Tensor]:
    """The experts' stages, each put back into (rank, token, slot) order; [0, 0] where no expert had a row."""
    if not parts:
        return {name: torch.empty(0, 0, dtype=STAGES[name].format(recipe).dtype) for name in POOL_STAGES}
    rows, found = torch.cat([rows for rows, _ in parts]), {}
    for name in parts[0][1]:
        stacked = torch.cat([made[name] for _, made in parts])
        found[name] = torch.empty_like(stacked).index_copy_(0, rows, stacked)
    return found
