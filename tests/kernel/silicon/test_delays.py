"""A role that is late changes no bit of y, with 64 and with 128 columns a scale, which are two kernels.

Every launch that is waited for leaves the guards of proof/guards.py.
"""

from __future__ import annotations

import functools
from contextlib import closing

import pytest

from megaproof.kernel.programs import moe
from megaproof.proof.faults import delays
from megaproof.proof.faults.delays import DELAYS, Delay
from megaproof.proof.guards import GuardedAdapter
from megaproof.quant.shapes import Shape
from megaproof.tests.support.invariance import (
    LEAST,
    NAN,
    RECYCLING,
    SMOKE,
    TOKENS,
    Tally,
    assert_same,
    case_of,
    per_granularity,
    prepare,
    problem,
    recycled,
)


@per_granularity
def test_a_build_with_every_role_late_passes_the_gate(granularity: int) -> None:
    """One build has all waits at once, which a machine without a GPU can afford to compile."""
    every = functools.reduce(lambda program, delay: program.edited(delay.change), DELAYS, moe.moe(granularity))
    assert set(every.compile().report.entries) == set(moe.ENTRIES)


@pytest.mark.gpu
@per_granularity
@pytest.mark.parametrize("delay", DELAYS, ids=lambda delay: delay.id)
def test_a_build_with_a_late_role_passes_the_gate(delay: Delay, granularity: int) -> None:
    """Where they are launched; `python -m proof delays` builds them all anywhere."""
    assert set(delays.program(delay, granularity).compile().report.entries) == set(moe.ENTRIES)


@per_granularity
@pytest.mark.parametrize("delay", [*DELAYS, delays.STUCK, delays.ABSENT], ids=lambda delay: delay.id)
def test_a_delay_is_one_more_statement_in_the_sources(delay: Delay, granularity: int) -> None:
    text = delays.program(delay, granularity).text()
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
