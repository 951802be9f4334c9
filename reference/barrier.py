"""Waiting for others: the barriers of all thread blocks of all ranks, as state machines. Predicts kernel/barrier.cuh.

A thread block is a generator that pauses before each access to memory that others see; the caller that resumes the
generators decides the interleaving. Memory is sequentially consistent here, and there is no time limit: the model
proves the counting, but not the fences.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

Steps = Generator[None, None, None]
U32 = 1 << 32
FLIP = 1 << 31
"""The bit of `arrived` that `sync_ctas` flips."""


@dataclass
class Counters:
    """The barrier counters of one rank, u32 each: `Workspace` of kernel/params.cuh, and the rank counter."""

    arrived: int = 0
    """Thread blocks that have arrived at the barrier under way; between barriers 0 or FLIP, which sync_ctas flips."""
    rank_epoch: int = 0
    """Barriers at which this rank has announced itself to the others."""
    rank_counter: int = 0
    """Announcements that came from all ranks, this one included."""


def reached(seen: int, expected: int) -> bool:
    """Returns whether a u32 counter that only grows has reached `expected`; a peer may be one barrier ahead."""
    return (seen - expected) % U32 < U32 // 2


def num_arrivals(arrived: int, blocks: int) -> int:
    """Returns how many thread blocks of a rank have arrived at the barrier under way, of either kind, by `arrived`."""
    low = arrived % FLIP
    return low if low <= blocks else low - (FLIP - blocks)


def spin(done: Callable[[], bool]) -> Steps:
    """Reads until done() is true."""
    yield
    while not done():
        yield


def sync_ranks(ranks: Sequence[Counters], rank: int, blocks: int, publish: Callable[[], Steps]) -> Steps:
    """The barrier of all thread blocks of all ranks, as one block of `rank` runs it.

    The block of a rank that arrives last runs `publish`, then announces its rank to the others.
    """
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
    """The barrier of all thread blocks of the only rank, as one of them runs it: all together add FLIP to `arrived`."""
    yield
    before = own.arrived
    own.arrived = (before + (FLIP - (blocks - 1) if block == 0 else 1)) % U32
    yield from spin(lambda: bool((own.arrived ^ before) & FLIP))
