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


@dataclass
class Counters:
    """Of one rank, u32 each: `Workspace` of kernel/params.cuh and the rank counter. Only `arrived` is ever reset."""

    arrived: int = 0
    """Blocks of the rank in the meeting under way; 0 between meetings."""
    generation: int = 0
    """Meetings that this rank's blocks have left."""
    rank_epoch: int = 0
    """Meetings that this rank has announced to the others."""
    rank_counter: int = 0
    """Announcements of all ranks, this one included."""


def reached(seen: int, expected: int) -> bool:
    """Whether a u32 counter that only grows has come to `expected`, or past it: a peer may be a meeting ahead."""
    return (seen - expected) % U32 < U32 // 2


def spin(done: Callable[[], bool]) -> Steps:
    """Reads until done()."""
    yield
    while not done():
        yield


def meet_rank(own: Counters, blocks: int, last: Callable[[], Steps]) -> Steps:
    """One of a rank's `blocks` blocks meets the others; the one that arrives last does `last` before anyone leaves."""
    yield
    before = own.generation
    yield
    own.arrived += 1  # read, compared and written as one step: it is an atomic
    if own.arrived < blocks:
        yield from spin(lambda: own.generation != before)
        return
    yield from last()
    yield
    own.arrived = 0  # before the others may leave, and arrive again
    yield
    own.generation = (before + 1) % U32


def meet(ranks: Sequence[Counters], rank: int, blocks: int, publish: Callable[[], Steps]) -> Steps:
    """A block of `rank` meets all blocks of all ranks; the last of a rank does `publish`, then speaks for its rank."""
    own = ranks[rank]

    def speak() -> Steps:
        yield from publish()
        expected = len(ranks) * (own.rank_epoch + 1) % U32
        own.rank_epoch = (own.rank_epoch + 1) % U32
        for peer in ranks:
            yield
            peer.rank_counter = (peer.rank_counter + 1) % U32
        yield from spin(lambda: reached(own.rank_counter, expected))

    yield from meet_rank(own, blocks, speak)
