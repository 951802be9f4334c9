"""Every deliberately wrong kernel is convicted, by the check that is there for it; what tolerances say is beside."""

from __future__ import annotations

import json

import pytest
import torch

from megaproof.cases import inputs
from megaproof.proof import __main__ as cli
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.reference import ReferenceAdapter
from megaproof.proof.faults import adapters, catalogue
from megaproof.proof.prove import Proof, prove
from megaproof.reference.stages import SHOWN, STAGES
from megaproof.tests.support import command_line


@pytest.mark.parametrize("fault", catalogue.of("adapter"), ids=lambda fault: fault.id)
def test_a_wrong_kernel_is_convicted_by_its_check(
    fault: catalogue.Fault, record_property: pytest.RecordProperty
) -> None:
    verdict = adapters.judge(fault.id)
    record_property("convicted_by", verdict.convicted_by)
    record_property("calc_diff", verdict.calc_diff)
    record_property("tolerances_that_pass", [limit for limit, passed in verdict.passes.items() if passed])
    print(f"{fault.id}: {verdict}")
    assert verdict.convicted_by == verdict.expected == fault.convicted_by


def test_a_right_kernel_is_not_convicted() -> None:
    """Else the table would convict for being there: the same adapter without its fault, through the same proof."""
    prepared = Prepared(adapters.CASE, inputs.make(adapters.CASE), torch.device("cpu"))
    proof = prove(ReferenceAdapter(), prepared, adapters.truth())
    assert isinstance(proof, Proof)
    assert proof.launches == 3
    assert proof.shown == SHOWN
    assert proof.not_shown == ()
    one_launch = sum(adapters.truth().trace[name].numel() for name in STAGES)
    assert 2 * one_launch < proof.elements < 3 * one_launch  # the third batch is smaller


def test_the_noise_is_what_its_name_says() -> None:
    """The cosine of public tests can't see it, by a factor of a hundred: it lies below 1e-4, they compare with 0.01."""
    verdict = adapters.judge("noise that keeps the cosine")
    assert 0 < verdict.calc_diff < 1e-4
    assert all(verdict.passes.values())


def test_what_tolerances_miss() -> None:
    """Most of them pass calc_diff < 0.01: y is wrong beyond doubt, or right beside other results that are wrong."""
    passed = {name for name in adapters.WRONG if adapters.judge(name).passes["calc_diff < 0.01"]}
    assert {"two rows swapped", "1 % of the rows zero", "last expert dropped", "masked slots counted"} <= passed
    assert not {"zeros", "stale y", "NaN everywhere", "rank 0's answer everywhere"} & passed


def test_the_table_is_printed_both_ways() -> None:
    status, output = command_line.invoke(cli.app, "wrong")
    assert status == 0
    table = output.splitlines()
    assert table[0].startswith("| wrong kernel | convicted by | calc_diff |")
    assert len(table) == 2 + len(adapters.WRONG)
    status, output = command_line.invoke(cli.app, "wrong", "--json")
    assert status == 0
    rows = json.loads(output)
    assert [row["kernel"] for row in rows] == list(adapters.WRONG)
    assert command_line.invoke(cli.app, "wrong", "--yaml")[0] == 2
