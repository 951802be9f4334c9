"""From the order in which a kernel keeps rows to the order of the reference: (source rank, token, slot), ascending.

Rows lie by expert, on the rank of the expert, in the order in which they arrived. Beside each the kernel keeps where it
came from; an adapter reads that, and this module puts the rows in order and refuses those that were not routed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaproof.reference import layout
from megaproof.reference.dispatch import Routes

RANK_SHIFT = 40
"""A source rank stands above every entry, token * K + slot, in one 64-bit key."""


class Misplaced(AssertionError):
    """A routed row is missing, doubled, or with another expert."""


def pool_rows(where: Routes, rank: int, experts_local: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Returns (row in the pool, expert of the layer) of every row that a rank receives, ascending; int64 [m] each.

    where: the active slots of all ranks. experts_local: experts of a rank, E_loc. block_m: rows of a pool block; each
    expert's rows begin a new one.
    """
    received = layout.local(where.expert[layout.owner(where.expert, experts_local) == rank], experts_local)
    rows, expert = layout.pool_rows(torch.bincount(received, minlength=experts_local), block_m)
    return rows, expert + rank * experts_local


def order(where: Routes, topk: int, rank: Tensor, entry: Tensor, expert: Tensor) -> Tensor:
    """Returns the permutation int64 [n] that puts a kernel's rows in canonical order.

    where: the active slots of all ranks, n of them. rank, entry, expert: int64 [n] each, in the kernel's own order: the
    source rank of each row, token * topk + slot there, and the expert of the layer that the row is with.

    Raises `Misplaced` unless the rows are those that were routed, each once, with its expert.
    """
    found = torch.argsort((rank << RANK_SHIFT) + entry)
    wanted = (where.rank, layout.entry_of(where.token, where.slot, topk), where.expert)
    for ours, routed in zip((rank, entry, expert), wanted, strict=True):
        if not torch.equal(ours[found], routed):
            raise Misplaced("a routed row is missing, doubled, or with another expert")
    return found


def slots(where: Routes, by_rank: Sequence[Tensor]) -> Tensor:
    """Returns the rows of the active slots, bfloat16 [n, H].

    by_rank: [K, capacity, H] of each source rank, as a combine buffer keeps them.
    """
    ours = [where.rank == rank for rank in range(len(by_rank))]  # rank after rank, as the routes are
    return torch.cat([kept[where.slot[mine], where.token[mine]] for kept, mine in zip(by_rank, ours, strict=True)])
