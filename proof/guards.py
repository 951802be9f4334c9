"""Guards where no launch may write: between the fields of the symmetric buffer, and around y and statistics.

`GuardedAdapter` is our adapter with guards that every launch has to leave as they are. `assert_nothing_else_is_written`
looks inside the fields too, at what a batch leaves unused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.cases.compare import hold, same
from megaproof.cases.inputs import Inputs
from megaproof.kernel.host.buffer import BufferSize, RankViews, names_of
from megaproof.kernel.host.sizes import BLOCK_M, WORKSPACE_BYTES, aligned
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.emulated import EmulatedAdapter
from megaproof.proof.adapters.megaproof import MegaproofAdapter
from megaproof.reference import layout
from megaproof.reference.layer import LayerResult

GUARD = 0xA5
ROWS, COUNTS = 16, 64
"""Rows of y, and statistics, that are guards on either side."""


class Overwritten(AssertionError):
    """A launch wrote where nothing belongs to it; names where."""


def sizes(size: BufferSize) -> dict[str, int]:
    """Bytes of each field of a rank's symmetric buffer, as the reference lays them out, not as the host did."""
    numbers = {name: number for name, number in vars(size).items() if name != "ring"}
    fields = layout.fields(**numbers, pool_blocks=size.pool_blocks, ring_blocks=size.ring_blocks)
    found = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in fields.items()}
    return found | {"workspace": WORKSPACE_BYTES + found["workspace"]}


def gaps(size: BufferSize) -> dict[str, range]:
    """Bytes of a rank's symmetric buffer that belong to no field, by the field before them; some are empty."""
    offsets, total = size.offsets()
    ends = [*list(offsets.values())[1:], total]
    taken = sizes(size)
    return {name: range(offset + taken[name], end) for (name, offset), end in zip(offsets.items(), ends, strict=True)}


class GuardedAdapter(MegaproofAdapter):
    """Every `prepare` lays guards; every `launch` raises `Overwritten` unless all of them are as they were."""

    name = "megaproof, guarded"

    def prepare(self, prepared: Prepared) -> None:
        """As there; then outputs stand between guards, and the buffer's gaps are filled with them."""
        super().prepare(prepared)
        size, device = self._buffer.size, prepared.device
        self.between = torch.cat([torch.arange(gap.start, gap.stop) for gap in gaps(size).values()]).to(device)
        self.storages = [self._buffer.rank(rank).storage for rank in range(size.ranks)]
        for storage in self.storages:
            storage[self.between] = GUARD
        self.around = {"y": [_between(y, ROWS) for y in self.outputs]}
        self.around["stats"] = [_between(counts, COUNTS) for counts in self.counts]
        self.outputs = [around[ROWS : len(around) - ROWS] for around in self.around["y"]]
        self.counts = [around[COUNTS : len(around) - COUNTS].zero_() for around in self.around["stats"]]

    def launch(self) -> None:
        """One launch, and a look at the guards."""
        super().launch()
        self.assert_intact()

    def assert_intact(self) -> None:
        """Raises `Overwritten` naming the first guard that is not one any more."""
        looked = [(storage[self.between] != GUARD).any() for storage in self.storages]
        looked += [(part != GUARD).any() for _, part in self._outer()]
        if bool(torch.stack(looked).any()):
            raise Overwritten(next(self._overwritten()))

    def _outer(self) -> Iterator[tuple[str, Tensor]]:
        """(where it is, bytes) of each guard around an output."""
        for name, count in (("y", ROWS), ("stats", COUNTS)):
            for rank, around in enumerate(self.around[name]):
                yield f"before {name} of rank {rank}", around[:count].view(torch.uint8)
                yield f"behind {name} of rank {rank}", around[len(around) - count :].view(torch.uint8)

    def _overwritten(self) -> Iterator[str]:
        for rank, storage in enumerate(self.storages):
            for name, gap in gaps(self._buffer.size).items():
                wrong = (storage[gap.start : gap.stop] != GUARD).nonzero()
                if len(wrong):
                    yield f"behind {name} of rank {rank}: byte {int(wrong[0])} of {len(gap)} that belong to no field"
        for where, part in self._outer():
            wrong = (part.flatten() != GUARD).nonzero()
            if len(wrong):
                yield f"{where}: byte {int(wrong[0])} of {part.numel()}"


