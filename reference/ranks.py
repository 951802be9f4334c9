"""The layer as one rank sees it: its own tokens, its own experts, and the bytes that others send it.

`moe_layer` has all ranks' tensors at hand; here a rank knows its own and talks through an `Exchange`, as the kernel
does. The rooms are the same, only the travel is new: two exchanges, there and back.

There:  a routed row goes to the rank of its expert: H codes, H/128 scale factors, token, slot, expert, routing weight.
Back:   its BF16 output row goes to slot (token, k) of the rank that it came from: token, slot, H values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megaproof.quant.host_state import guarded
from megaproof.quant.recipe import Recipe
from megaproof.quant.twin import arith as compiled_arith
from megaproof.reference import dispatch, layout
from megaproof.reference.arguments import BLOCK, Dimensions, check, check_source
from megaproof.reference.combine import combine
from megaproof.reference.dispatch import Routes
from megaproof.reference.exchange import Exchange, ExchangeError, lockstep, pack, unpack
from megaproof.reference.layer import LayerResult, through_experts
from megaproof.reference.operands import Weights
from megaproof.reference.stages import POOL_STAGES, STAGES
from megaproof.reference.stats import accumulate
from megaproof.toolchain.errors import ArgumentError


@dataclass(frozen=True)
class RankResult:
    """What one rank has at the end."""

    y: Tensor
    """bfloat16 [T_r, H]."""
    stats: Tensor
    """int32 [E_loc]."""
    sent: Tensor
    """int64 [2, R]: bytes that this rank sent to each rank, there and back; its messages to itself count."""
    trace: dict[str, Tensor] | None = None
    """Where the rows lie. On the rank of their expert, in the order of 'received' (int64 [m, 3]: source rank, token,
    slot; ascending): the stages of the pool. On their source rank, in the order of 'rows' (the same for the rank's own
    active slots): slots."""


@guarded
def rank_layer(
    exchange: Exchange,
    rank: int,
    dimensions: Dimensions,
    recipe: Recipe,
    x: Tensor,
    x_sf: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    weights: Weights,
    stats: Tensor | None = None,
    trace: bool = False,
    *,
    arith: ModuleType | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RankResult:
    """The layer of one rank, bit for bit that of `moe_layer`.

    This rank's tensors: x uint8 [T_r, H], x_sf float32 [T_r, H/128], topk_idx int64 [T_r, K], topk_weights float32
    [T_r, K], stats int32 [E_loc] or None; weights(e) is asked for its own experts. Of dimensions it uses what all ranks
    agree on, not the other ranks' tokens. trace, arith and progress as in `moe_layer`.

    Raises `ArgumentError` when the rank's tensors break a rule, `ExchangeError` when what it received does.
    """
    mine = check(recipe, [x], [x_sf], [topk_idx], [topk_weights], dimensions.experts, None)
    if (mine.hidden, mine.topk) != (dimensions.hidden, dimensions.topk):
        raise ArgumentError(f"rank {rank} has hidden = {mine.hidden}, topk = {mine.topk}; the others: {dimensions}")
    check_source(weights)
    arith = arith or compiled_arith(dimensions.device)

    own = dispatch.routes([topk_idx])  # n of them
    own = dataclasses.replace(own, rank=torch.full_like(own.rank, rank))
    weight = topk_weights[own.token, own.slot]  # [n]
    acts, acts_sf = dispatch.pull([x], [x_sf], own)  # Eq. (1)  [n, H]
    place = torch.stack([own.token, own.slot, own.expert], dim=1).to(torch.int32)
    target = layout.owner(own.expert, dimensions.experts_per_rank)
    there = [
        pack(acts[to], acts_sf[to], place[to], weight[to, None])
        for to in (_where(target, other) for other in range(dimensions.ranks))
    ]
    where, came_weight, l1_acts, l1_acts_sf = _received(rank, dimensions, exchange.all_to_all(there))  # m of them

    inner, out = through_experts(  # Eq. (2) to (7)  l2_acts [m, I], l2_acts_sf [m, I/group]; [m, H]
        recipe, where, l1_acts, l1_acts_sf, came_weight, weights, arith, trace, progress
    )

    address = torch.stack([where.token, where.slot], dim=1).to(torch.int32)
    back = [pack(out[to], address[to]) for to in (_where(where.rank, other) for other in range(dimensions.ranks))]
    slots = _slots(own, dimensions, exchange.all_to_all(back))  # [n, H]
    (y,) = combine(recipe, slots, own, weight, (x.shape[0],), dimensions.topk, arith)  # Eq. (8)  [T_r, H]
    here = dataclasses.replace(where, expert=layout.local(where.expert, dimensions.experts_per_rank))
    before = None if stats is None else [stats]
    (counts,) = accumulate(before, here, 1, dimensions.experts_per_rank)  # Eq. (9)  [E_loc]

    sent = torch.tensor([[len(message) for message in messages] for messages in (there, back)])
    if not trace:
        return RankResult(y, counts, sent)
    stages = {**inner, "l1_acts": l1_acts, "l1_acts_sf": l1_acts_sf, "slots": slots}
    return RankResult(y, counts, sent, stages | {"received": where.triples(), "rows": own.triples()})


def _where(values: Tensor, value: int) -> Tensor:
    """Indices at which it stands, ascending."""
    return (values == value).nonzero().squeeze(1)


def _received(rank: int, dimensions: Dimensions, messages: Sequence[Tensor]) -> tuple[Routes, Tensor, Tensor, Tensor]:
    """(routes, routing weight [m], l1_acts [m, H], l1_acts_sf [m, H/128]) of the rows that came; ascending (rank,
    token, slot), since each source sent its own in that order."""
    hidden = dimensions.hidden
    columns = ((torch.uint8, hidden), (torch.float32, hidden // BLOCK), (torch.int32, 3), (torch.float32, 1))
    parts = [unpack(message, *columns) for message in messages]
    acts, acts_sf, place, weight = (torch.cat(column) for column in zip(*parts, strict=True))
    token, slot, expert = place.long().unbind(1)
    stray = layout.owner(expert, dimensions.experts_per_rank) != rank
    if bool(stray.any()):
        raise ExchangeError(f"rank {rank} received a row for expert {int(expert[stray][0])}, which lives elsewhere")
    counts = torch.tensor([len(part[0]) for part in parts], device=token.device)
    source = torch.arange(dimensions.ranks, device=token.device).repeat_interleave(counts)
    row = torch.arange(len(token), device=token.device)  # the rows' own order: here no tokens stand behind them
    return Routes(source, token, slot, expert, row), weight.squeeze(1), acts, acts_sf


def _slots(own: Routes, dimensions: Dimensions, messages: Sequence[Tensor]) -> Tensor:
    """bfloat16 [n, H]: each row that came back, in its slot. Raises `ExchangeError` for a slot not filled once."""
    parts = [unpack(message, (torch.bfloat16, dimensions.hidden), (torch.int32, 2)) for message in messages]
    rows, address = (torch.cat(column) for column in zip(*parts, strict=True))
    order = _order(address.long(), dimensions.topk)
    if not torch.equal(address.long()[order], torch.stack([own.token, own.slot], dim=1)):
        raise ExchangeError(f"{len(rows)} rows came back for {len(own)} slots, or not one for each")
    return rows[order]


def _order(places: Tensor, topk: int) -> Tensor:
    """The permutation that sorts places [n, ..., token, slot] into canonical order."""
    key = places[:, -2] * topk + places[:, -1]
    if places.shape[1] == 3:
        key = key + places[:, 0] * (int(key.max()) + 1 if len(key) else 1)
    return torch.argsort(key, stable=True)


@guarded
def gather(dimensions: Dimensions, results: Sequence[RankResult]) -> LayerResult:
    """The ranks' results as `moe_layer` returns them, trace included where the ranks kept theirs.

    Raises `ExchangeError` when the rows that experts received are not the rows that were routed.
    """
    y, stats = [result.y for result in results], [result.stats for result in results]
    traces = [result.trace for result in results if result.trace is not None]
    if not traces:
        return LayerResult(y, stats)
    rows, received = (torch.cat([trace[name] for trace in traces]) for name in ("rows", "received"))
    order = _order(received, dimensions.topk)
    if not torch.equal(received[order], rows):
        raise ExchangeError(f"{len(rows)} rows were routed and {len(received)} received, or not the same ones")

    def by_expert(stage: str) -> Tensor:
        filled = [trace[stage] for trace in traces if len(trace["received"])]  # others can't know the width I
        return torch.cat(filled)[order] if filled else traces[0][stage]

    stages = {name: by_expert(name) for name in POOL_STAGES}
    stages |= {"slots": torch.cat([trace["slots"] for trace in traces]), "y": torch.cat(y), "stats": torch.cat(stats)}
    return LayerResult(y, stats, {name: stages[name] for name in STAGES} | {"rows": rows})


@guarded
def run_ranks(
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
    """`moe_layer`, computed by R ranks that see only their own tensors and each other's bytes; in one process.

    Arguments, result and errors are those of `moe_layer`, but that no rank sees the width I of another's experts;
    progress counts the experts of one rank at a time. An exception in a rank ends the others and is raised with a note
    that names the rank.
    """
    dimensions = check(recipe, x, x_sf, topk_idx, topk_weights, experts, stats)

    def work(exchange: Exchange, rank: int) -> RankResult:
        own = (x[rank], x_sf[rank], topk_idx[rank], topk_weights[rank], weights)
        own_stats = None if stats is None else stats[rank]
        return rank_layer(exchange, rank, dimensions, recipe, *own, own_stats, trace, arith=arith, progress=progress)

    return gather(dimensions, lockstep(dimensions.ranks, work))
