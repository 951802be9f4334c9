"""What a test has compared a kernel in, by stage, until its report takes it along. Counting needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

LAUNCHES = "launches"
"""Stands beside the stages."""
Tally = dict[str, dict[str, int]]
"""Kernel -> stage -> elements that were compared and equal, and launches."""

_found: Tally = {}


def add(kernel: str, compared: Mapping[str, int], launches: int) -> None:
    """Elements by stage that a kernel and the reference have in common, bit for bit."""
    merge(_found, {kernel: {LAUNCHES: launches, **compared}})


def take() -> Tally:
    """All since the last time."""
    taken = dict(_found)
    _found.clear()
    return taken


def merge(into: Tally, more: Tally) -> None:
    """Adds the counts of `more`."""
    for kernel, counts in more.items():
        into[kernel] = dict(Counter(into.get(kernel, {})) + Counter(counts))


def lines(tally: Tally) -> list[str]:
    """One a kernel: launches, bytes, elements by stage."""
    return [f"{kernel}: {_line(counts)}" for kernel, counts in tally.items()]


def element_bytes() -> dict[str, int]:
    """Bytes of an element of each stage, the same under every recipe that is built."""
    from megaproof.quant.recipe import Recipe  # here: the summary of a run without torch has nothing to count
    from megaproof.reference.stages import STAGES

    return {name: stage.format(Recipe()).bytes for name, stage in STAGES.items()}


def _line(counts: Mapping[str, int]) -> str:
    size_of = element_bytes()
    stages = {stage: counts[stage] for stage in size_of if counts.get(stage)}
    size = sum(size_of[stage] * count for stage, count in stages.items())
    named = ", ".join(f"{stage} {count:,}" for stage, count in stages.items())
    return f"{counts.get(LAUNCHES, 0):,} launches, {size:,} bytes, elements by stage: {named}; 0 differ"
