"""What must not change a bit of the kernel's y, on silicon: batch, ranks, capacity, earlier launches, SMs, ring and the
memory around it; each with 64 and with 128 columns a scale, which are two kernels.

Every launch that is waited for leaves the guards of proof/guards.py. Each test says what it compared, by stage. The
layer's own properties, of the reference, are in tests/reference/test_invariance.py.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.kernel.host import plans
from megaproof.kernel.host.buffer import BufferSize
from megaproof.kernel.host.sizes import BLOCK_M, RING_BLOCKS, WAVE_BLOCKS
from megaproof.proof.adapters import Prepared
from megaproof.proof.guards import GuardedAdapter, assert_nothing_else_is_written
from megaproof.quant.shapes import Shape
from megaproof.tests.support.invariance import (
    CUDA,
    LEAST,
    LOCAL,
    RECYCLING,
    SMOKE,
    TOKENS,
    UNEVEN,
    Tally,
    assert_same,
    case_of,
    chosen,
    per_granularity,
    problem,
    recycled,
    run,
    spread,
)
from megaproof.toolchain.launch import require_device

MARGIN = 4 << 30
"""Bytes beside buffer, inputs and outputs: weights twice and what torch needs."""


@pytest.mark.gpu
@per_granularity
@pytest.mark.parametrize("first", [1, 64, 65, 128])
def test_a_batch_equals_its_two_parts(first: int, granularity: int, adapter: GuardedAdapter, tally: Tally) -> None:
    case = case_of(SMOKE, (TOKENS,), granularity, masked=30)
    made, wanted = problem(case)
    (whole,), (counts,) = run(adapter, case, made)
    assert_same(tally, "y", wanted.y[0], whole)
    parts = [run(adapter, case, chosen(made, [rows])) for rows in (slice(first), slice(first, None))]
    assert_same(tally, "y", whole, torch.cat([y[0] for y, _ in parts]), "in two launches")
    assert_same(tally, "stats", counts, parts[0][1][0] + parts[1][1][0])


@pytest.mark.gpu
@per_granularity
@pytest.mark.parametrize(
    "sizes",
    [(129,), (65, 64), (64, 0, 1, 64), (17, 16, 16, 16, 16, 16, 16, 16), (33, 0, 64, 1, 7, 16, 0, 8)],
    ids=lambda sizes: f"r{len(sizes)}-t{'x'.join(map(str, sizes))}",
)
def test_the_number_of_ranks_changes_nothing(
    sizes: tuple[int, ...], granularity: int, adapter: GuardedAdapter, tally: Tally
) -> None:
    case = case_of(SMOKE, (TOKENS,), granularity, masked=30)
    made, wanted = problem(case)
    y, counts = run(adapter, replace(case, tokens=sizes), spread(made, sizes))
    assert_same(tally, "y", wanted.y[0], torch.cat(y))
    assert_same(tally, "stats", wanted.stats[0], torch.cat(counts))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, capacity, granularity",
    [(SMOKE, 8192, 64), (SMOKE, 200_000, 64), (LOCAL, 200_000, 64), (SMOKE, 8192, 128)],
    ids=["smoke-8192-g64", "smoke-200000-g64", "dsv4_flash_local-200000-g64", "smoke-8192-g128"],
)
def test_capacity_and_place_in_a_large_batch_change_nothing(
    shape: Shape, capacity: int, granularity: int, adapter: GuardedAdapter, tally: Tally
) -> None:
    """A buffer of exactly T; then the same tokens again and again until a large one is full; then T in that one."""
    case = case_of(shape, (TOKENS,), granularity)
    sizes = BufferSize(1, shape.experts, shape.topk, shape.hidden, shape.intermediate, capacity)
    torch.cuda.empty_cache()
    needed = sizes.offsets()[1] + 8 * capacity * shape.hidden + MARGIN  # x and its choice, y three times over
    if needed > (free := torch.cuda.mem_get_info()[0]):
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    made, wanted = problem(case)
    (y,), _ = run(adapter, case, made)
    assert_same(tally, "y", wanted.y[0], y, "with capacity T")

    again = torch.arange(capacity, device=CUDA) % TOKENS
    (large,), (counts,) = run(adapter, case, chosen(made, [again]))
    assert adapter.buffer is not None
    assert adapter.buffer.size.capacity == capacity
    wrong = (large.view(torch.int16) != wanted.y[0].view(torch.int16)[again]).any(1)
    assert not wrong.any(), f"{int(wrong.sum())} of {capacity} rows differ, the first is {int(wrong.nonzero()[0])}"
    tally["y"] += large.numel()
    assert int(counts.sum()) == capacity * shape.topk
    del large, wrong

    (y,), (counts,) = run(adapter, case, made)
    assert adapter.buffer.size.capacity == capacity
    assert_same(tally, "y", wanted.y[0], y, f"with capacity {capacity}")
    assert_same(tally, "stats", wanted.stats[0], counts)


@pytest.mark.gpu
@per_granularity
@pytest.mark.parametrize("ranks", [1, 4, 8], ids=lambda ranks: f"r{ranks}")
def test_launches_of_several_sizes_on_one_buffer(
    ranks: int, granularity: int, adapter: GuardedAdapter, tally: Tally
) -> None:
    """The blocks of a rank alone meet before rows travel from 257 tokens of four slots on: here in turn with fewer."""
    case = case_of(SMOKE, (300 if ranks == 1 else TOKENS,) * ranks, granularity)
    made, wanted = problem(case)
    for tokens in (257, 129, 256, 300, 0, 1, 300, 257, 64) if ranks == 1 else (129, 1, 64, 0, 129):
        y, _ = run(adapter, case, chosen(made, [slice(tokens)] * ranks))
        assert_same(tally, "y", [rows[:tokens] for rows in wanted.y], y, f"{tokens} tokens")


@pytest.mark.gpu
@per_granularity
@pytest.mark.parametrize("sms", [8, 78, 132])
@pytest.mark.parametrize(
    "shape, sizes",
    [(LOCAL, (1,)), (LOCAL, (2,)), (LOCAL, (TOKENS,)), (SMOKE, (2, 0, 1, 7, 1, 1, 5, 1))],
    ids=["flash-t1", "flash-t2", "flash-t129", "smoke-r8"],
)
def test_the_number_of_sms_changes_nothing(
    shape: Shape,
    sizes: tuple[int, ...],
    sms: int,
    granularity: int,
    adapter: GuardedAdapter,
    tally: Tally,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a chip of so many, 78: the H20's. On it depend how many blocks share out the tasks, and GEMM 2's tiles."""
    chip = require_device()
    if chip.sms < sms:
        pytest.skip(f"needs {sms} SMs, this chip has {chip.sms}")
    monkeypatch.setattr(plans, "require_device", lambda index=None: replace(chip, sms=sms))
    case = case_of(shape, sizes, granularity)
    made, wanted = problem(case)
    y, counts = run(adapter, case, made)
    assert_same(tally, "y", wanted.y, y, f"on {sms} SMs")
    assert_same(tally, "stats", wanted.stats, counts)


