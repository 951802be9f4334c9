"""Guesses at where the wrong elements lie: rows, columns, tiles, blocks, one rank, one expert, one token."""

from __future__ import annotations

import torch
from torch import Tensor

from megaproof.proof.divergence.evidence import FULL, PLACE_UNLIKELY, Evidence, Pattern, inside, ints, some
from megaproof.proof.divergence.place import GROUP
from megaproof.quant.cast import BLOCK

CORE = 8
"""Rows and columns of a core matrix: the 8x8 block of an accumulator's layout."""
WHOLE_COLUMN_ROWS = 4
"""Rows below which a whole column says nothing."""


def everything(e: Evidence) -> Pattern | None:
    """Nearly every element of the stage is wrong."""
    if not e.everywhere:
        return None
    return Pattern("everything", f"{e.count} of {e.wrong.numel()} elements differ, in nearly every row")


def whole_rows(e: Evidence) -> Pattern | None:
    """Wrong rows are wrong from end to end."""
    fill = e.wrong[e.wrong_rows].float().mean(1)
    if e.everywhere or e.wrong.shape[1] < CORE or not (fill >= FULL).all():
        return None
    return Pattern("whole row", f"wrong rows are wrong as a whole: {some(ints(e.wrong_rows))}")


def whole_columns(e: Evidence) -> Pattern | None:
    """Wrong columns are wrong from the first row to the last."""
    rows, columns = e.wrong.shape
    fill = e.wrong[:, e.wrong_columns].float().mean(0)
    if e.everywhere or rows < WHOLE_COLUMN_ROWS or columns < 2 or not (fill >= FULL).all():
        return None
    return Pattern("whole column", f"wrong columns are wrong in every row: {some(ints(e.wrong_columns))}")


def _elements_of(e: Evidence, row_block: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(wrong, present) elements of each [row block, column block], int64."""
    rows, columns = int(row_block.max()) + 1, -(-e.wrong.shape[1] // size)
    column_block = torch.arange(e.wrong.shape[1]) // size
    block = row_block[:, None] * columns + column_block[None, :]
    wrong = torch.bincount(block[e.wrong], minlength=rows * columns)
    return wrong.reshape(rows, columns), torch.bincount(block.flatten(), minlength=rows * columns).reshape(
        rows, columns
    )


def core_matrix(e: Evidence) -> Pattern | None:
    """Wrong elements fill 8x8 blocks of an expert's rows (of y's rows) and of the columns."""
    if e.everywhere or e.wide > 1 or e.wrong.shape[1] < 2 * CORE:
        return None
    row = e.rows.expert_row if bool((e.rows.expert_row >= 0).all()) else torch.arange(len(e.rows))
    _, row_block = torch.unique(e.rows.expert * (1 << 32) + row // CORE, return_inverse=True)
    wrong, present = _elements_of(e, row_block, CORE)
    touched = wrong > 0
    filled = bool((wrong[touched] >= FULL * present[touched]).all())
    tall = int(present[touched].max()) >= CORE * CORE // 2
    # A touched block beside an untouched one in the same rows, and below or above one: not whole rows or columns.
    partial = float(touched.float().mean(1)[touched.any(1)].mean()) < 0.5 and not bool(touched.all(0).any())
    if not (filled and tall and partial):
        return None
    first = touched.nonzero()[0].tolist()
    top = int((row_block == first[0]).nonzero()[0])
    return Pattern(
        "8x8 core matrix",
        f"wrong elements fill {int(touched.sum())} of the 8 x 8 blocks and lie nowhere else; "
        f"the first starts at row {top}, column {first[1] * CORE}",
    )


def every_other_group(e: Evidence) -> Pattern | None:
    """Wrong rows are wrong in every other 64-group of columns, right in those between: a stride of 64 against 128."""
    if e.wide > GROUP:
        return None
    size = GROUP // e.wide
    groups = e.wrong.shape[1] // size
    if groups < 4 or e.everywhere:
        return None
    fill = e.wrong[e.wrong_rows].reshape(len(e.wrong_rows), groups, size).float().mean(2)
    for parity, name in ((0, "even"), (1, "odd")):
        full, clean = fill[:, parity::2], fill[:, 1 - parity :: 2]
        by_chance = 2.0 ** (1 - full.numel()) if size == 1 else 0.0
        # Groups that are zero throughout can be right by chance: most of a row's groups must be full, not all.
        if (clean == 0).all() and (full >= FULL).float().mean() >= FULL and by_chance < PLACE_UNLIKELY:
            return Pattern(
                "64 against 128", f"the {name} 64-groups of each wrong row are wrong, those between are right"
            )
    return None


def tile_edge(e: Evidence) -> Pattern | None:
    """Only first, or only last rows of 128-row tiles of the experts' rows are wrong."""
    row, rows = e.rows.expert_row, e.rows.expert_rows
    if e.everywhere or not bool((row >= 0).all()):
        return None
    edges = {"first": row % BLOCK == 0, "last": (row % BLOCK == BLOCK - 1) | (row == rows - 1)}
    for name, edge in edges.items():
        wrong = e.wrong_rows
        if edge[wrong].all() and inside(int(edge.sum()), len(wrong), len(row)) < PLACE_UNLIKELY:
            return Pattern(f"{name} row of a tile", f"all {len(wrong)} wrong rows are the {name} row of a 128-row tile")
    return None


