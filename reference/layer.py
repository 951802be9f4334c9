"""The whole layer, one line an equation, for R ranks in one process. Read it beside `reference/equations.md`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megaproof.quant.recipe import Recipe
from megaproof.quant.twin import arith as compiled_arith
from megaproof.reference import dispatch, gemm, scatter, swiglu
from megaproof.reference.arguments import Weights, check, check_same_width, check_source, check_weights
from megaproof.reference.combine import combine
from megaproof.reference.stats import accumulate

STAGES = ("l1_acts", "l1_acts_sf", "l2_acts", "l2_acts_sf", "slots", "y", "stats")
"""Stages of the trace, in the order in which they are computed and compared."""


@dataclass(frozen=True)
class LayerResult:
    """What the layer returns."""

    y: list[Tensor]
    """bfloat16 [T_r, H] by rank."""
    stats: list[Tensor]
    """int32 [E_loc] by rank."""
    trace: dict[str, Tensor] | None = None
    """One tensor a stage; rows of the first five are the active slots in (rank, token, slot) order, which 'rows'
    (int64 [n, 3]) lists. y is [sum of T_r, H] and stats [E], rank after rank."""


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
    topk_weights float32 [T_r, K], stats int32 [E_loc] (counts so far). weights(e) gives expert e's tensors, see
    `arguments.Weights`; expert e lives on rank e // E_loc. experts: E, where stats do not say it.
    arith: the atoms to compute with (default: the compiled twin of x's device); it changes the speed and no bit.
    progress(done, total) is called after each expert that received a row.

    Inputs are not written. Raises `ArgumentError` naming argument, value and rule.
    """
    problem = check(recipe, x, x_sf, topk_idx, topk_weights, experts, stats)
    arith = arith or compiled_arith(problem.device)

    where = dispatch.routes(topk_idx)
    weight = torch.cat(list(topk_weights))[where.row, where.slot]  # [n]
    l1_acts, l1_acts_sf = dispatch.pull(x, x_sf, where)  # Eq. (1)  [n, H]

    l2_acts, l2_acts_sf, slots = through_experts(  # Eq. (2) to (7)  [n, I], [n, I/group], [n, H]
        recipe, where, l1_acts, l1_acts_sf, weight, weights, arith, trace, progress
    )

    y = combine(recipe, slots, where, weight, problem.tokens, problem.topk, arith)  # Eq. (8)  [T_r, H]
    counts = accumulate(stats, where, problem.ranks, problem.experts_per_rank)  # Eq. (9)  [E_loc]
    if not trace:
        return LayerResult(y, counts)
    stages = (l1_acts, l1_acts_sf, l2_acts, l2_acts_sf, slots, torch.cat(y), torch.cat(counts))
    return LayerResult(y, counts, dict(zip(STAGES, stages, strict=True)) | {"rows": where.triples()})


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (2) to (7): n routed rows through the experts that they name.

    l1_acts uint8 [n, H], l1_acts_sf float32 [n, H/128], weight float32 [n]; row i belongs to where's place i.
    Returns (l2_acts uint8 [n, I], l2_acts_sf float32 [n, I/group], slots bfloat16 [n, H]) in the same order; with
    keep off, and without rows, whose weights would say I, the first two are [0, 0].
    Raises `ArgumentError` when weights(e) returned what does not fit.
    """
    check_source(weights)
    hidden, device = l1_acts.shape[1], l1_acts.device

    def expert(e: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = where.of_expert(e)  # m of the n rows
        w1, w1_sf, w2, w2_sf = _checked(weights, e, hidden)
        gate, up = gemm.l1(recipe, l1_acts[rows], l1_acts_sf[rows], w1, w1_sf, arith)  # Eq. (2), Eq. (3)  [m, I]
        v = swiglu.activate(recipe, gate, up, weight[rows], arith)  # Eq. (4)  [m, I]
        l2_acts, l2_acts_sf = swiglu.requantise(recipe, v)  # Eq. (5)  [m, I]
        out = gemm.l2(recipe, l2_acts, l2_acts_sf, w2, w2_sf, arith)  # Eq. (6)  [m, H]
        return rows, l2_acts, l2_acts_sf, scatter.to_slot(out, arith)  # Eq. (7)  [m, H]

    slots = torch.empty(len(where), hidden, dtype=torch.bfloat16, device=device)
    busy = where.expert.unique().tolist()
    parts, width = [], 0
    for done, part in enumerate(_side_by_side(expert, busy, device), start=1):
        width = width or part[1].shape[1]
        check_same_width(busy[done - 1], part[1].shape[1], width)
        slots[part[0]] = part[3]
        if keep:
            parts.append(part)
        if progress:
            progress(done, len(busy))
    return _in_row_order(parts, 1, torch.uint8), _in_row_order(parts, 2, torch.float32), slots


def _checked(weights: Weights, e: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = weights(e)
    check_weights(e, tensors, hidden)
    return tensors


def _side_by_side(expert: Callable[[int], Any], busy: list[int], device: torch.device) -> Iterator[Any]:
    """expert(e) for each e, in order; on a CPU torch.get_num_threads() at a time. They share no sum: no bit moves."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        yield from map(expert, busy)
        return
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="expert") as pool:
        yield from pool.map(expert, busy)


def _in_row_order(parts: list[tuple[Tensor, ...]], column: int, dtype: torch.dtype) -> Tensor:
    """One column of the experts' results, put back into (rank, token, slot) order."""
    if not parts:
        return torch.empty(0, 0, dtype=dtype)
    rows, stacked = torch.cat([part[0] for part in parts]), torch.cat([part[column] for part in parts])
    return torch.empty_like(stacked).index_copy_(0, rows, stacked)
