"""What must not change a bit of the kernel's y, on silicon: batch, ranks, capacity, earlier launches, memory around it,
late roles, repetition, a CUDA graph. The layer's own properties, of the reference, are in test_invariance.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernel import api
from kernel.adapters import Prepared
from kernel.adapters.megaproof import POOL_STAGES, MegaproofAdapter
from kernel.config import BLOCK_M, GROUP_BLOCKS, RING_BLOCKS, Problem, aligned
from quant.recipe import SHAPES, Shape
from reference.layer import LayerResult, moe_layer
from tests import delayed, inputs
from tests.cases import Case
from tests.compare import same
from tests.delayed import DELAYS, Delay
from tests.inputs import Inputs

CUDA = torch.device("cuda")
SMOKE = SHAPES["smoke"]
LOCAL = replace(SHAPES["dsv4_flash"], name="dsv4_flash_local", experts=32)
"""The load of one of eight ranks."""
TOKENS = 129
UNEVEN = (33, 0, 64, 1, 7, 128, 129, 65)
"""For 8 ranks: many rows an expert."""
LEAST = 2 * GROUP_BLOCKS
"""Blocks of the smallest ring."""
RECYCLING = {
    "smoke-r1": (SMOKE, (3000,)),
    "crowded-r8": (replace(SMOKE, name="smoke_crowded", experts=8 * (LEAST + 8)), UNEVEN),
    "flash-r1": (LOCAL, (1000,)),
}
"""Batches that fill more pool blocks of a rank than LEAST: of many rows an expert, of few, of real size."""
NAN, GUARD = 0xFF, 0xA5
GUARD_ROWS = 16
MARGIN = 4 << 30
"""Bytes beside buffer, inputs and outputs: weights twice and what torch needs."""


@pytest.fixture
def adapter() -> Iterator[MegaproofAdapter]:
    adapter = MegaproofAdapter()
    yield adapter
    adapter.close()


@pytest.fixture(scope="module", autouse=True)
def _no_problem_outlives_the_file() -> Iterator[None]:
    yield
    problem.cache_clear()


@functools.lru_cache(maxsize=4)
def problem(case: Case) -> tuple[Inputs, LayerResult]:
    """A case's inputs, each expert's weights made once, and the reference's result."""
    made = inputs.make(case, CUDA)
    made = replace(made, weights=functools.cache(made.weights))
    return made, moe_layer(case.recipe, *made.arguments(), experts=case.shape.experts)


def recycled(wanted: LayerResult, ring_blocks: int) -> bool:
    """Whether some rank fills more pool blocks than its ring has."""
    return any(sum(aligned(n, BLOCK_M) for n in counts.tolist()) > ring_blocks * BLOCK_M for counts in wanted.stats)


def chosen(made: Inputs, rows: Sequence[Tensor | slice]) -> Inputs:
    """These tokens of each rank."""
    parts = [[tensor[r] for tensor, r in zip(part, rows, strict=True)] for part in made.arguments()[:4]]
    return Inputs(*parts, made.weights)


def spread(made: Inputs, sizes: Sequence[int]) -> Inputs:
    """One rank's tokens over ranks of these sizes."""
    return Inputs(*(list(part[0].split(list(sizes))) for part in made.arguments()[:4]), made.weights)


def prepare(adapter: MegaproofAdapter, case: Case, made: Inputs) -> None:
    """Every byte that the launch has to write is a NaN's before it."""
    adapter.prepare(Prepared(replace(case, tokens=tuple(map(len, made.x))), made, CUDA))
    adapter.fill(NAN)


