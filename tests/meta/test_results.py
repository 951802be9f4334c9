"""Measured results belong to the kernel sources they were measured on, and to the README that quotes them."""

from __future__ import annotations

import re

import pytest

from kernel.bench import report, results
from kernel.bench.points import PEERS
from kernel.bench.rows import COLUMNS, Point, row
from kernel.bench.timer import REGIMES
from kernel.bench.yardsticks import DENSE, READ
from kernel.build import sources_sha256
from kernel.roofline import Load
from quant.recipe import SHAPES
from tests.meta.runs import ROOT

LAST_DIGIT = {"tflops": 0.1, "tflops_adjusted": 0.1, "hbm_gb_s": 1, "reduction_us": 0.02}
"""Of what follows from a time that is rounded itself; of shares and ratios 0.001."""
GIVEN = {"us_spread", "clock_mhz", "power_w"}
"""What does not follow from the other columns."""


def test_the_results_are_whole_and_of_these_sources() -> None:
    """`read` refuses all others."""
    results.read(report.RESULTS)


@pytest.mark.parametrize("name", results.POINTS)
def test_what_is_derived_follows_from_the_times(name: str) -> None:
    """Rates, shares and ratios stand in a result beside the times, and what they follow from is no kernel source."""
    regimes = {text: key for key, text in REGIMES.items()}
    found = results.read(report.RESULTS).get(name, {"rows": []})["rows"]
    for own in found:
        shape = SHAPES[own["preset"]]
        load = Load(shape.hidden, shape.intermediate, own["T"], own["rows"], own["touched"], own["granularity"])
        point = Point(own["preset"], own["routing"], regimes[own["regime"]], load, own["clamp"], own["silu"])
        times = {"fused": own["us"], **{each: own[f"{each}_us"] for each in (READ, *DENSE.values())}}
        again = row(point, {each: [us, us] for each, us in times.items() if us is not None})
        for column in COLUMNS.keys() - GIVEN:
            value, wanted = own[column], again[column]
            if isinstance(wanted, int | float):
                wanted = pytest.approx(wanted, abs=1.01 * LAST_DIGIT.get(column, 0.001), rel=0)
            assert value == wanted, (own["preset"], own["T"], column)


def test_the_sweep_has_every_column_of_the_tables() -> None:
    found = results.read(report.RESULTS)
    if found:
        points = {(own["preset"], own["T"]) for own in results.chosen(found, "sweep")}
        assert {(preset, tokens) for preset in PEERS["shapes"] for tokens in report.TOKENS} <= points


def test_runs_that_the_readme_reports_are_of_these_sources() -> None:
    """Beside times it reports what passed on a GPU, with the digest's first digits: run again, or take it out."""
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"with sources `(\w+)`", readme)) <= {sources_sha256()[:12]}
    if "| the gate | `pytest" in readme:
        assert f"with sources `{sources_sha256()[:12]}`:" in readme


def test_the_readme_quotes_the_results() -> None:
    found = results.read(report.RESULTS)
    before, between, after = report.section((ROOT / "README.md").read_text())
    assert between == report.render(found), "python -m kernel report"
    assert report.drawn(found, report.RESULTS / report.PICTURE), "python -m kernel report"
    if not found:  # none is of these sources
        assert "No time of the kernel is quoted here" in between
        assert "TFLOP/s" not in before + after
