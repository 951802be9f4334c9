"""Eq. (9): local experts, masked slots left out, accumulated into new tensors."""

from __future__ import annotations

import torch

from megaproof.reference import dispatch, stats

IDX = [torch.tensor([[0, 5], [5, -1]]), torch.tensor([[5, 3], [-1, -1], [2, 2]])]


def test_counts_by_local_expert() -> None:
    counts = stats.accumulate(None, dispatch.routes(IDX), 2, 3)
    assert [c.tolist() for c in counts] == [[1, 0, 2], [1, 0, 3]]
    assert all(c.dtype == torch.int32 for c in counts)


def test_counts_are_added_to_those_before_which_stay() -> None:
    before = [torch.tensor([10, 20, 30], dtype=torch.int32), torch.tensor([0, -1, 7], dtype=torch.int32)]
    after = stats.accumulate(before, dispatch.routes(IDX), 2, 3)
    assert [c.tolist() for c in after] == [[11, 20, 32], [1, -1, 10]]
    assert [c.tolist() for c in before] == [[10, 20, 30], [0, -1, 7]]


def test_nothing_routed() -> None:
    nothing = dispatch.routes([torch.full((3, 2), -1), torch.zeros(0, 2, dtype=torch.int64)])
    before = [torch.ones(2, dtype=torch.int32)] * 2
    assert [c.tolist() for c in stats.accumulate(None, nothing, 2, 2)] == [[0, 0], [0, 0]]
    after = stats.accumulate(before, nothing, 2, 2)
    assert [c.tolist() for c in after] == [[1, 1], [1, 1]]
    after[0].zero_()
    assert before[0].tolist() == [1, 1], "new tensors"


def test_ranks_do_not_share_memory() -> None:
    counts = stats.accumulate(None, dispatch.routes(IDX), 2, 3)
    counts[0].zero_()
    assert counts[1].tolist() == [1, 0, 3]
