"""Mutants of the judge: each is a change of one place, and the question beside it has to see it.

A check that no mutant can make fail is no check. The module is made again from its edited source, in this process.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megaproof.proof.record import Record
from megaproof.reference.stages import STAGES


def edited(name: str, old: str = "", new: str = "") -> ModuleType:
    """The module, from its source with one place changed."""
    spec = importlib.util.find_spec(name)
    source = Path(spec.origin).read_text(encoding="utf-8")
    assert not old or source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {name}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], before = module, sys.modules.get(name)  # dataclasses look themselves up there
    try:
        exec(compile(source.replace(old, new) if old else source, spec.origin, "exec"), vars(module))
    finally:
        sys.modules[name] = before
    return module


def differs(compare: ModuleType, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `same` says that they differ."""
    try:
        compare.same("y", a, b)
    except compare.Differs:
        return True
    return False


def sees_signs(compare: ModuleType) -> bool:
    return differs(compare, torch.tensor([0.0]), torch.tensor([-0.0]))


def sees_types(compare: ModuleType) -> bool:
    return differs(compare, torch.zeros(2, dtype=torch.int16), torch.zeros(2, dtype=torch.bfloat16))


def sees_shapes(compare: ModuleType) -> bool:
    return differs(compare, torch.zeros(1, 4), torch.zeros(4))


def sees_nan(compare: ModuleType) -> bool:
    return not differs(compare, torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def record(**changes: object) -> Record:
    options = {"require_gpu": False, "kernel": "k:m", "ranks": [8]}
    return Record(options=options, compared=1, kernel_proofs=1, on_cases=1, **changes)


def nothing_is_unproven(verdicts: ModuleType) -> bool:
    return not verdicts.unproven(record()) and bool(verdicts.unproven(Record(options=record().options)))


def a_kernel_is_asked_for(verdicts: ModuleType) -> bool:
    found = record(kernel_named=True)
    found.kernel_proofs = 0
    return "No proof of --kernel" in verdicts.unproven(found)


def ranks_are_asked_for(verdicts: ModuleType) -> bool:
    found = record(dropped=3)
    found.on_cases = 0
    return "No case of --ranks" in verdicts.unproven(found)


def unclaimed_is_unproven(verdicts: ModuleType) -> bool:
    found = record(skips={"not claimed by k: all": 2})
    found.options["require_gpu"], found.kernel_proofs = True, 0
    return "does not claim" in verdicts.unproven(found)


def calls_have_to_agree(verdicts: ModuleType) -> bool:
    attempts = verdicts.Attempts()
    attempts.add(SimpleNamespace(nodeid="a", when="call", outcome="failed"))
    return attempts.disagree(SimpleNamespace(nodeid="a", when="call", outcome="passed"))


def a_setup_that_failed_is_remembered(verdicts: ModuleType) -> bool:
    attempts = verdicts.Attempts()
    attempts.add(SimpleNamespace(nodeid="a", when="setup", outcome="failed"))
    return attempts.disagree(SimpleNamespace(nodeid="a", when="call", outcome="passed"))


def tallies_add_up(tally: ModuleType) -> bool:
    for _ in range(2):
        tally.add("k", {"y": 3}, 1)
    taken = tally.take()
    return taken == {"k": {"launches": 2, "y": 6}} and not tally.take() and set(tally.element_bytes()) == set(STAGES)


def other_ranks_are_dropped(selection: ModuleType) -> bool:
    items = [SimpleNamespace(callspec=SimpleNamespace(params={"case": SimpleNamespace(ranks=r)})) for r in (1, 8)]
    items += [SimpleNamespace()]
    wrapped = [type("Item", (), {**vars(item), "__hash__": object.__hash__})() for item in items]
    dropped = selection.drop_other_ranks(wrapped, frozenset({8}))
    return [item.callspec.params["case"].ranks for item in dropped] == [1] and len(wrapped) == 2


def integers_see_a_bit(exact: ModuleType) -> bool:
    wanted = exact.Exact([torch.tensor([0, -1])], torch.tensor([0, 2]), torch.tensor([[1, 2]], dtype=torch.int16))
    y = torch.tensor([[1, 9, 2], [0, 0, 0]], dtype=torch.int16).view(torch.bfloat16)
    counted = wanted.compare([y])
    y.view(torch.int16)[0, 2] = 3
    try:
        wanted.compare([y])
    except exact.Differs:
        return counted == 2
    return False


def only_zero_told_is_zero(session: ModuleType) -> bool:
    ends = [session.End(0, None, ""), session.End(0, 1, ""), session.End(3, 0, ""), session.End(-9, 0, "")]
    return [end.exit_status for end in ends] == [1, 1, 3, 1] and session.End(0, 0, "").exit_status == 0


@dataclass(frozen=True)
class Mutant:
    module: str
    old: str
    new: str
    question: Callable[[ModuleType], bool]


COMPARE, VERDICTS, EXACT = "megaproof.cases.compare", "megaproof.proof.verdicts", "megaproof.proof.exact"
MUTANTS = [
    Mutant(COMPARE, "wrong = bits(expected) != bits(actual)", "wrong = expected != actual", sees_signs),
    Mutant(COMPARE, "wrong = bits(expected) != bits(actual)", "wrong = expected != actual", sees_nan),
    Mutant(COMPARE, "expected.dtype != actual.dtype or ", "", sees_types),
    Mutant(COMPARE, " or expected.shape != actual.shape", "", sees_shapes),
    Mutant(VERDICTS, "if not record.compared:", "if False:", nothing_is_unproven),
    Mutant(VERDICTS, "if record.kernel_named and not record.kernel_proofs:", "if False:", a_kernel_is_asked_for),
    Mutant(VERDICTS, "if record.dropped and not record.on_cases:", "if False:", ranks_are_asked_for),
    Mutant(VERDICTS, "unclaimed and not record.kernel_proofs:", "False:", unclaimed_is_unproven),
    Mutant(
        VERDICTS, ".get(report.nodeid, set()) - {report.outcome}", ".get(report.nodeid) is None", calls_have_to_agree
    ),
    Mutant(VERDICTS, ' or report.outcome not in ("passed", "skipped")', "", a_setup_that_failed_is_remembered),
    Mutant("megaproof.proof.tally", "    _found.clear()\n", "", tallies_add_up),
    Mutant(
        "megaproof.proof.tally", "dict(Counter(into.get(kernel, {})) + Counter(counts))", "dict(counts)", tallies_add_up
    ),
    Mutant("megaproof.proof.selection", "case.ranks not in ranks", "case.ranks in ranks", other_ranks_are_dropped),
    Mutant(EXACT, "(row >= 0)", "(row > 0)", integers_see_a_bit),
    Mutant(
        EXACT, "wrong = (expected != found).nonzero()", "wrong = (expected != expected).nonzero()", integers_see_a_bit
    ),
    Mutant("megaproof.proof.session", "return self.status or (", "return 0 and (", only_zero_told_is_zero),
    Mutant("megaproof.proof.session", "            return DIED\n", "            return 0\n", only_zero_told_is_zero),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.module.rpartition('.')[2]}: {mutant.old}")
def test_a_mutant_of_the_judge_is_seen(mutant: Mutant) -> None:
    assert mutant.question(edited(mutant.module)), "the judge as it is"
    try:
        seen = not mutant.question(edited(mutant.module, mutant.old, mutant.new))
    except Exception:  # a mutant that can't go on is seen as well
        seen = True
    assert seen