def run(adapter: MegaproofAdapter, case: Case, made: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """(y, stats) of one launch, by rank."""
    prepare(adapter, case, made)
    adapter.launch()
    return adapter.y(), adapter.stats()


def enqueue(adapter: MegaproofAdapter, case: Case) -> None:
    """A launch that nobody waits for."""
    l1, l2 = zip(*adapter.weights, strict=True)
    assert adapter.buffer is not None
    api.fp8_mega_moe(adapter.outputs, l1, l2, adapter.buffer, adapter.counts, recipe=case.recipe)


def assert_same(wanted: Sequence[Tensor], found: Sequence[Tensor], name: str) -> None:
    assert len(wanted) == len(found)
    for rank, (a, b) in enumerate(zip(wanted, found, strict=True)):
        same(f"{name} of rank {rank}", a, b)


def raw(tensor: Tensor) -> Tensor:
    """A copy of a tensor's bytes."""
    return tensor.contiguous().view(torch.uint8).clone()


# --- batch, ranks, capacity, earlier launches -------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("first", [1, 64, 65, 128])
def test_a_batch_equals_its_two_parts(first: int, adapter: MegaproofAdapter) -> None:
    case = Case(SMOKE, (TOKENS,), masked=30)
    made, wanted = problem(case)
    (whole,), (counts,) = run(adapter, case, made)
    same("y", wanted.y[0], whole)
    parts = [run(adapter, case, chosen(made, [rows])) for rows in (slice(first), slice(first, None))]
    same("y in two launches", whole, torch.cat([y[0] for y, _ in parts]))
    same("stats", counts, parts[0][1][0] + parts[1][1][0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [(129,), (65, 64), (64, 0, 1, 64), (17, 16, 16, 16, 16, 16, 16, 16), (33, 0, 64, 1, 7, 16, 0, 8)],
    ids=lambda sizes: f"r{len(sizes)}-t{'x'.join(map(str, sizes))}",
)
def test_the_number_of_ranks_changes_nothing(sizes: tuple[int, ...], adapter: MegaproofAdapter) -> None:
    case = Case(SMOKE, (TOKENS,), masked=30)
    made, wanted = problem(case)
    y, counts = run(adapter, replace(case, tokens=sizes), spread(made, sizes))
    same("y", wanted.y[0], torch.cat(y))
    same("stats", wanted.stats[0], torch.cat(counts))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, capacity",
    [(SMOKE, 8192), (SMOKE, 200_000), (LOCAL, 200_000)],
    ids=lambda value: getattr(value, "name", value),
)
def test_capacity_and_place_in_a_large_batch_change_nothing(
    shape: Shape, capacity: int, adapter: MegaproofAdapter
) -> None:
    """A buffer of exactly T; then the same tokens again and again until a large one is full; then T in that one."""
    case = Case(shape, (TOKENS,))
    sizes = Problem(1, shape.experts, shape.topk, shape.hidden, shape.intermediate, capacity)
    torch.cuda.empty_cache()
    needed = sizes.offsets()[1] + 8 * capacity * shape.hidden + MARGIN  # x and its choice, y three times over
    if needed > (free := torch.cuda.mem_get_info()[0]):
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    made, wanted = problem(case)
    (y,), _ = run(adapter, case, made)
    same("y with capacity T", wanted.y[0], y)

    again = torch.arange(capacity, device=CUDA) % TOKENS
    (large,), (counts,) = run(adapter, case, chosen(made, [again]))
    assert adapter.buffer is not None
    assert adapter.buffer.problem.capacity == capacity
    wrong = (large.view(torch.int16) != wanted.y[0].view(torch.int16)[again]).any(1)
    assert not wrong.any(), f"{int(wrong.sum())} of {capacity} rows differ, the first is {int(wrong.nonzero()[0])}"
    assert int(counts.sum()) == capacity * shape.topk
    del large, wrong

    (y,), (counts,) = run(adapter, case, made)
    assert adapter.buffer.problem.capacity == capacity
    same(f"y with capacity {capacity}", wanted.y[0], y)
    same("stats", wanted.stats[0], counts)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 4, 8], ids=lambda ranks: f"r{ranks}")
def test_launches_of_several_sizes_on_one_buffer(ranks: int, adapter: MegaproofAdapter) -> None:
    case = Case(SMOKE, (TOKENS,) * ranks)
    made, wanted = problem(case)
    for tokens in (129, 1, 64, 0, 129):
        y, _ = run(adapter, case, chosen(made, [slice(tokens)] * ranks))
        assert_same([rows[:tokens] for rows in wanted.y], y, f"y of {tokens} tokens")


