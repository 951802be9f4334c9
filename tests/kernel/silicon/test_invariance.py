"""What must not change a bit of the kernel's y, on silicon: batch, ranks, capacity, earlier launches, memory around it,
late roles, repetition, a CUDA graph; each with 64 and with 128 columns a scale, which are two kernels.

Every launch that is waited for leaves the guards of proof/guards.py. Each test says what it compared, by stage. The
layer's own properties, of the reference, are in test_invariance.py.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.cases.compare import same
from megaproof.cases.inputs import Inputs
from megaproof.kernel import api
from megaproof.kernel.host import plans
from megaproof.kernel.host.buffer import BufferSize
from megaproof.kernel.host.sizes import BLOCK_M, GRANULARITIES, GROUP_BLOCKS, RING_BLOCKS, aligned
from megaproof.kernel.programs import moe
from megaproof.proof import tally as compared
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.megaproof import MegaproofAdapter
from megaproof.proof.faults import delays
from megaproof.proof.faults.delays import DELAYS, Delay
from megaproof.proof.guards import GuardedAdapter, assert_nothing_else_is_written
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import SHAPES, Shape
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.tests.support import problems
from megaproof.toolchain.launch import require_device

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
NAN = 0xFF
MARGIN = 4 << 30
"""Bytes beside buffer, inputs and outputs: weights twice and what torch needs."""

per_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda granularity: f"g{granularity}")
Tally = Counter[str]
"""Stage -> elements compared."""


@pytest.fixture
def adapter() -> Iterator[GuardedAdapter]:
    adapter = GuardedAdapter()
    yield adapter
    adapter.close()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """What a test compared; printed at its end. A test that compared nothing has proven nothing."""
    tally: Tally = Counter()
    yield tally
    stages = ", ".join(f"{stage} {count:,}" for stage, count in sorted(tally.items()))
    print(f"{request.node.name}: {tally.total():,} elements: {stages}")


@pytest.fixture(scope="module", autouse=True)
def _no_problem_outlives_the_file() -> Iterator[None]:
    yield
    problem.cache_clear()
    problems.mixed_weights.cache_clear()


def case_of(shape: Shape, sizes: tuple[int, ...], granularity: int, masked: int = 0) -> Case:
    return Case(shape, sizes, Recipe(activation_granularity=granularity), masked=masked)


@functools.lru_cache(maxsize=8)
def problem(case: Case) -> tuple[Inputs, LayerResult]:
    """A case's inputs, with weights that the cases of its shape share, and the reference's result."""
    made = problems.make(case, CUDA)
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


def prepare(adapter: GuardedAdapter, case: Case, made: Inputs) -> None:
    """Every byte that the launch has to write is a NaN's before it."""
    adapter.prepare(Prepared(replace(case, tokens=tuple(map(len, made.x))), made, CUDA))
    adapter.fill(NAN)


def run(adapter: GuardedAdapter, case: Case, made: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """(y, stats) of one launch, by rank."""
    prepare(adapter, case, made)
    adapter.launch()
    return adapter.y(), adapter.stats()


def enqueue(adapter: GuardedAdapter, case: Case) -> None:
    """A launch that nobody waits for."""
    l1, l2 = zip(*adapter.weights, strict=True)
    assert adapter.buffer is not None
    api.fp8_mega_moe(adapter.outputs, l1, l2, adapter.buffer, adapter.counts, recipe=case.recipe)


def assert_same(
    tally: Tally, stage: str, wanted: Sequence[Tensor] | Tensor, found: Sequence[Tensor] | Tensor, when: str = ""
) -> None:
    """The same bits, of one tensor or of one a rank."""
    pairs = [(wanted, found)] if isinstance(wanted, Tensor) else zip(wanted, found, strict=True)
    for rank, (a, b) in enumerate(pairs):
        elements = same(f"{stage} of rank {rank}{when and f', {when}'}", a, b)
        tally[stage] += elements
        compared.add(MegaproofAdapter.name, {stage: elements}, 0)


# --- batch, ranks, capacity, earlier launches -------------------------------------------------------------------------


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
    for ring_blocks in (None, LEAST, LEAST + 1, 3 * GROUP_BLOCKS, RING_BLOCKS):
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


# --- memory around it -------------------------------------------------------------------------------------------------


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


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "delay, granularity",
    [
        pytest.param(delay, granularity, marks=() if i < (3 if granularity == 64 else 1) else pytest.mark.gpu)
        for granularity in GRANULARITIES
        for i, delay in enumerate(DELAYS)
    ],
    ids=lambda value: value.id if isinstance(value, Delay) else f"g{value}",
)
def test_a_build_with_a_late_role_passes_the_gate(delay: Delay, granularity: int) -> None:
    """Four of them without a GPU, for the time that they take; `python -m proof delays` builds them all."""
    assert set(delays.program(delay, granularity).compile().report.entries) == set(moe.ENTRIES)


