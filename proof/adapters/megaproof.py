"""This project's own kernel as an adapter: all ranks of a case in one launch on one GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaproof.kernel import api
from megaproof.kernel.host.buffer import FIELDS, BufferSize, names_of
from megaproof.kernel.host.sizes import BLOCK_M, check_recipe
from megaproof.proof.adapters import Prepared, canonical
from megaproof.quant.recipe import Recipe, RecipeError
from megaproof.reference import layout
from megaproof.reference.dispatch import routes
from megaproof.reference.stages import STAGES

FP8 = torch.float8_e4m3fn
IN_RING = tuple(name for name in STAGES if name in names_of("ring"))
"""Stages that the kernel leaves in the ring of activations, by expert; slots lie in the combine buffer."""


class MegaproofAdapter:
    """`fp8_mega_moe` in a virtual group. Weights and buffer are kept while shape, ranks and capacity stay."""

    name = "megaproof"
    worlds = ("virtual",)

    def __init__(self, ring_blocks: int | None = None) -> None:
        """ring_blocks: memory for activations; None: for all of them, so that they can be shown."""
        self.ring_blocks = ring_blocks
        self.prepared: Prepared | None = None
        self.buffer: Any = None
        self.weights: list[tuple[api.TransformedWeights, api.TransformedWeights]] = []
        self._sizes: tuple[Any, ...] | None = None
        self._weights_of: object = None

    def claims(self, recipe: Recipe) -> str | None:
        """The default recipe with any clamp, both forms of silu and both granularities."""
        try:
            check_recipe(recipe)
        except RecipeError as error:
            return str(error)
        return None

    def prepare(self, prepared: Prepared) -> None:
        """Raises EnvironmentMissing without an SM90 GPU."""
        self._require()
        case, made = prepared.case, prepared.inputs
        shape, capacity = case.shape, max(1, *case.tokens)
        local = shape.experts_per_rank(case.ranks)
        sizes = (case.ranks, shape.experts, shape.topk, shape.hidden, shape.intermediate)
        if self.buffer is None or self._sizes != sizes or self.buffer.size.capacity < capacity:
            layer = (case.ranks, shape.experts, shape.topk, shape.hidden, shape.intermediate, capacity)
            self.buffer = self._make_buffer(BufferSize(*layer, self.ring_blocks or BufferSize(*layer).pool_blocks))
            self._weights_of = self._weights_of if self._sizes == sizes else None
            self._sizes = sizes
        if self._weights_of is not made.weights:
            self.weights, self._weights_of = [], None  # the old ones go first: two layers may not fit
            self.weights = [self._rank_weights(prepared, rank, local) for rank in range(case.ranks)]
            self._weights_of = made.weights
        for rank, tokens in enumerate(case.tokens):
            views = self.buffer.rank(rank)
            views.x.view(torch.uint8)[:tokens] = made.x[rank]
            views.x_sf[:tokens] = made.x_sf[rank]
            views.topk_idx[:tokens] = made.topk_idx[rank]
            views.topk_weights[:tokens] = made.topk_weights[rank]
        device = prepared.device
        self.outputs = [torch.empty(t, shape.hidden, dtype=torch.bfloat16, device=device) for t in case.tokens]
        self.counts = [torch.zeros(local, dtype=torch.int32, device=device) for _ in case.tokens]
        self.prepared = prepared

    def fill(self, byte: int) -> None:
        """y, the slots and the pool: everything that a launch has to write before it is read."""
        for y in self.outputs:
            y.view(torch.uint8).fill_(byte)
        for rank in range(self._buffer.size.ranks):
            views = self._buffer.rank(rank)
            for field in FIELDS:
                if field.name in (*IN_RING, "slots"):
                    view = getattr(views, field.name)
                    (view.t() if field.transposed else view).view(torch.uint8).fill_(byte)

    def launch(self) -> None:
        """Raises KernelTimeout when a role waited in vain."""
        l1, l2 = zip(*self.weights, strict=True)
        api.fp8_mega_moe(self.outputs, l1, l2, self._buffer, self.counts, recipe=self._prepared.case.recipe)
        self._buffer.check()

    def stages(self) -> dict[str, Tensor]:
        """Read back from pools and slots; raises `canonical.Misplaced`, an AssertionError.

        Where blocks share a place in the ring, only the last one's activations are left: slots alone are shown then.
        """
        case, where, size = self._prepared.case, routes(self._prepared.inputs.topk_idx), self._buffer.size
        local, whole = case.shape.experts_per_rank(case.ranks), True
        origins: list[Tensor] = []  # source rank, entry, expert of each row, a rank at a time
        found: dict[str, list[Tensor]] = {name: [] for name in IN_RING}
        for rank in range(case.ranks):
            views = self._buffer.rank(rank)
            rows, expert = canonical.pool_rows(where, rank, local, BLOCK_M)
            source, slot_row = views.pool_source[rows].long().unbind(1)
            entry = layout.entry_of(slot_row % size.capacity, slot_row // size.capacity, case.shape.topk)
            origins.append(torch.stack([source, entry, expert]))
            whole &= not len(rows) or int(rows[-1]) < size.ring_rows
            for name in IN_RING if whole else ():
                stage = STAGES[name]
                dtype, width = stage.format(case.recipe).dtype, stage.width(case.shape, case.recipe)
                found[name].append(getattr(views, name).view(dtype)[rows, :width])
        order = canonical.order(where, case.shape.topk, *torch.cat(origins, dim=1))
        slots = canonical.slots(where, [self._buffer.rank(rank).slots for rank in range(case.ranks)])
        if not (whole and len(where)):
            return {"slots": slots}
        return {name: torch.cat(parts)[order] for name, parts in found.items()} | {"slots": slots}

    def y(self) -> list[Tensor]:
        """By rank."""
        return self.outputs

    def stats(self) -> list[Tensor]:
        """By rank, over all launches since `prepare`."""
        return self.counts

    def close(self) -> None:
        """Frees buffer and weights."""
        if self.buffer is not None:
            self.buffer.destroy()
        self.buffer = self.prepared = self._weights_of = None
        self.weights = self.outputs = self.counts = []

    def _require(self) -> None:
        api.require_device()

    def _make_buffer(self, size: BufferSize) -> Any:
        sizes = (size.experts, size.capacity, size.topk, size.hidden, size.intermediate)
        return api.get_symm_buffer_for_mega_moe(api.VirtualGroup(size.ranks), *sizes, ring_blocks=size.ring)

    @staticmethod
    def _rank_weights(
        prepared: Prepared, rank: int, local: int
    ) -> tuple[api.TransformedWeights, api.TransformedWeights]:
        experts = map(prepared.inputs.weights, range(rank * local, (rank + 1) * local))
        l1, l2 = (
            (torch.stack([w.codes for w in layer]).view(FP8), torch.stack([w.scales for w in layer]))
            for layer in zip(*experts, strict=True)
        )
        return api.transform_weights_for_mega_moe_sm90(l1, l2)

    @property
    def _buffer(self) -> Any:
        if self.buffer is None:
            raise RuntimeError("prepare comes first")
        return self.buffer

    @property
    def _prepared(self) -> Prepared:
        if self.prepared is None:
            raise RuntimeError("prepare comes first")
        return self.prepared


def make() -> MegaproofAdapter:
    """The factory of `--kernel megaproof.proof.adapters.megaproof:make`."""
    return MegaproofAdapter()
