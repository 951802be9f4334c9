"""Adapters that skip, exit, lie or change their answers: the status of each kind (proof/faults/hostile.py)."""

from __future__ import annotations

import ctypes

import pytest
import torch

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.proof import adapters
from megaproof.proof.adapters import AdapterError, Prepared, taken
from megaproof.proof.divergence import find
from megaproof.proof.faults import hostile
from megaproof.proof.prove import LAUNCHES, prove
from megaproof.quant.shapes import Shape
from megaproof.reference.layer import moe_layer
from megaproof.tests.support import warm
from megaproof.tests.support.runs import ROOT, environment

CASE = Case(Shape("narrow", hidden=128, intermediate=128, experts=6, topk=2), (5, 3), masked=30)
ENDS_ITS_PROCESS = ("Exits", "ExitsAtClose", "ExitsAtExit")
BY_PYTEST = ("Exits", "ExitsAtClose", "ClaimsNothing")
"""Those whose status is pytest's to give; of the others, what the proof of the gate makes of them is enough."""


def status(name: str) -> tuple[int, str]:
    """(exit status, text) of the steps that the gate takes with `--kernel`."""
    made = inputs.make(CASE)
    expected = moe_layer(CASE.recipe, *made.arguments(), trace=True, experts=CASE.shape.experts)
    try:
        adapter = adapters.make(f"megaproof.proof.faults.hostile:{name}")
    except AdapterError as error:
        return 4, str(error)
    try:
        if reason := taken.claims(adapter, CASE.recipe):
            return 5, f"not claimed by {adapter.name}: {reason}"
        proof = prove(adapter, Prepared(CASE, made, torch.device("cpu")), expected, len(LAUNCHES))
        taken.asked(adapter.close)
    except Exception as error:
        return 1, f"{type(error).__name__}: {error}"
    return 0, str(proof)


@pytest.mark.parametrize("name", [name for name in hostile.HOSTILE if name not in ENDS_ITS_PROCESS])
def test_each_kind_has_its_status(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, replaced in ((find, "_differs"), (torch, "equal")):
        monkeypatch.setattr(place, replaced, getattr(place, replaced))  # put back after those that replace them
    wanted, says = hostile.HOSTILE[name]
    found, text = status(name)
    assert (found, says in text) == (wanted, True), text


@pytest.mark.parametrize("name", BY_PYTEST)
def test_the_gate_gives_it_that_status(name: str) -> None:
    wanted, says = hostile.HOSTILE[name]
    case = "tests/test_gate.py::TestCase::test_the_kernel_equals_the_reference[smoke-r2-t5-clamp10-fast1-zipf-mask30]"
    options = ["-p", "no:cacheprovider", "--no-header", "--kernel", f"megaproof.proof.faults.hostile:{name}"]
    run = warm.pytest_main(ROOT, [*options, case], environment())
    assert run.returncode == wanted, run.stdout + run.stderr
    assert says in run.stdout + run.stderr
    assert "\x1b[2J" not in run.stdout + run.stderr


def test_bytes_are_taken_past_what_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name in ((torch.Tensor, "cpu"), (torch.Tensor, "clone"), (torch.Tensor, "__ne__"), (torch, "equal")):
        monkeypatch.setattr(place, name, lambda *_: None)
    monkeypatch.setattr(ctypes, "string_at", lambda *_: b"")
    part = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert taken.raw(part.t()) == bytes([0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0])
    assert taken.raw([part[:1], part[1:]]) == bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0])
    assert taken.raw(torch.tensor([0.0])) != taken.raw(torch.tensor([-0.0]))
    assert taken.raw(torch.empty(0, 4)) == b""
