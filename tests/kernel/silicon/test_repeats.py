"""A launch that is repeated, eagerly or by a CUDA graph, gives the same bits of y."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from megaproof.proof.guards import GuardedAdapter
from megaproof.quant.shapes import Shape
from megaproof.tests.support.invariance import (
    CUDA,
    LEAST,
    LOCAL,
    NAN,
    RECYCLING,
    SMOKE,
    TOKENS,
    UNEVEN,
    Tally,
    assert_same,
    case_of,
    enqueue,
    per_granularity,
    prepare,
    problem,
)


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
