"""Waiting for others: the meeting of all blocks of all ranks as a state machine. Predicts kernel/barrier.cuh.

A block is a generator that pauses before each access to memory that others see; whoever resumes the generators decides
the interleaving. Memory is sequentially consistent here: the model proves the counting, not the fences, and has no
time limit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

Steps = Generator[None, None, None]
U32 = 1 << 32
FLIP = 1 << 31
"""The bit of `arrived` that a meeting alone flips."""


@dataclass
class Counters:
    """Of one rank, u32 each: `Workspace` of kernel/params.cuh and the rank counter."""

    arrived: int = 0
    """Blocks of the rank in the meeting under way; between meetings 0 or FLIP, which each one alone changes."""
    rank_epoch: int = 0
    """Meetings that this rank has announced to the others."""
    rank_counter: int = 0
    """Announcements of all ranks, this one included."""


def reached(seen: int, expected: int) -> bool:
    """Whether a u32 counter that only grows has come to `expected`, or past it: a peer may be a meeting ahead."""
    return (seen - expected) % U32 < U32 // 2


def arrivals(arrived: int, blocks: int) -> int:
    """How many blocks of a rank have come to the meeting under way, of either kind, by its `arrived`."""
    low = arrived % FLIP
    return low if low <= blocks else low - (FLIP - blocks)


def spin(done: Callable[[], bool]) -> Steps:
    """Reads until done()."""
    yield
    while not done():
        yield


def sync_ranks(ranks: Sequence[Counters], rank: int, blocks: int, publish: Callable[[], Steps]) -> Steps:
    """A block of `rank` meets all blocks of all ranks; the last of a rank does `publish`, then speaks for its rank."""
    own = ranks[rank]
    yield
    expected = len(ranks) * (own.rank_epoch + 1) % U32
    yield
    own.arrived = (own.arrived + 1) % U32  # read, compared and written as one step: it is an atomic
    if own.arrived % FLIP == blocks:
        yield from publish()
        yield
        own.arrived = 0  # before the others may leave, and arrive again
        yield
        own.rank_epoch = (own.rank_epoch + 1) % U32
        for peer in ranks:
            yield
            peer.rank_counter = (peer.rank_counter + 1) % U32
    yield from spin(lambda: reached(own.rank_counter, expected))


def sync_ctas(own: Counters, block: int, blocks: int) -> Steps:
    """A block of the only rank meets the others, with nothing to publish: all together add FLIP to `arrived`."""
    yield
    before = own.arrived
    own.arrived = (before + (FLIP - (blocks - 1) if block == 0 else 1)) % U32
    yield from spin(lambda: bool((own.arrived ^ before) & FLIP))
