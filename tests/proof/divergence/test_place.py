"""The place of an element: the first in canonical order, with every coordinate."""

from __future__ import annotations

from megaproof.proof.faults.traces import expected, found, layer, rows_of


def test_the_first_element_is_first_by_source_rank_token_and_slot() -> None:
    """Not by expert, not by column: row 200's column 3 comes before row 300's column 0."""
    planted = expected("slots").clone()
    planted[300, 0] += 1
    planted[200, 3] += 1
    place, rows = found("slots", planted).place, rows_of("slots")
    assert place is not None
    assert (place.row, place.column) == (200, 3)
    assert (place.rank, place.token, place.slot) == tuple(int(t[200]) for t in (rows.rank, rows.token, rows.slot))


def test_the_place_is_the_one_of_the_element() -> None:
    """Every coordinate, counted again by hand from the routing."""
    topk_idx = layer().inputs.topk_idx
    active = [(r, t, k, int(idx[t, k])) for r, idx in enumerate(topk_idx) for t in range(len(idx)) for k in range(4)]
    rank, token, slot, expert = active[610]
    before = [row for row in active[:610] if row[3] == expert]
    planted = expected("l2_acts").clone()
    planted[610, 200] ^= 4
    place = found("l2_acts", planted).place
    assert place is not None
    assert (place.rank, place.token, place.slot, place.expert) == (rank, token, slot, expert)
    assert (place.destination, place.expert_row) == (expert // 8, len(before))
    assert (place.tile, place.k_block, place.group) == ((len(before) // 128, 1), 1, 3)
    planted = expected("l2_acts_sf").clone()
    planted[610, 3] *= 2
    place = found("l2_acts_sf", planted).place
    assert place is not None
    assert (place.tile, place.k_block, place.group) == ((len(before) // 128, 1), 1, 3)
