"""The meeting under any interleaving: nobody leaves early, nobody stays behind, launch after launch, across 2^32."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaproof import HOME
from megaproof.reference import barrier
from megaproof.reference.barrier import FLIP, U32, Counters, Steps

ORDER = st.lists(st.tuples(st.integers(0, 11), st.integers(1, 5) | st.just(40)), max_size=60)
"""(block, steps that it runs alone), and so on; afterwards all blocks take turns."""


class Early(AssertionError):
    """A block left before all had arrived, or before all had published."""


class Hang(AssertionError):
    """Blocks wait for ever."""


def run(ranks: int, blocks: int, meetings: int, order: list[tuple[int, int]], before: int = 0) -> list[Counters]:
    """`meetings` in a row of all blocks of all ranks, the first after `before` others. Raises Early or Hang."""
    counters = [Counters(0, before % U32, ranks * before % U32) for _ in range(ranks)]
    arrived = [[0] * blocks for _ in range(ranks)]
    published = [0] * ranks

    def publish(rank: int) -> Steps:
        yield
        if min(arrived[rank]) <= published[rank]:
            raise Early(f"rank {rank} publishes {arrived}")
        published[rank] += 1

    def work(rank: int, block: int) -> Steps:
        for meeting in range(1, meetings + 1):
            yield
            arrived[rank][block] = meeting
            yield from barrier.sync_ranks(counters, rank, blocks, lambda: publish(rank))
            if min(map(min, arrived)) < meeting or min(published) < meeting:
                raise Early(f"block {block} of rank {rank} leaves meeting {meeting}: {arrived}, {published}")

    # In one round of turns everybody takes a step; a meeting takes fewer than this many for its longest chain.
    take_turns(
        [work(r, block) for r in range(ranks) for block in range(blocks)], order, meetings * (ranks + 12), counters
    )
    return counters


def take_turns(running: list[Steps | None], order: list[tuple[int, int]], rounds: int, shown: object) -> None:
    """As `order` says, then all in turn, `rounds` times. Raises Hang, showing `shown`, if somebody is not done."""

    def step(index: int) -> None:
        if (steps := running[index]) is not None and next(steps, True):  # a pause yields None
            running[index] = None

    for index, steps in order:
        for _ in range(steps):
            step(index % len(running))
    for _ in range(rounds):
        for index in range(len(running)):
            step(index)
    if any(running):
        raise Hang(f"{shown}")


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), ORDER)
def test_meetings_in_a_row_need_no_cleaning(
    ranks: int, blocks: int, meetings: int, order: list[tuple[int, int]]
) -> None:
    assert run(ranks, blocks, meetings, order) == [Counters(0, meetings, ranks * meetings)] * ranks


@pytest.mark.parametrize("ranks, blocks", [(1, 2), (1, 3), (2, 1), (2, 2)])
def test_every_pair_of_interruptions(ranks: int, blocks: int) -> None:
    """One block is stopped after each of its steps, then another one; then a third or the first runs until it waits."""
    everyone, stops = range(ranks * blocks), range(1, 13)
    for first, second, third in product(everyone, repeat=3):
        if first != second != third:
            for i, j in product(stops, repeat=2):
                run(ranks, blocks, 2, [(first, i), (second, j), (third, 40)])


@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 3), st.integers(1, 8), ORDER)
def test_counters_may_wrap_around(
    ranks: int, blocks: int, early: int, wraps: int, order: list[tuple[int, int]]
) -> None:
    """The rank counter wraps every 2^32 / ranks meetings, the others every 2^32."""
    before = max(0, U32 * wraps // ranks - early)
    after = before + 4
    expected = Counters(0, after % U32, ranks * after % U32)
    assert run(ranks, blocks, 4, order, before) == [expected] * ranks


@pytest.mark.parametrize(
    ("name", "reached", "before", "found"),
    [
        ("equal", lambda seen, expected: seen == expected, 0, Hang),  # a peer that is a meeting ahead is not seen
        ("unsigned", lambda seen, expected: seen >= expected, U32 // 2 - 1, Early),
        ("one short", lambda seen, expected: seen + 1 >= expected, 0, Early),
        ("strict", lambda seen, expected: seen > expected, 0, Hang),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_comparison_is_found(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    reached: Callable[[int, int], bool],
    before: int,
    found: type[AssertionError],
) -> None:
    monkeypatch.setattr(barrier, "reached", reached)

    @settings(max_examples=500)
    @given(ORDER)
    def any_order(order: list[tuple[int, int]]) -> None:
        run(2, 2, 3, order, before)

    with pytest.raises((Early, Hang)) as caught:
        any_order()
    assert caught.type is found, name


def test_a_block_that_stays_away_keeps_everyone() -> None:
    """All but one block of one rank run for long: none of them leaves."""
    counters, left = [Counters() for _ in range(3)], []

    def work(rank: int) -> Steps:
        yield from barrier.sync_ranks(counters, rank, 2, lambda: barrier.spin(lambda: True))
        left.append(rank)

    present = [work(rank) for rank in (0, 0, 1, 1, 2)]
    for _ in range(200):
        for steps in present:
            next(steps)
    assert left == []
    assert [own.arrived for own in counters] == [0, 0, 1]
    assert [own.rank_counter for own in counters] == [2, 2, 2]


def test_the_kernel_flips_the_same_bit() -> None:
    assert f"constexpr u32 kFlip = 1u << {FLIP.bit_length() - 1};" in (HOME / "kernel" / "barrier.cuh").read_text()


# --- a rank alone -----------------------------------------------------------------------------------------------------


def run_alone(blocks: int, meetings: int, order: list[tuple[int, int]], mixed: bool = False) -> Counters:
    """`meetings` of the blocks of one rank; mixed: every other one is the kind that publishes. Raises Early or Hang."""
    own = Counters()
    arrived = [0] * blocks

    def nothing() -> Steps:
        yield

    def work(block: int) -> Steps:
        for meeting in range(1, meetings + 1):
            yield
            arrived[block] = meeting
            alone = meeting % 2 or not mixed
            yield from barrier.sync_ctas(own, block, blocks) if alone else barrier.sync_ranks([own], 0, blocks, nothing)
            if min(arrived) < meeting:
                raise Early(f"block {block} leaves meeting {meeting}: {arrived}")

    take_turns([work(block) for block in range(blocks)], order, meetings * 13, own)
    return own


@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), ORDER)
def test_a_rank_alone_meets_itself(blocks: int, meetings: int, mixed: bool, order: list[tuple[int, int]]) -> None:
    """Also between meetings of the other kind, which leave `arrived` at 0 whatever it was."""
    own = run_alone(blocks, meetings, order, mixed)
    published = meetings // 2 if mixed else 0
    assert (own.rank_epoch, own.rank_counter) == (published, published)
    assert own.arrived == FLIP * (meetings % 2)


def test_every_pair_of_interruptions_of_a_rank_alone() -> None:
    for first, second, third in product(range(3), repeat=3):
        if first != second != third:
            for i, j in product(range(1, 9), repeat=2):
                run_alone(3, 3, [(first, i), (second, j), (third, 40)])


@given(st.permutations(range(6)), st.integers(1, 6), st.sampled_from([0, FLIP]))
def test_arrivals_are_counted_in_any_order(order: list[int], blocks: int, before: int) -> None:
    own = Counters(before)
    present = [block for block in order if block < blocks]
    for there, block in enumerate(present):
        assert barrier.num_arrivals(own.arrived, blocks) == there
        steps = barrier.sync_ctas(own, block, blocks)
        next(steps), next(steps)
    assert own == Counters(before ^ FLIP)
    assert barrier.num_arrivals(own.arrived, blocks) == 0


@pytest.mark.parametrize(("wrong", "found"), [(lambda blocks: FLIP - blocks, Hang), (lambda blocks: FLIP, Early)])
def test_a_wrong_part_of_the_first_block_is_found(
    wrong: Callable[[int], int], found: type[AssertionError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first block adds has to be what the others lack of the flip."""

    def meet(own: Counters, block: int, blocks: int) -> Steps:
        yield
        before = own.arrived
        own.arrived = (before + (wrong(blocks) if block == 0 else 1)) % U32
        yield from barrier.spin(lambda: bool((own.arrived ^ before) & FLIP))

    monkeypatch.setattr(barrier, "sync_ctas", meet)
    with pytest.raises(found):
        run_alone(3, 2, [])