@pytest.mark.parametrize("masked", [0, 30])
@pytest.mark.parametrize("shape, sizes", RECYCLING.values(), ids=RECYCLING)
def test_these_batches_fill_the_smallest_ring_more_than_once(shape: Shape, sizes: tuple[int, ...], masked: int) -> None:
    case = Case(shape, sizes, masked=masked)
    topk_idx = torch.cat([idx.flatten() for idx in inputs.make(case).topk_idx])
    rows = torch.bincount(topk_idx[topk_idx >= 0], minlength=shape.experts)
    assert max(int(own.sum()) for own in (-(-rows // BLOCK_M)).chunk(case.ranks)) > LEAST


@pytest.mark.gpu
@per_granularity
@pytest.mark.parametrize("shape, sizes", RECYCLING.values(), ids=RECYCLING)
def test_the_memory_for_activations_changes_nothing(
    shape: Shape, sizes: tuple[int, ...], granularity: int, tally: Tally
) -> None:
    """A full ring, whose stages test_moe.py compares, and rings whose places are taken again and again."""
    case = case_of(shape, sizes, granularity, masked=30)
    made, wanted = problem(case)
    assert recycled(wanted, LEAST)
    slots = None
    for ring_blocks in (None, LEAST, LEAST + 1, 3 * WAVE_BLOCKS, RING_BLOCKS):
        with closing(GuardedAdapter(ring_blocks)) as adapter:
            y, counts = run(adapter, case, made)
            assert adapter.buffer is not None
            ring, pool = adapter.buffer.size.ring_blocks, adapter.buffer.size.pool_blocks
            assert ring == min(pool, ring_blocks or pool)
            assert_same(tally, "y", wanted.y, y, f"{ring_blocks} blocks")
            assert_same(tally, "stats", wanted.stats, counts)
            found = adapter.stages()["slots"]
            slots = found if slots is None else slots
            assert_same(tally, "slots", slots, found, f"{ring_blocks} blocks")


@pytest.mark.gpu
@per_granularity
@pytest.mark.parametrize("sizes", [(TOKENS,), UNEVEN], ids=["r1", "r8"])
def test_nothing_else_is_written(sizes: tuple[int, ...], granularity: int, adapter: GuardedAdapter) -> None:
    """Neither between the buffer's fields, nor around the outputs, nor in what the batch does not use of a field."""
    case = case_of(SMOKE, sizes, granularity, masked=30)
    made, wanted = problem(case)
    unused = assert_nothing_else_is_written(adapter, Prepared(case, made, CUDA), wanted)
    between = len(adapter.between) * case.ranks
    print(f"{between:,} bytes between fields and {unused:,} unused ones inside of them are as they were")