def _only(e: Evidence, key: Tensor, choices: int) -> int | None:
    """The one value of `key` that all wrong rows have, where chance would not do that."""
    found = key[e.wrong_rows].unique()
    if e.everywhere or len(found) != 1 or int(found) < 0:
        return None
    size = int((key == found).sum())
    if size == len(key) or inside(size, len(e.wrong_rows), len(key), choices) >= PLACE_UNLIKELY:
        return None
    return int(found)


def one_token(e: Evidence) -> Pattern | None:
    """All wrong elements belong to one token."""
    key = torch.where(e.rows.token < 0, -1, e.rows.rank * (1 << 32) + e.rows.token)
    if bool((key < 0).any()):
        return None
    only = _only(e, key, len(key.unique()))
    if only is None and len(e.wrong_rows) == 1 and e.count >= 2 and len(key) > 1:
        # One row: its elements must be many enough that chance would have spread them over the rows.
        only = int(key[e.wrong_rows]) if len(key) ** (1.0 - e.count) < PLACE_UNLIKELY else None
    if only is None:
        return None
    return Pattern("one token only", f"all wrong rows belong to token {only & 0xFFFFFFFF} of rank {only >> 32}")


def one_source(e: Evidence) -> Pattern | None:
    """All wrong elements come from one source rank, and from more than one of its tokens."""
    only = _only(e, e.rows.rank, len(e.rows.rank.unique()))
    if only is None or len(e.rows.token[e.wrong_rows].unique()) < 2:
        return None
    return Pattern("one source rank only", f"all wrong rows have source rank {only}")


def one_destination(e: Evidence) -> Pattern | None:
    """All wrong elements were computed on one rank, by more than one expert."""
    only = _only(e, e.rows.destination, len(e.rows.destination.unique()))
    if only is None or len(e.rows.expert[e.wrong_rows].unique()) < 2:
        return None
    return Pattern("one destination rank only", f"all wrong rows were computed on rank {only}")


def one_expert(e: Evidence) -> Pattern | None:
    """All wrong elements were computed by one expert, from more than one token."""
    only = _only(e, e.rows.expert, len(e.rows.expert.unique()))
    if only is None or len(e.wrong_rows) < 2:
        return None
    return Pattern("one expert only", f"all wrong rows were computed by expert {only}")


GUESSES = (
    everything,
    whole_rows,
    whole_columns,
    core_matrix,
    every_other_group,
    tile_edge,
    one_token,
    one_source,
    one_destination,
    one_expert,
)