@pytest.mark.gpu
@pytest.mark.parametrize("sms", [8, 78, 132])
@pytest.mark.parametrize(
    "shape, sizes",
    [(LOCAL, (1,)), (LOCAL, (2,)), (LOCAL, (TOKENS,)), (SMOKE, (2, 0, 1, 7, 1, 1, 5, 1))],
    ids=["flash-t1", "flash-t2", "flash-t129", "smoke-r8"],
)
def test_the_number_of_sms_changes_nothing(
    shape: Shape, sizes: tuple[int, ...], sms: int, adapter: MegaproofAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a chip of so many, 78: the H20's. On it depend how many blocks share out the tasks, and GEMM 2's tiles."""
    chip = api.require_device()
    if chip.sms < sms:
        pytest.skip(f"needs {sms} SMs, this chip has {chip.sms}")
    monkeypatch.setattr(api, "require_device", lambda index=None: replace(chip, sms=sms))
    case = Case(shape, sizes)
    made, wanted = problem(case)
    y, counts = run(adapter, case, made)
    assert_same(wanted.y, y, f"y on {sms} SMs")
    assert_same(wanted.stats, counts, "stats")


@pytest.mark.parametrize("masked", [0, 30])
@pytest.mark.parametrize("shape, sizes", RECYCLING.values(), ids=RECYCLING)
def test_these_batches_fill_the_smallest_ring_more_than_once(shape: Shape, sizes: tuple[int, ...], masked: int) -> None:
    case = Case(shape, sizes, masked=masked)
    topk_idx = torch.cat([idx.flatten() for idx in inputs.make(case).topk_idx])
    rows = torch.bincount(topk_idx[topk_idx >= 0], minlength=shape.experts)
    assert max(int(own.sum()) for own in (-(-rows // BLOCK_M)).chunk(case.ranks)) > LEAST


@pytest.mark.gpu
@pytest.mark.parametrize("shape, sizes", RECYCLING.values(), ids=RECYCLING)
def test_the_memory_for_activations_changes_nothing(shape: Shape, sizes: tuple[int, ...]) -> None:
    """A full ring, whose stages test_moe.py compares, and rings whose places are taken again and again."""
    case = Case(shape, sizes, masked=30)
    made, wanted = problem(case)
    assert recycled(wanted, LEAST)
    slots = None
    for ring_blocks in (None, LEAST, LEAST + 1, 3 * GROUP_BLOCKS, RING_BLOCKS):
        with closing(MegaproofAdapter(ring_blocks)) as adapter:
            y, counts = run(adapter, case, made)
            assert adapter.buffer is not None
            ring, pool = adapter.buffer.problem.ring_blocks, adapter.buffer.problem.pool_blocks
            assert ring == min(pool, ring_blocks or pool)
            assert_same(wanted.y, y, f"y with {ring_blocks} blocks")
            assert_same(wanted.stats, counts, "stats")
            found = adapter.stages()["slots"]
            slots = found if slots is None else slots
            same(f"slots with {ring_blocks} blocks", slots, found)


# --- memory around it -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(TOKENS,), UNEVEN], ids=["r1", "r8"])
def test_nothing_else_is_written(sizes: tuple[int, ...], adapter: MegaproofAdapter) -> None:
    """Inputs and weights stay; so do guards around y, and the rows of every view that this batch does not use.

    What lies behind T tokens would be seen if it were read: valid experts, NaN rows and scales.
    """
    case = Case(SMOKE, sizes, masked=30)
    made, wanted = problem(case)
    capacity = 2 * max(sizes)
    zeros = [[part.new_zeros(capacity, part.shape[1]) for part in parts] for parts in made.arguments()[:4]]
    prepare(adapter, case, Inputs(*zeros, made.weights))  # makes the buffer, twice as large as the case needs
    assert adapter.buffer is not None
    ranks = [adapter.buffer.rank(r) for r in range(case.ranks)]
    for views in ranks:
        views.x.view(torch.uint8).fill_(NAN)
        views.x_sf.fill_(float("nan"))
        views.topk_idx.zero_()
        views.topk_weights.fill_(float("nan"))
    prepare(adapter, case, made)
    adapter.fill(GUARD)
    h = case.shape.hidden
    guarded = [
        torch.full((tokens + 2 * GUARD_ROWS, 2 * h), GUARD, dtype=torch.uint8, device=CUDA).view(torch.bfloat16)
        for tokens in sizes
    ]
    adapter.outputs = [around[GUARD_ROWS : GUARD_ROWS + t] for around, t in zip(guarded, sizes, strict=True)]

    names = ("x", "x_sf", "topk_idx", "topk_weights")
    read = [getattr(views, name) for views in ranks for name in names]
    read += [tensor for layer in adapter.weights for pair in layer for tensor in pair]
    before = [raw(tensor) for tensor in read]
    digest = made.sha256()
    adapter.launch()

    assert all(torch.equal(raw(tensor), old) for tensor, old in zip(read, before, strict=True)), "an input has changed"
    assert made.sha256() == digest
    assert_same(wanted.y, adapter.y(), "y")
    assert_same(wanted.stats, adapter.stats(), "stats")
    for rank, (views, around, tokens) in enumerate(zip(ranks, guarded, sizes, strict=True)):
        used = sum(aligned(rows, BLOCK_M) for rows in wanted.stats[rank].tolist())
        unused = {"y's front guard": around[:GUARD_ROWS], "y's back guard": around[GUARD_ROWS + tokens :]}
        unused |= {"slots": views.slots[:, tokens:]} | {name: getattr(views, name)[used:] for name in POOL_STAGES}
        for name, tensor in unused.items():
            assert tensor.numel(), f"{name} has no unused row: the test checks nothing"
            assert bool((raw(tensor) == GUARD).all()), f"{name} of rank {rank} was written outside of its rows"


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "delay",
    [delay if i < 3 else pytest.param(delay, marks=pytest.mark.gpu) for i, delay in enumerate(DELAYS)],
    ids=lambda delay: delay.id,
)
def test_a_build_with_a_late_role_passes_the_gate(delay: Delay) -> None:
    """Three of them without a GPU, for the time that they take."""
    assert set(delayed.compile_delayed(delay).report.entries) == set(api.ENTRIES)


@pytest.mark.parametrize("delay", [*DELAYS, delayed.STUCK], ids=lambda delay: delay.id)
def test_a_delay_is_one_more_statement_in_the_sources(delay: Delay) -> None:
    text = delayed.source(delay)
    assert text.count(f" - late < {delay.microseconds}000u)") == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, sizes",
    [(SMOKE, (TOKENS,)), RECYCLING["smoke-r1"], RECYCLING["crowded-r8"]],
    ids=["short", "smoke-r1", "crowded-r8"],
)
@pytest.mark.parametrize("delay", DELAYS, ids=lambda delay: delay.id)
def test_late_roles_change_nothing(
    delay: Delay, shape: Shape, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the smallest ring. Three launches in a row: what one leaves behind too late, the next one finds."""
    used = []
    monkeypatch.setattr(api, "_library", lambda _: used.append(delay) or delayed.library(delay))
    case = Case(shape, sizes, masked=30)
    made, wanted = problem(case)
    assert recycled(wanted, LEAST) == (sizes != (TOKENS,))
    with closing(MegaproofAdapter(LEAST)) as adapter:
        prepare(adapter, case, made)
        for launch in range(3):
            adapter.fill(NAN)
            adapter.launch()
            assert_same(wanted.y, adapter.y(), f"y of launch {launch}")
        assert_same([3 * counts for counts in wanted.stats], adapter.stats(), "stats")
    assert used == [delay] * 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, sizes, ring_blocks",
    [
        (SMOKE, (TOKENS,), None),
        (SMOKE, UNEVEN, None),
        (LOCAL, (TOKENS,), None),
        *((*batch, LEAST) for batch in RECYCLING.values()),
    ],
    ids=["smoke-r1", "smoke-r8", "flash-r1", *(f"recycled-{name}" for name in RECYCLING)],
)
def test_a_thousand_repeats_are_equal(shape: Shape, sizes: tuple[int, ...], ring_blocks: int | None) -> None:
    """Launches follow one another without a pause; they are counted on the device."""
    case, repeats = Case(shape, sizes), 1000
    made, wanted = problem(case)
    expected = torch.cat(wanted.y).view(torch.int16)
    different = torch.zeros((), dtype=torch.int64, device=CUDA)
    with closing(MegaproofAdapter(ring_blocks)) as adapter:
        prepare(adapter, case, made)
        for _ in range(repeats):
            for y in adapter.outputs:
                y.view(torch.uint8).fill_(NAN)
            enqueue(adapter, case)
            different += (torch.cat(adapter.outputs).view(torch.int16) != expected).any()
        assert adapter.buffer is not None
        adapter.buffer.check()
        print(f"{shape.name}, {case.ranks} ranks: {int(different)} of {repeats} differ")
        assert int(different) == 0
        assert_same([repeats * counts for counts in wanted.stats], adapter.stats(), "stats")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(TOKENS,), (65, 64, 33, 7, 1, 128, 129, 2)], ids=["r1", "r8"])
def test_a_cuda_graph_replays_with_other_inputs(sizes: tuple[int, ...], adapter: MegaproofAdapter) -> None:
    case, replays = Case(SMOKE, sizes, masked=30), 100
    made, wanted = problem(case)
    prepare(adapter, case, made)
    adapter.launch()  # loads the kernel: a capture may not
    assert adapter.buffer is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue(adapter, case)
    for replay in range(replays):
        adapter.fill(NAN)
        for rank, tokens in enumerate(sizes):
            views = adapter.buffer.rank(rank)
            for name in ("x", "x_sf", "topk_idx", "topk_weights"):
                source = getattr(made, name)[rank]
                getattr(views, name).view(source.dtype)[:tokens] = source.roll(replay, 0)
        graph.replay()
        adapter.buffer.check()
        assert_same([rows.roll(replay, 0) for rows in wanted.y], adapter.y(), f"y of replay {replay}")
    assert_same([(replays + 1) * counts for counts in wanted.stats], adapter.stats(), "stats")
