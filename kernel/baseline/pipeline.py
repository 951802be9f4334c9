"""The baseline's five steps, each a launch of its own. Ranks are slices of one pool on one GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaproof.kernel.baseline import swiglu
from megaproof.kernel.baseline.backends import BACKENDS, GroupedGemm, Sizes
from megaproof.quant.recipe import Recipe, RecipeError
from megaproof.reference.arguments import check
from megaproof.reference.operands import Weights
from megaproof.reference.stages import POOL_STAGES

COLUMNS = 1024
"""Columns of one program of the combine."""


def claims(recipe: Recipe) -> str | None:
    """None if the baseline computes this recipe, else why not. It takes every recipe that is built but one."""
    if recipe.weight_fold != "before_quantisation":
        return f"recipe field weight_fold = {recipe.weight_fold!r}: the baseline has 'before_quantisation' only"
    return None


@dataclass(frozen=True)
class SortedRows:
    """Where every slot's row stands: sorted by expert, then by (rank, token, slot); masked slots last."""

    slot: Tensor
    """int64 [n]: (rank, token, slot) number of each pool row, counted over all tokens and slots."""
    offsets: Tensor
    """int64 [E+1]: first pool row of each expert. Expert e's rank owns the rows of its experts: a slice."""

    @classmethod
    def of(cls, topk_idx: Tensor, experts: int) -> SortedRows:
        """topk_idx int64 [T, K] of all ranks; nothing is read back from the device."""
        key = torch.where(topk_idx < 0, experts, topk_idx).flatten().to(torch.int32)
        expert, slot = torch.sort(key, stable=True)
        edges = torch.arange(experts + 1, dtype=torch.int32, device=key.device)
        return cls(slot, torch.searchsorted(expert, edges))


@triton.jit
def combine_kernel(
    slots: tl.tensor,  # bfloat16 [T, topk, hidden]
    topk_idx: tl.tensor,  # int64 [T, topk]
    y: tl.tensor,  # bfloat16 [T, hidden]
    topk: tl.tensor,
    hidden: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Eq. (8): active slots summed in fp32 in ascending k, one rounding."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for k in range(topk):
        slot = token * topk + k
        if tl.load(topk_idx + slot) >= 0:
            total += tl.load(slots + slot * hidden + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * hidden + column, total.to(tl.bfloat16), mask=inside)


def combine(slots: Tensor, topk_idx: Tensor) -> Tensor:
    """Eq. (8): slots bfloat16 [T, K, H], topk_idx int64 [T, K] -> y bfloat16 [T, H]; a masked token gives +0."""
    swiglu.require(slots)
    tokens, topk, hidden = slots.shape
    y = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=slots.device)
    if tokens:
        grid = (tokens, triton.cdiv(hidden, COLUMNS))
        combine_kernel[grid](slots, topk_idx, y, topk, hidden, COLUMNS=COLUMNS)
    return y


@dataclass(frozen=True)
class Result:
    """What a run leaves: y and statistics by rank, and its buffers."""

    y: list[Tensor]
    """bfloat16 [T_r, H] by rank."""
    stats: list[Tensor]
    """int32 [E_loc] by rank."""
    gemm: str
    """The back end of the GEMMs that ran."""
    buffers: StageBuffers
    active: Tensor
    """int64 [n]: numbers of the active slots, ascending."""

    def stages(self) -> dict[str, Tensor]:
        """The trace's stages, rows of the active slots in (rank, token, slot) order."""
        slot = self.buffers.pool.slot
        place = torch.empty_like(slot).index_copy_(0, slot, torch.arange(len(slot), device=slot.device))[self.active]
        stages = {name: getattr(self.buffers, name)[place] for name in POOL_STAGES if hasattr(self.buffers, name)}
        return stages | {"slots": self.buffers.slots.flatten(0, 1)[self.active]}


@dataclass(frozen=True)
class StageBuffers:
    """Everything one forward pass wrote. Rows of the first four stand in pool order."""

    pool: SortedRows
    l1_acts: Tensor
    l1_acts_sf: Tensor
    l2_acts: Tensor
    l2_acts_sf: Tensor
    slots: Tensor
    """bfloat16 [T, K, H]; masked slots hold nothing of meaning."""
    y: Tensor


class Baseline:
    """The unfused layer of R ranks on one GPU.

    recipe: see `claims`; weights and experts as in `reference.layer.moe_layer`; hidden H and intermediate I; gemm a
    name of `backends.BACKENDS`. Raises `RecipeError` naming the field that the baseline can't compute, and
    `EnvironmentMissing` where the back end's package is missing.
    """

    def __init__(
        self,
        recipe: Recipe,
        weights: Weights,
        experts: int,
        hidden: int,
        intermediate: int,
        device: torch.device | str,
        gemm: str,
    ) -> None:
        if reason := claims(recipe):
            raise RecipeError(reason)
        if gemm not in BACKENDS:
            raise ValueError(f"gemm = {gemm!r} must be one of: {', '.join(BACKENDS)}")
        self.recipe, self.experts = recipe, experts
        sizes = Sizes(experts, hidden, intermediate)
        self.gemm: GroupedGemm = BACKENDS[gemm](recipe, weights, sizes, torch.device(device))

    def __call__(
        self,
        x: Sequence[Tensor],
        x_sf: Sequence[Tensor],
        topk_idx: Sequence[Tensor],
        topk_weights: Sequence[Tensor],
        stats: Sequence[Tensor] | None = None,
    ) -> Result:
        """One layer; lists by rank as `megaproof.reference.layer.moe_layer` takes them. Raises `ArgumentError`."""
        problem = check(self.recipe, x, x_sf, topk_idx, topk_weights, self.experts, stats)
        idx = torch.cat(list(topk_idx))
        buffers = self.forward(torch.cat(list(x)), torch.cat(list(x_sf)), idx, torch.cat(list(topk_weights)))
        received = buffers.pool.offsets.diff().to(torch.int32).split(problem.experts_per_rank)
        counts = [count if stats is None else stats[rank] + count for rank, count in enumerate(received)]
        active = (idx.flatten() >= 0).nonzero().squeeze(1)
        return Result(list(buffers.y.split(list(problem.tokens))), counts, self.gemm.name, buffers, active)

    def forward(self, x: Tensor, x_sf: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> StageBuffers:
        """What is timed: the tokens of all ranks, one after the other, on the device. It checks nothing.

        With 'triton' and 'deep_gemm' nothing is read back from the device, so the whole pass can be queued at once.
        """
        tokens, topk = topk_idx.shape
        pool = SortedRows.of(topk_idx, self.experts)
        token = pool.slot // topk
        l1_acts, l1_acts_sf = x[token], x_sf[token]  # Eq. (1)
        gate_up = self.gemm.gemm1(l1_acts, l1_acts_sf, pool.offsets)  # Eq. (2), Eq. (3)
        weight = topk_weights.flatten()[pool.slot]
        l2_acts, l2_acts_sf = swiglu.swiglu_quantise(self.recipe, gate_up, weight)  # Eq. (4), Eq. (5)
        out = self.gemm.gemm2(l2_acts, l2_acts_sf, pool.offsets)  # Eq. (6), Eq. (7)
        slots = torch.empty_like(out).index_copy_(0, pool.slot, out).view(tokens, topk, out.shape[1])
        y = combine(slots, topk_idx)  # Eq. (8)
        return StageBuffers(pool, l1_acts, l1_acts_sf, l2_acts, l2_acts_sf, slots, y)
