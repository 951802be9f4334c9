"""Every planted fault, in one list. A test that convicts faults takes them from here, so that none is left out.

A fault is carried by one of four: a change of the kernel's sources, an adapter that is wrong on purpose, an edit of a
traced stage, or a delay of one role. The carriers' modules hold what their faults are made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megaproof.proof.faults import adapters, delays, source, source_order, source_values, traces

Carrier = Literal["source", "adapter", "trace", "delay"]
NOTHING = "nothing"
"""What convicts a delay that is no fault: a right kernel is right however late a role is; a wrong one shows."""


@dataclass(frozen=True)
class Fault:
    """One planted fault."""

    id: str
    """Unique among the faults of its carrier."""
    room: str
    """What it changes: a file of kernel/, without its ending; a function, of a delay; a stage, of the others."""
    origin: str
    """Where it comes from: `source.PUBLIC` or `source.OURS`."""
    carrier: Carrier
    change: Any
    """What makes it: a `source.Source`, a factory of adapters, a `traces.Plant`, a `delays.Change`."""
    convicted_by: str
    """The check that has to see it, as the carrier's test compares it; NOTHING: none may."""


def _all() -> Iterator[Fault]:
    for own in (*source_values.FAULTS, *source_order.FAULTS, *source_values.OVERWRITES):
        yield Fault(own.id, own.room, own.origin, "source", own, own.check)
    for name, (factory, check) in adapters.WRONG.items():
        yield Fault(name, check.partition(" of ")[0], source.PUBLIC, "adapter", factory, check)
    for name, plant in traces.PLANTS.items():
        yield Fault(name, plant.stage, source.OURS, "trace", plant, ", ".join(sorted(plant.names)))
    for delay in (*delays.DELAYS, delays.STUCK, delays.ABSENT):
        late = "a timeout" if delay in (delays.STUCK, delays.ABSENT) else NOTHING
        yield Fault(delay.id, delay.function, source.OURS, "delay", delay, late)
    for lost in delays.LOST:
        yield Fault(lost.id, "barrier", source.OURS, "delay", lost, lost.says)


CATALOGUE: tuple[Fault, ...] = tuple(_all())


def of(carrier: Carrier) -> list[Fault]:
    """The faults of one carrier, in order."""
    return [fault for fault in CATALOGUE if fault.carrier == carrier]


def find(carrier: Carrier, id: str) -> Fault:
    """One fault. Raises KeyError for an id that the carrier has not."""
    for fault in of(carrier):
        if fault.id == id:
            return fault
    raise KeyError(f"no fault {id!r} is carried by {carrier}")
