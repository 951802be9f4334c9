"""Builds of the kernel in which one role is late, or waits for what never comes: the sources but for one place.

The shipped sources have no switch for it. Whatever a role does too early, because another one is usually fast enough,
shows as a wrong bit or as a timeout in one of these. `python -m proof delays` compiles them all ahead of the tests.
"""

from __future__ import annotations

import functools
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from megaproof.kernel.host.sizes import GRANULARITIES, GROUP
from megaproof.kernel.programs.moe import moe
from megaproof.toolchain.errors import BuildError
from megaproof.toolchain.program import Program

THIRD_OF_BLOCKS = "blockIdx.x % 3 == 1"
"""Neighbours of a late block are on time, so that the roles of several blocks drift apart."""


@dataclass(frozen=True)
class Delay:
    """A wait at the head of the one function of this name, where `where` (C++, in sight of its arguments) is true."""

    function: str
    microseconds: int
    where: str = THIRD_OF_BLOCKS
    note: str = ""
    """When or for whom, in words, where it is not once in a third of the blocks."""

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.function, self.note, f"{self.microseconds}us")))

    def change(self, text: str) -> str:
        """The sources with the wait in them. Raises BuildError unless they have one such function."""
        head = rf"\b(?:void|bool) {self.function}\([^;{{}}]*\) \{{"
        found = len(re.findall(head, text))
        if found != 1:
            raise BuildError(f"{found} functions are called {self.function}; one has to be")
        now = "static_cast<u32>(ptx::global_timer())"  # 4 s are enough, and the roles have no register to spare
        wait = f" if ({self.where}) {{ const u32 late = {now}; while ({now} - late < {self.microseconds}000u) {{}} }}"
        return re.sub(head, lambda match: match[0] + wait, text)


@dataclass(frozen=True)
class Lost:
    """An mbarrier expects more bytes than come; spins on counters have no limit, so who waits for it has to speak."""

    id: str
    bytes: str
    """Where the sources say how many."""
    says: str
    """Who waits for what."""

    def change(self, text: str) -> str:
        """The sources with 16 bytes more there. Raises BuildError unless there is one such place."""
        more = self.bytes.replace("bytes)", "bytes + 16)")
        unlimited = "ptx::global_timer() - start_ns > rank.params.barrier.timeout_ns) return"
        for place in (self.bytes, unlimited):
            if text.count(place) != 1:
                raise BuildError(f"the sources have {text.count(place)} places {place!r}; one has to be there")
        return text.replace(self.bytes, more).replace(unlimited, "false) return")


DELAYS = (
    Delay("pull", 200),
    Delay("producer_role", 100),
    Delay("math_role", 100),
    Delay("announce", 100),
    Delay("count_locally", 100),
    Delay("combine", 200),
    Delay("publish", 200, "rank.idx % 2 == 1", "odd_ranks"),
    Delay("math_role", 50, "threadIdx.x >= 256", "one_warpgroup"),
    Delay("produce", 20, note="each_task"),
    Delay("scout_role", 100),
    Delay("wait_operands", 20, note="each_task"),
    Delay("pull_row", 20, "row_idx % 4 == 1", "every_fourth_row"),
    # Operands are read late: who takes their place in the ring of pool blocks too early overwrites them.
    Delay("produce", 50, f"!task.is_gemm2 && {THIRD_OF_BLOCKS}", "gemm_1"),
    Delay("produce", 50, f"task.is_gemm2 && {THIRD_OF_BLOCKS}", "gemm_2"),
    # Tiles are finished late, in part: a counter that runs ahead of one warpgroup shows what is not there yet.
    Delay("requantise_tile", 20, "threadIdx.x >= 256", "one_warpgroup"),
    Delay("to_slot", 50, f"threadIdx.x >= 256 && {THIRD_OF_BLOCKS}", "one_warpgroup"),
)
STUCK = Delay("pull", 2_000_000, "blockIdx.x == 0", "first_block")
"""So late that whoever waits for it has to give up."""
ABSENT = Delay("count_locally", 2_000_000, "blockIdx.x == 1", "second_block")
"""The same before rows travel, of a rank that is alone: its other blocks are at the end of the launch by then."""
LOST = (
    Lost("row", "&staging.arrived, num_bytes)", "dispatch waited for the copy of a row"),
    Lost("stage", "&pipeline.full_barriers[at.stage_idx], stage_bytes)", "scout waited for tasks of its thread block"),
)
Change = Delay | Lost


@functools.cache
def program(change: Change, granularity: int = GROUP) -> Program:
    """The kernel of a granularity, changed. With the change given, what a test puts in the place of a buffer's
    `program`."""
    return moe(granularity).edited(change.change)


def delays_command() -> None:
    """Compiles every build, side by side, into the cache that the tests read."""
    builds = [(change, granularity) for granularity in GRANULARITIES for change in (*DELAYS, STUCK, ABSENT, *LOST)]
    with ProcessPoolExecutor() as pool:
        compiled = pool.map(Program.compile, [program(*own) for own in builds])
        for (change, granularity), built in zip(builds, compiled, strict=True):
            print(f"{change.id}, g{granularity}: {built.sha256[:16]}{' (cached)' if built.cached else ''}")
