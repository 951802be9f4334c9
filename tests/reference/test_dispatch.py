"""Eq. (1): the routes in canonical order, and tokens that travel as they are."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megaproof.reference import dispatch

IDX = [torch.tensor([[2, -1], [-1, 0]]), torch.zeros(0, 2, dtype=torch.int64), torch.tensor([[1, 1], [-1, -1], [3, 2]])]


def lists(routes: dispatch.Routes) -> dict[str, list[int]]:
    return {name: getattr(routes, name).tolist() for name in ("rank", "token", "slot", "expert", "row")}


def test_routes_by_hand() -> None:
    where = dispatch.routes(IDX)
    assert len(where) == 6
    assert lists(where) == {
        "rank": [0, 0, 2, 2, 2, 2],
        "token": [0, 1, 0, 0, 2, 2],
        "slot": [0, 1, 0, 1, 0, 1],
        "expert": [2, 0, 1, 1, 3, 2],
        "row": [0, 1, 2, 2, 4, 4],
    }
    assert where.triples().tolist() == [[0, 0, 0], [0, 1, 1], [2, 0, 0], [2, 0, 1], [2, 2, 0], [2, 2, 1]]
    assert [where.of_expert(e).tolist() for e in range(5)] == [[1], [2, 3], [0, 5], [4], []]


def test_pull_copies_bytes_and_scales() -> None:
    """Position-encoded: byte and scale say rank and token. NaN bytes and NaN scales travel unchanged."""
    x = [torch.full((len(idx), 4), 10 * rank, dtype=torch.uint8) for rank, idx in enumerate(IDX)]
    for part in x:
        part += torch.arange(len(part), dtype=torch.uint8)[:, None]
    x[2][2, 3] = 0x7F
    x_sf = [part[:, :1].float() + 0.5 for part in x]
    x_sf[0][1] = torch.nan
    acts, acts_sf = dispatch.pull(x, x_sf, dispatch.routes(IDX))
    assert acts.tolist() == [[0] * 4, [1] * 4, [20] * 4, [20] * 4, [22, 22, 22, 0x7F], [22, 22, 22, 0x7F]]
    assert acts_sf.nan_to_num(-1).tolist() == [[0.5], [-1], [20.5], [20.5], [22.5], [22.5]]
    acts.zero_()
    assert int(x[2][0, 0]) == 20, "copies, not views"


@given(st.lists(st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), max_size=4), min_size=1, max_size=5))
def test_routes_are_the_active_slots(experts: list[list[list[int]]]) -> None:
    idx: list[Tensor] = [torch.tensor(tokens, dtype=torch.int64).reshape(-1, 3) for tokens in experts]
    where, first = dispatch.routes(idx), 0
    expected = []
    for rank, tokens in enumerate(experts):
        for token, slots in enumerate(tokens):
            expected += [(rank, token, slot, e, first + token) for slot, e in enumerate(slots) if e >= 0]
        first += len(tokens)
    assert list(zip(*lists(where).values(), strict=True)) == expected
    together = torch.cat([where.of_expert(e) for e in range(7)])
    assert sorted(together.tolist()) == list(range(len(where))), "each row goes to one expert"