@pytest.mark.parametrize("delay", [*DELAYS, delays.STUCK, delays.ABSENT], ids=lambda delay: delay.id)
def test_a_delay_is_one_more_statement_in_the_sources(delay: Delay) -> None:
    text = delays.program(delay).text()
    assert text.count(f" - late < {delay.microseconds}000u)") == 1


@pytest.mark.gpu
@per_granularity
@pytest.mark.parametrize(
    "shape, sizes",
    [(SMOKE, (TOKENS,)), RECYCLING["smoke-r1"], RECYCLING["crowded-r8"]],
    ids=["short", "smoke-r1", "crowded-r8"],
)
@pytest.mark.parametrize("delay", DELAYS, ids=lambda delay: delay.id)
def test_late_roles_change_nothing(
    delay: Delay,
    shape: Shape,
    sizes: tuple[int, ...],
    granularity: int,
    tally: Tally,
) -> None:
    """In the smallest ring. Three launches in a row: what one leaves behind too late, the next one finds."""
    used = []
    case = case_of(shape, sizes, granularity, masked=30)
    made, wanted = problem(case)
    assert recycled(wanted, LEAST) == (sizes != (TOKENS,))
    with closing(GuardedAdapter(LEAST)) as adapter:
        prepare(adapter, case, made)
        adapter.buffer.program = lambda asked: used.append(asked) or delays.program(delay, asked)
        for launch in range(3):
            adapter.fill(NAN)
            adapter.launch()
            assert_same(tally, "y", wanted.y, adapter.y(), f"launch {launch}")
        assert_same(tally, "stats", [3 * counts for counts in wanted.stats], adapter.stats())
    assert used == [granularity] * 3


@pytest.mark.gpu
@per_granularity
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
def test_a_thousand_repeats_are_equal(
    shape: Shape, sizes: tuple[int, ...], ring_blocks: int | None, granularity: int, tally: Tally
) -> None:
    """Launches follow one another without a pause; they are counted on the device.

    Where none of n differs, one in 3/n or more would have been seen with a chance of 95 % (the rule of three).
    """
    case, repeats = case_of(shape, sizes, granularity), 1000
    made, wanted = problem(case)
    expected = torch.cat(wanted.y).view(torch.int16)
    different = torch.zeros((), dtype=torch.int64, device=CUDA)
    with closing(GuardedAdapter(ring_blocks)) as adapter:
        prepare(adapter, case, made)
        for _ in range(repeats):
            for y in adapter.outputs:
                y.view(torch.uint8).fill_(NAN)
            enqueue(adapter, case)
            different += (torch.cat(adapter.outputs).view(torch.int16) != expected).any()
        assert adapter.buffer is not None
        adapter.buffer.check()
        adapter.assert_intact()
        print(f"{case.id}, ring {adapter.buffer.size.ring_blocks}: {rule_of_three(int(different), repeats)}")
        assert int(different) == 0
        tally["y"] += repeats * expected.numel()
        assert_same(tally, "stats", [repeats * counts for counts in wanted.stats], adapter.stats())


def rule_of_three(different: int, repeats: int) -> str:
    """What n repeats say of the probability p that a launch differs."""
    if different:
        return f"{different} of {repeats} differ"
    return f"0 of {repeats} differ, so p < 3/{repeats} = {3 / repeats:g} (95 % confidence)"


def test_the_rule_of_three() -> None:
    assert rule_of_three(0, 1000) == "0 of 1000 differ, so p < 3/1000 = 0.003 (95 % confidence)"
    assert rule_of_three(2, 1000) == "2 of 1000 differ"
    assert 0.049 < (1 - 3 / 1000) ** 1000 < 0.05, "the chance to see none if p were so large"


@pytest.mark.gpu
@per_granularity
@pytest.mark.parametrize("sizes", [(TOKENS,), (65, 64, 33, 7, 1, 128, 129, 2)], ids=["r1", "r8"])
def test_a_cuda_graph_replays_with_other_inputs(
    sizes: tuple[int, ...], granularity: int, adapter: GuardedAdapter, tally: Tally
) -> None:
    case, replays = case_of(SMOKE, sizes, granularity, masked=30), 100
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
        adapter.assert_intact()
        assert_same(tally, "y", [rows.roll(replay, 0) for rows in wanted.y], adapter.y(), f"replay {replay}")
    assert_same(tally, "stats", [(replays + 1) * counts for counts in wanted.stats], adapter.stats())
