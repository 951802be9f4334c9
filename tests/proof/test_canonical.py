"""Rows that a kernel keeps by expert, put in the order of the reference; what was not routed is refused."""

from __future__ import annotations

import pytest
import torch

from megaproof.proof.adapters import canonical
from megaproof.reference.dispatch import Routes, routes

LOCAL, TOPK = 2, 2
INDEX = [torch.tensor([[3, 0], [-1, 1]]), torch.tensor([[0, 3], [2, -1], [3, 1]])]
"""Two ranks, of two experts each; two and three tokens."""


def where() -> Routes:
    return routes(INDEX)


def kept() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rank, token * K + slot, expert) of the rows of both pools, an expert's rows last come first."""
    found = where()
    rows = sorted(range(len(found)), key=lambda i: (int(found.expert[i]), -i))
    entry = found.token * TOPK + found.slot
    return found.rank[rows], entry[rows], found.expert[rows]


def test_rows_of_a_pool_by_hand() -> None:
    """Rank 1 has experts 2 and 3: one row for the one, three for the other, which begin a block of four rows."""
    rows, expert = canonical.pool_rows(where(), 1, LOCAL, 4)
    assert rows.tolist() == [0, 4, 5, 6]
    assert expert.tolist() == [2, 3, 3, 3]
    rows, expert = canonical.pool_rows(where(), 0, LOCAL, 4)
    assert (rows.tolist(), expert.tolist()) == ([0, 1, 4, 5], [0, 0, 1, 1])


def test_rows_come_in_the_order_of_the_routes() -> None:
    rank, entry, expert = kept()
    order = canonical.order(where(), TOPK, rank, entry, expert)
    assert order.tolist() != list(range(len(order)))
    assert rank[order].tolist() == where().rank.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert expert[order].tolist() == [3, 0, 1, 0, 3, 2, 3, 1]


@pytest.mark.parametrize("what", ["missing", "doubled", "another expert", "another rank", "another slot"])
def test_a_row_that_was_not_routed_is_refused(what: str) -> None:
    rank, entry, expert = (part.clone() for part in kept())
    match what:
        case "missing":
            rank, entry, expert = rank[1:], entry[1:], expert[1:]
        case "doubled":
            rank[0], entry[0] = rank[1], entry[1]
        case "another expert":
            expert[0] += 1
        case "another rank":
            rank[0] += 2
        case "another slot":
            entry[0] += 8
    with pytest.raises(canonical.Misplaced, match="a routed row is missing, doubled, or with another expert"):
        canonical.order(where(), TOPK, rank, entry, expert)


def test_slots_of_a_combine_buffer() -> None:
    """[K, capacity, H]: the number of a row says where it lies."""
    by_rank = [torch.arange(100 * r, 100 * r + TOPK * 3).view(TOPK, 3, 1) for r in range(2)]
    assert canonical.slots(where(), by_rank).flatten().tolist() == [0, 3, 4, 100, 103, 101, 102, 105]
