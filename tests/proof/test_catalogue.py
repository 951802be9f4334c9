"""The catalogue of planted faults: each once, in a room that exists, with the check that has to see it."""

from __future__ import annotations

from collections import Counter

import pytest

from megaproof.kernel import emulator
from megaproof.kernel.programs.moe import moe
from megaproof.proof.faults import adapters, catalogue, delays, source, source_order, source_values, traces
from megaproof.proof.faults.catalogue import CATALOGUE, NOTHING
from megaproof.proof.faults.delays import Delay
from megaproof.reference.stages import STAGES
from megaproof.tests.support.runs import ROOT
from megaproof.toolchain.errors import BuildError


def test_it_holds_what_every_carrier_has() -> None:
    changes = [fault.change for fault in CATALOGUE]
    carried = [
        *source_values.FAULTS,
        *source_order.FAULTS,
        *source_values.OVERWRITES,
        *(factory for factory, _ in adapters.WRONG.values()),
        *traces.PLANTS.values(),
        *delays.DELAYS,
        delays.STUCK,
        delays.ABSENT,
        *delays.LOST,
    ]
    assert changes == carried
    assert Counter((fault.carrier, fault.id) for fault in CATALOGUE).most_common(1)[0][1] == 1


def test_every_fault_names_what_convicts_it_and_where_it_comes_from() -> None:
    for fault in CATALOGUE:
        assert fault.convicted_by
        assert fault.origin in (source.PUBLIC, source.OURS)
        if fault.convicted_by == NOTHING:
            assert isinstance(fault.change, Delay)


@pytest.mark.parametrize("fault", catalogue.of("source"), ids=lambda fault: fault.id)
def test_the_place_of_a_fault_is_in_its_room_alone(fault: catalogue.Fault) -> None:
    (room,) = [ROOT / "kernel" / f"{fault.room}{end}" for end in (".cuh", ".cu") if fault.room + end in rooms()]
    assert room.read_text().count(fault.change.old) == 1
    changed = fault.change.change(moe().text())
    assert changed != moe().text()


def rooms() -> set[str]:
    return {path.name for path in (ROOT / "kernel").iterdir()}


def test_rooms_of_the_others() -> None:
    for fault in CATALOGUE:
        if fault.carrier == "trace":
            assert fault.room in STAGES
        elif fault.carrier == "adapter":
            assert fault.room in (*STAGES, "inputs", "written")
        elif fault.carrier == "delay" and isinstance(fault.change, Delay):
            assert f" {fault.room}(" in moe().text()


def test_a_place_that_is_not_there_or_twice_is_no_fault() -> None:
    for text in ("nothing", "here, and here"):
        with pytest.raises(BuildError, match="places read 'here'; a fault needs one"):
            source.replaced(text, "here", "there")
    absent = source.Source("x", "gemm", source.OURS, "text that no room has", "", "y")
    with pytest.raises(BuildError, match="0 places read"):
        emulator.source(change=absent.change)


def test_a_fault_is_found_by_its_name() -> None:
    assert catalogue.find("source", "weight-slot").room == "dispatch"
    with pytest.raises(KeyError, match="no fault 'weight-slot' is carried by trace"):
        catalogue.find("trace", "weight-slot")
