"""Where rows go: every received row has a pool row, every slot a row; the buffer has the kernel's fields."""

from __future__ import annotations

import re

import torch
from hypothesis import given
from hypothesis import strategies as st

from megaproof.kernel.host import params
from megaproof.kernel.host.buffer import BufferSize, RankViews
from megaproof.kernel.host.sizes import WAVE_BLOCKS
from megaproof.reference import layout
from megaproof.tests.support.received import COUNTS
from megaproof.tests.support.runs import ROOT
from megaproof.tests.support.sizes import SIZES


def test_pool_rows_by_hand() -> None:
    row, expert = layout.pool_rows(torch.tensor([2, 0, 129, 1]))
    assert row.tolist() == [0, 1, *range(128, 257), 384]
    assert expert.tolist() == [0] * 2 + [2] * 129 + [3]
    assert [part.tolist() for part in layout.pool_rows(torch.tensor([0, 0]))] == [[], []]
    assert layout.first_rows(torch.tensor([[2, 0], [0, 7], [1, 130]])).tolist() == [[0, 128], [2, 128], [2, 135]]


def test_experts_belong_to_ranks_in_ascending_order() -> None:
    experts = torch.arange(6)
    assert layout.owner(experts, 3).tolist() == [0, 0, 0, 1, 1, 1]
    assert layout.local(experts, 3).tolist() == [0, 1, 2, 0, 1, 2]
    assert (layout.owner(5, 2), layout.local(5, 2)) == (2, 1)


@given(COUNTS)
def test_sources_share_the_rows_of_an_expert(counts: list[list[int]]) -> None:
    sent = torch.tensor(counts)
    row, expert = layout.pool_rows(sent.sum(0))
    first = layout.first_rows(sent).tolist()
    taken = [
        (first[source][e] + i, e)
        for e in range(len(counts[0]))
        for source in range(len(counts))
        for i in range(counts[source][e])
    ]
    assert taken == list(zip(row.tolist(), expert.tolist(), strict=True))
    owners: dict[int, set[int]] = {}
    for place, e in taken:
        owners.setdefault(place // layout.BLOCK_M, set()).add(e)
    assert all(len(owner) == 1 for owner in owners.values()), "a pool block holds rows of one expert"
    assert sorted(owners) == list(range(len(owners))), "no pool block is empty"


@given(COUNTS, st.integers(1, 8))
def test_the_pool_has_room_for_whatever_comes(counts: list[list[int]], topk: int) -> None:
    capacity = max(1, -(-max(map(sum, counts)) // topk))
    problem = BufferSize(len(counts), len(counts) * len(counts[0]), topk, 128, 128, capacity)
    row, _ = layout.pool_rows(torch.tensor(counts).sum(0))
    assert max(row.tolist(), default=0) // 128 * 128 + 128 <= problem.pool_rows, "padding rows of the last block too"


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_slots_and_lists_have_places_of_their_own(capacity: int, topk: int, ranks: int, local: int) -> None:
    slots = torch.arange(capacity * topk).view(topk, capacity)  # as the field `slots`, without H
    for token in range(capacity):
        for slot in range(topk):
            entry = layout.entry_of(token, slot, topk)
            assert slots.flatten()[layout.slot_row(entry, topk, capacity)] == slots[slot, token]
    lists = torch.arange(ranks * local * capacity * topk).view(ranks, local, -1)
    counts = torch.arange(ranks * local).view(ranks, local)
    for source in range(ranks):
        for e in range(local):
            assert layout.recv_list(source, e, local, capacity, topk) == lists[source, e, 0]
            assert layout.recv_count(source, e, local) == counts[source, e]


@given(st.integers(2 * WAVE_BLOCKS, 200), st.integers(0, 1000), st.integers(0, layout.BLOCK_M - 1))
def test_as_many_blocks_as_the_ring_has_share_no_row(ring: int, block: int, row: int) -> None:
    at = [layout.ring_row(b, row, ring) for b in range(block, block + ring + 1)]
    assert len(set(at)) == ring
    assert at[0] == at[-1]
    assert {place % layout.BLOCK_M for place in at} == {row}
    assert max(at) < ring * layout.BLOCK_M
    assert block >= ring or at[0] == block * layout.BLOCK_M + row, "a full ring is the pool"


def test_indices_take_tensors() -> None:
    token, slot = torch.tensor([0, 3, 6]), torch.tensor([1, 0, 2])
    entry = layout.entry_of(token, slot, 3)
    assert entry.tolist() == [1, 9, 20]
    assert layout.slot_row(entry, 3, 7).tolist() == [7, 3, 20]
    assert layout.ring_row(torch.tensor([0, 33, 64]), torch.tensor([1, 0, 127]), 32).tolist() == [1, 128, 127]


# --- the symmetric buffer ---------------------------------------------------------------------------------------------

SIZE = BufferSize(ranks=4, experts=12, topk=3, hidden=512, intermediate=256, capacity=2000)


def fields(size: BufferSize) -> dict[str, layout.Field]:
    numbers = {name: number for name, number in vars(size).items() if name != "ring"}
    return layout.fields(**numbers, pool_blocks=size.pool_blocks, ring_blocks=size.ring_blocks)


def test_fields_are_those_of_the_kernel_in_order() -> None:
    text = (ROOT / "kernel/params.cuh").read_text(encoding="utf-8")
    struct = re.search(r"struct Offsets \{(.*?)\};", text, re.DOTALL)
    assert struct
    names = [name for line in re.findall(r"u64 ([\w, ]+);", struct[1]) for name in line.split(", ")]
    assert list(fields(SIZE)) == names
    assert list(fields(SIZE)) == list(SIZE.offsets()[0]) == [name for name, _ in params.Offsets._fields_]


@given(SIZES)
def test_fields_have_exactly_their_room(size: BufferSize) -> None:
    offsets, total = size.offsets()
    ends = [*list(offsets.values())[1:], total]
    for (name, (dtype, shape)), start, end in zip(fields(size).items(), offsets.values(), ends, strict=True):
        taken = dtype.itemsize * torch.Size(shape).numel()
        assert start + taken <= end, name
        assert end < start + taken + 1024 or name == "workspace", f"{name} is larger than its shape"


def test_views_have_the_dtypes_and_shapes() -> None:
    views = RankViews(SIZE, torch.zeros(SIZE.offsets()[1], dtype=torch.uint8))
    assert SIZE.ring_rows < SIZE.pool_rows
    assert list(vars(views)) == ["storage", *fields(SIZE)]
    for name, (dtype, shape) in fields(SIZE).items():
        view = getattr(views, name)
        assert view.data_ptr() - views.storage.data_ptr() == SIZE.offsets()[0][name], name
        view = view.t() if name in ("l1_acts_sf", "l2_acts_sf") else view  # shown by row, stored by column
        if name == "workspace":  # of which the reference knows the end alone
            view = view[-torch.Size(shape).numel() :].view(shape)
        assert (view.dtype, tuple(view.shape), view.is_contiguous()) == (dtype, shape, True), name
