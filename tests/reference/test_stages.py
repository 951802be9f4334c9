"""The table of stages says what the trace is."""

from __future__ import annotations

import pytest

from megaproof.cases.cases import Case
from megaproof.cases.run import run_case
from megaproof.quant.recipe import RECIPES
from megaproof.quant.shapes import Shape
from megaproof.reference.stages import OUTPUTS, POOL_STAGES, SHOWN, STAGES
from megaproof.tests.support.house import tags
from megaproof.tests.support.runs import ROOT

SHAPE = Shape("narrow", hidden=384, intermediate=256, experts=4, topk=3)


@pytest.mark.parametrize("name", RECIPES)
def test_the_trace_is_as_the_table_says(name: str) -> None:
    """Under every recipe: format, rows and columns of each stage, and their order."""
    case = Case(SHAPE, (5, 2), RECIPES[name], masked=30)
    trace = run_case(case, "cpu").trace
    rows = {"slot": len(trace["rows"]), "token": sum(case.tokens), "expert": SHAPE.experts}
    assert list(trace) == [*STAGES, "rows"]
    for stage in STAGES.values():
        width = stage.width(SHAPE, case.recipe)
        expected = (rows[stage.rows], width) if stage.columns else (rows[stage.rows],)
        assert tuple(trace[stage.name].shape) == expected, stage.name
        assert trace[stage.name].dtype == stage.format(case.recipe).dtype, stage.name
        assert trace[stage.name].element_size() == stage.format(case.recipe).bytes, stage.name


def test_shown_stages_and_outputs_are_all_there_are() -> None:
    assert (*SHOWN, *OUTPUTS) == tuple(STAGES)
    assert set(POOL_STAGES) < set(SHOWN)
    assert OUTPUTS == ("y", "stats"), "the two that every adapter has a method for"


def test_equations_are_those_of_the_page() -> None:
    page = (ROOT / "reference" / "equations.md").read_text(encoding="utf-8")
    stated = tags([ROOT / "reference" / "equations.md"])
    for stage in STAGES.values():
        number = stage.equation.removeprefix("Eq. (").partition(")")[0]
        assert number in stated, stage.name
    order = ", ".join(f"`{name}`" for name in STAGES)
    assert f"The trace of a run is {order}, in this order." in page


def test_what_a_gemm_reads_has_its_scale_factors() -> None:
    """Each GEMM reads codes and their factors along the same dimension; nothing else has columns that share one."""
    for gemm in (1, 2):
        codes, factors = (stage for stage in STAGES.values() if stage.read_by == gemm)
        assert codes.covers is None
        assert factors.covers is not None
        assert codes.columns == factors.columns
    assert all(stage.covers is None for stage in STAGES.values() if stage.read_by is None)
    assert [name for name, stage in STAGES.items() if stage.is_of_y] == ["slots", "y"]
