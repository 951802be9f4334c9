"""Fields of the symmetric buffer: their places, and sizes that are refused."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaproof.kernel.host.buffer import FIELDS, BufferSize, RankViews, Region, names_of
from megaproof.kernel.host.params import SHAPE_FIELDS, KernelShape, Offsets
from megaproof.kernel.host.sizes import MAX_EXPERTS, MAX_RANKS, RING_BLOCKS, WAVE_BLOCKS, ConfigError
from megaproof.tests.support.sizes import SIZES

GOOD = {"ranks": 8, "experts": 256, "topk": 6, "hidden": 4096, "intermediate": 2048, "capacity": 64}


OFFSETS = {
    (8, 256, 6, 4096, 2048, 64): (
        *(0, 262_144, 270_336, 273_408, 275_456, 3_421_184, 3_422_208, 3_815_424),
        *(3_816_448, 3_819_520, 32_655_360, 33_556_480, 47_974_400, 48_875_520, 48_931_840, 48_960_512),
    ),
    (1, 32, 6, 4096, 2048, 8192): (
        *(0, 33_554_432, 34_603_008, 34_996_224, 35_192_832, 437_846_016, 437_847_040, 444_138_496),
        *(444_139_520, 444_146_688, 494_478_336, 496_051_200, 521_217_024, 522_789_888, 523_214_848, 523_427_840),
    ),
    (3, 6, 3, 128, 384, 33, 48): (
        *(0, 5120, 6144, 7168, 8192, 33_792, 34_816, 37_888),
        *(38_912, 41_984, 107_520, 109_568, 306_176, 318_464, 322_560, 324_608),
    ),
}
"""Arguments of BufferSize -> the offset of each field, and the bytes of a rank: the kernel and callers rely on them."""


@pytest.mark.parametrize("numbers", OFFSETS, ids=str)
def test_offsets_stay(numbers: tuple[int, ...]) -> None:
    offsets, total = BufferSize(*numbers).offsets()
    assert (*offsets.values(), total) == OFFSETS[numbers]


def test_every_field_is_in_a_region() -> None:
    regions = {
        "inputs": ("x", "x_sf", "topk_idx", "topk_weights"),
        "peers": ("slots", "recv_count", "recv_list"),
        "workspace": ("rank_counter", "workspace"),
        "ring": ("l1_acts", "l1_acts_sf", "l2_acts", "l2_acts_sf"),
        "pool": ("pool_source", "pool_weight"),
    }
    assert {region: names_of(region) for region in get_args(Region)} == regions
    assert sum(regions.values(), ()) == tuple(field.name for field in FIELDS)


@given(SIZES)
def test_fields_do_not_overlap(size: BufferSize) -> None:
    offsets, total = size.offsets()
    local, slots = size.experts_local, size.ranks * size.capacity * size.topk
    rows = size.pool_rows
    most = local * min(slots, 1) + (slots - local) // 128 if slots >= local else slots
    assert size.pool_blocks >= most, "one row of each expert, then whole blocks"
    assert size.pool_blocks == rows // 128
    assert size.ring_blocks == min(size.pool_blocks, size.ring or RING_BLOCKS)
    assert size.ring_rows == 128 * size.ring_blocks
    starts = [*offsets.values(), total]
    assert starts == sorted(starts)
    assert all(start % 1024 == 0 for start in starts)
    assert starts[1] - starts[0] >= size.capacity * size.hidden
    assert total - offsets["pool_weight"] >= 4 * rows
    assert offsets["l1_acts_sf"] - offsets["l1_acts"] >= size.ring_rows * size.hidden
    assert offsets["l2_acts"] - offsets["workspace"] >= 4 * 3 * size.pool_blocks


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("hidden", 4000, "hidden = 4000 must be a positive multiple of 128"),
        ("hidden", 0, "hidden = 0"),
        ("intermediate", 64, "intermediate_hidden = 64"),
        ("ranks", 0, "ranks = 0 must be in"),
        ("ranks", MAX_RANKS + 1, f"must be in \\[1, {MAX_RANKS}\\]"),
        ("experts", 255, "num_experts = 255 must be a multiple of ranks = 8"),
        ("experts", MAX_EXPERTS + 8, f"at most {MAX_EXPERTS}"),
        ("topk", 0, "num_topk = 0"),
        ("topk", 33, "num_topk = 33 must be in"),
        ("capacity", 0, "num_max_tokens_per_rank = 0"),
        ("capacity", 1 << 29, "below 2\\^31"),
        ("capacity", 90_000_000, "the ranks' slots must be below 2\\^32"),
        ("ring", 2 * WAVE_BLOCKS - 1, "ring_blocks = 47 must be at least 48"),
        ("ring", 0, "ring_blocks = 0 must be"),
    ],
    ids=str,
)
def test_illegal_sizes_are_refused_by_name(name: str, value: int, rule: str) -> None:
    BufferSize(**GOOD)
    with pytest.raises(ConfigError, match=rule):
        BufferSize(**{**GOOD, name: value})


def test_a_ring_for_all_blocks_is_never_too_small() -> None:
    few = BufferSize(**GOOD | {"experts": 8, "capacity": 1, "ring": 1})
    assert (few.pool_blocks, few.ring_blocks) == (1, 1)
    assert BufferSize(**GOOD | {"ring": 10**6}).ring_blocks == BufferSize(**GOOD).pool_blocks


@given(
    ranks=st.integers(1, MAX_RANKS),
    local=st.integers(1, MAX_EXPERTS),
    topk=st.integers(1, 32),
    capacity=st.integers(1, (1 << 31) - 1),
    hidden=st.integers(1, 256),
    intermediate=st.integers(1, 256),
)
def test_whatever_is_accepted_has_room(
    ranks: int, local: int, topk: int, capacity: int, hidden: int, intermediate: int
) -> None:
    """Views of different fields share no byte, offsets are aligned, and the kernel's integers hold every size."""
    experts = ranks * min(local, MAX_EXPERTS // ranks)
    most = (1 << 32) - 1 - 127 * (experts // ranks)
    capacity = min(capacity, ((1 << 31) - 1) // topk, most // (ranks * topk))
    size = BufferSize(ranks, experts, topk, 128 * hidden, 128 * intermediate, capacity)
    offsets, total = size.offsets()
    assert total < 1 << 63
    views = RankViews(size, torch.empty(total, dtype=torch.uint8, device="meta"))
    ends = dict(zip(offsets, [*list(offsets.values())[1:], total], strict=True))
    for name in vars(views).keys() & offsets.keys():
        view = getattr(views, name)
        start = view.storage_offset() * view.element_size()
        assert start == offsets[name]
        assert start % 1024 == 0
        assert start + view.nbytes <= ends[name]
    layout = Offsets(**offsets)
    shape = {name: getattr(size, attribute) for name, attribute in SHAPE_FIELDS.items()}
    assert all(getattr(layout, name) == offset for name, offset in offsets.items())
    held = KernelShape(**shape)
    assert all(getattr(held, name) == number for name, number in shape.items())
    assert size.pool_rows < 1 << 32
