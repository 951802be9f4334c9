"""Builds of the kernel in which one role is late: the sources as they are, with a wait at the head of one function.

The shipped sources have no switch for it. Whatever a role does too early, because another one is usually fast enough,
shows as a wrong bit or as a timeout in one of these. `python -m tests.delayed` compiles them all ahead of the tests.
"""

from __future__ import annotations

import functools
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

from kernel import api, build
from kernel.config import GRANULARITIES, GROUP
from kernel.launch import Library

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


DELAYS = (
    Delay("pull", 200),
    Delay("producer_role", 100),
    Delay("math_role", 100),
    Delay("announce", 100),
    Delay("combine", 200),
    Delay("publish", 200, "r.rank % 2 == 1", "odd_ranks"),
    Delay("math_role", 50, "threadIdx.x >= 256", "one_warpgroup"),
    Delay("produce", 20, note="each_task"),
    Delay("scout_role", 100),
    Delay("wait_operands", 20, note="each_task"),
    Delay("pull_row", 20, "index % 4 == 1", "every_fourth_row"),
    # Operands are read late: who takes their place in the ring of pool blocks too early overwrites them.
    Delay("produce", 50, f"!task.l2 && {THIRD_OF_BLOCKS}", "gemm_1"),
    Delay("produce", 50, f"task.l2 && {THIRD_OF_BLOCKS}", "gemm_2"),
    # Tiles are finished late, in part: a counter that runs ahead of one warpgroup shows what is not there yet.
    Delay("requantise_tile", 20, "threadIdx.x >= 256", "one_warpgroup"),
    Delay("to_slot", 50, f"threadIdx.x >= 256 && {THIRD_OF_BLOCKS}", "one_warpgroup"),
)
STUCK = Delay("pull", 2_000_000, "blockIdx.x == 0", "first_block")
"""So late that whoever waits for it has to give up."""


def source(delay: Delay) -> str:
    """The kernel's sources, joined, with the wait in them."""
    text = build.joined(api.SOURCES)
    head = rf"\b(?:void|bool) {delay.function}\([^;{{}}]*\) \{{"
    found = len(re.findall(head, text))
    assert found == 1, f"{found} functions are called {delay.function}; one has to be"
    now = "static_cast<u32>(ptx::global_timer())"  # 4 s are enough, and the roles have no register to spare
    wait = f" if ({delay.where}) {{ const u32 late = {now}; while ({now} - late < {delay.microseconds}000u) {{}} }}"
    return re.sub(head, lambda match: match[0] + wait, text)


def compile_delayed(delay: Delay, granularity: int = GROUP) -> build.Built:
    """The gated cubin of a granularity. `api.compile_moe` makes it, so that all but the text is the kernel's own."""

    def build_late(_: object, *args: Any, **options: Any) -> build.Built:
        return build.build_text(source(delay), *args, **options)

    with mock.patch.object(build, "build", build_late):
        return api.compile_moe(granularity)


@functools.cache
def library(delay: Delay, granularity: int) -> Library:
    """With the delay given, what a test puts in the place of `api._library`; needs a GPU."""
    return Library(compile_delayed(delay, granularity).cubin)


def main() -> None:
    """Compiles every build, side by side, into the cache that the tests read."""
    builds = [(delay, granularity) for granularity in GRANULARITIES for delay in (*DELAYS, STUCK)]
    with ProcessPoolExecutor() as pool:
        for (delay, granularity), built in zip(
            builds, pool.map(compile_delayed, *zip(*builds, strict=True)), strict=True
        ):
            print(f"{delay.id}, g{granularity}: {built.sha256[:16]}{' (cached)' if built.cached else ''}")


if __name__ == "__main__":
    main()
