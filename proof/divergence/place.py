"""Where an element of a stage is: its source, its expert, its tile, its block of K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.quant.cast import BLOCK
from megaproof.reference.layout import local, owner
from megaproof.reference.stages import STAGES, Stage

GROUP = 64
"""Columns of the narrowest group of L2 activations; half a K block of GEMM 2."""


@dataclass(frozen=True)
class Rows:
    """What is known of each row of a stage: int64 [n] each, -1 where it has no meaning (an expert of a row of y)."""

    rank: Tensor
    """Source rank; for statistics the rank that owns the expert."""
    token: Tensor
    slot: Tensor
    expert: Tensor
    destination: Tensor
    """Rank of the expert."""
    expert_row: Tensor
    """Place among the rows of the same expert, in canonical order."""
    expert_rows: Tensor
    """How many rows that expert has."""

    def __len__(self) -> int:
        return self.rank.shape[0]


def slot_rows(case: Case, topk_idx: Sequence[Tensor]) -> Rows:
    """The active slots in (rank, token, slot) order."""
    found = [(idx.cpu() >= 0).nonzero() for idx in topk_idx]
    rank = torch.cat([torch.full((len(part),), r) for r, part in enumerate(found)])
    token, slot = torch.cat(found).reshape(-1, 2).unbind(1)
    expert = torch.cat([idx.cpu()[idx.cpu() >= 0] for idx in topk_idx])
    counts = torch.bincount(expert, minlength=case.shape.experts)
    order = torch.argsort(expert, stable=True)
    place = torch.empty_like(expert)
    place[order] = torch.arange(len(expert)) - (counts.cumsum(0) - counts)[expert[order]]
    destination = owner(expert, case.shape.experts_per_rank(case.ranks))
    return Rows(rank, token, slot, expert, destination, place, counts[expert])


def token_rows(case: Case) -> Rows:
    """The tokens, rank after rank."""
    rank = torch.cat([torch.full((tokens,), r) for r, tokens in enumerate(case.tokens)])
    token = torch.cat([torch.arange(tokens) for tokens in case.tokens])
    none = torch.full_like(rank, -1)
    return Rows(rank, token, none, none, none, none, none)


def expert_rows(case: Case) -> Rows:
    """The experts, rank after rank."""
    expert = torch.arange(case.shape.experts)
    rank = owner(expert, case.shape.experts_per_rank(case.ranks))
    none = torch.full_like(expert, -1)
    return Rows(rank, none, none, expert, rank, none, none)


def rows_of(case: Case, stage: Stage, topk_idx: Sequence[Tensor]) -> Rows:
    """What the rows of a stage belong to; topk_idx int64 [T_r, K] by rank."""
    if stage.rows == "slot":
        return slot_rows(case, topk_idx)
    return token_rows(case) if stage.rows == "token" else expert_rows(case)


@dataclass(frozen=True)
class Place:
    """One element; None where a coordinate has no meaning in its stage."""

    row: int
    column: int | None
    rank: int
    token: int | None
    slot: int | None
    expert: int | None
    destination: int | None
    expert_row: int | None
    expert_rows: int | None
    tile: tuple[int, int] | None
    """128-row tile of the expert's rows, 128-column tile."""
    k_block: int | None
    """128-wide K block of the GEMM that reads the element."""
    group: int | None
    """64-wide group of columns."""

    def text(self, name: str, granularity: int) -> list[str]:
        """Two or three lines for a terminal; name: of the stage."""
        stage = STAGES[name]
        if stage.rows == "expert":
            return [f"rank {self.rank}, expert {self.expert} (its local expert {self.column})"]
        source = f"source rank {self.rank}, token {self.token}"
        if self.slot is None:
            lines = [f"{source}; row {self.row} of y"]
        else:
            lines = [
                f"source (rank, token, slot) = ({self.rank}, {self.token}, {self.slot}); row {self.row} of the stage",
                f"destination rank {self.destination}, expert {self.expert}, "
                f"row {self.expert_row} of the {self.expert_rows} of that expert",
            ]
        parts = [f"column {self.column}"]
        if self.tile:
            parts.append(f"tile (row, column) = {self.tile} of 128 x 128")
        if self.k_block is not None:
            parts.append(f"K block {self.k_block} of GEMM {stage.read_by}, 64-group {self.group}")
        if stage.read_by == 2 and stage.covers is None:
            parts.append(f"scale group {self.column // granularity} of {granularity}")
        return [*lines, ", ".join(parts)]


def place(case: Case, stage: Stage, rows: Rows, row: int, column: int) -> Place:
    """The place of element [row, column] of a stage."""

    def at(values: Tensor) -> int | None:
        value = int(values[row])
        return None if value < 0 else value

    first = column * stage.span(case.recipe)
    expert_row = at(rows.expert_row)
    reads = stage.read_by is not None
    if stage.rows == "expert":  # the column is the expert's number on its rank
        column = local(int(rows.expert[row]), case.shape.experts_per_rank(case.ranks))
    return Place(
        row,
        column,
        int(rows.rank[row]),
        at(rows.token),
        at(rows.slot),
        at(rows.expert),
        at(rows.destination),
        expert_row,
        at(rows.expert_rows),
        None if expert_row is None else (expert_row // BLOCK, first // BLOCK),
        first // BLOCK if reads else None,
        first // GROUP if reads else None,
    )