class GuardedEmulatedAdapter(GuardedAdapter, EmulatedAdapter):
    """The same under the emulator."""

    name = "megaproof, emulated, guarded"


def _between(output: Tensor, count: int) -> Tensor:
    """Guards alone, of an output's dtype and row, `count` rows more on either side."""
    rows = (len(output) + 2 * count, *output.shape[1:])
    around = torch.empty(rows, dtype=output.dtype, device=output.device)
    around.view(torch.uint8).fill_(GUARD)
    return around


def assert_nothing_else_is_written(adapter: GuardedAdapter, prepared: Prepared, wanted: LayerResult) -> int:
    """A launch in a buffer twice as large as it needs, all that it does not use a guard; bytes of guards inside fields.

    Inputs and weights stay. What lies behind T tokens would be seen if it were read: valid experts, NaN rows.
    """
    case, made = prepared.case, prepared.inputs
    larger = replace(case, tokens=(2 * max(case.tokens),) * case.ranks)
    zeros = [[part.new_zeros(larger.tokens[0], part.shape[1]) for part in parts] for parts in made.arguments()[:4]]
    adapter.prepare(replace(prepared, case=larger, inputs=Inputs(*zeros, made.weights), whole=False))
    ranks = [adapter.buffer.rank(r) for r in range(case.ranks)]
    for views in ranks:
        views.x.view(torch.uint8).fill_(0xFF)
        views.x_sf.fill_(float("nan"))
        views.topk_idx.zero_()
        views.topk_weights.fill_(float("nan"))
    adapter.prepare(prepared)
    adapter.fill(GUARD)
    for views in ranks:
        for name in ("recv_list", *names_of("pool")):
            getattr(views, name).view(torch.uint8).fill_(GUARD)

    read = [getattr(views, name) for views in ranks for name in names_of("inputs")]
    read += [tensor for layer in adapter.weights for pair in layer for tensor in pair]
    before = [_raw(tensor) for tensor in read]
    digest = made.sha256()
    adapter.launch()

    kept = all(torch.equal(_raw(tensor), old) for tensor, old in zip(read, before, strict=True))
    hold(kept, "the kernel's copy of an input has changed")
    hold(made.sha256() == digest, "an input that the kernel was given has changed")
    for rank in range(case.ranks):
        same(f"y of rank {rank}", wanted.y[rank], adapter.y()[rank])
        same(f"stats of rank {rank}", wanted.stats[rank], adapter.stats()[rank])
    guarded = 0
    for rank, views in enumerate(ranks):
        for name, tensor in _unused(case, made, wanted, rank, views).items():
            hold(tensor.numel() > 0, f"{name} has no unused part: the test checks nothing")
            untouched = bool((_raw(tensor) == GUARD).all())
            hold(untouched, f"{name} of rank {rank} was written where the batch has nothing")
            guarded += tensor.nbytes
    return guarded


def _unused(case: Case, made: Inputs, wanted: LayerResult, rank: int, views: RankViews) -> dict[str, Tensor]:
    """What a batch has no rows for, of the fields that a launch writes."""
    tokens, local = case.tokens[rank], case.shape.experts_per_rank(case.ranks)
    used = sum(aligned(rows, BLOCK_M) for rows in wanted.stats[rank].tolist())
    unused = {name: getattr(views, name)[used:] for name in names_of("ring")}
    groups = case.shape.intermediate // case.recipe.activation_granularity
    if groups < views.l2_acts_sf.shape[1]:  # of 128 columns a scale: half of the memory
        unused["the other half of l2_acts_sf"] = views.l2_acts_sf[:, groups:]
    unused["slots of no token"] = views.slots[:, tokens:]
    if bool((masked := made.topk_idx[rank].t() < 0).any()):
        unused["slots that are masked"] = views.slots[:, :tokens][masked]
    unused |= {name: getattr(views, name)[used:] for name in names_of("pool")}
    lists = views.recv_list
    mine = torch.arange(rank * local, (rank + 1) * local, device=lists.device)
    sent = torch.stack([(idx.flatten()[:, None] == mine).sum(0) for idx in made.topk_idx])
    behind = torch.arange(lists.shape[2], device=lists.device) >= sent[:, :, None]
    return unused | {"recv_list": lists[behind]}


def _raw(tensor: Tensor) -> Tensor:
    """A copy of a tensor's bytes."""
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)
