"""Measured results belong to the kernel sources they were measured on, and to the README that quotes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernel.bench import report
from kernel.bench.points import PEERS
from kernel.build import sources_sha256
from tests.meta.runs import ROOT

PATHS = sorted(report.RESULTS.glob("*.json"))
RUN = {"what", "device", "driver", "versions", "date", "rows"}
"""Keys of a result."""
POINT = {"preset", "T", "routing", "regime", "granularity", "us", "us_spread", "tflops", "hbm_gb_s", "share_floor"}
POINT |= {"share_read", "share_compute", "ratio_best"}
COLUMNS = dict.fromkeys(report.POINTS, POINT) | {
    "dense": {"group", "m", "n", "k", "us", "tflops", "cublaslt_us", "cublaslt_tflops"},
    "phases": {"preset", "T", "routing", "device", "us", "clock_mhz", "roles"},
}
KEYS = {"phases": {"scale", "cost", "rows"}}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_result_is_of_these_sources(path: Path) -> None:
    result = json.loads(path.read_text())
    assert result["sources_sha256"] == sources_sha256(), f"{path.name} is stale: measure again, or delete it"
    assert KEYS.get(path.stem, RUN) <= set(result)
    assert path.stem in COLUMNS, f"{path.name} is no result that the report knows"
    assert result["rows"]
    assert all(COLUMNS[path.stem] <= set(row) for row in result["rows"])
    assert result.get("complete", True), f"{path.name}: the run was cut short"
    assert not result.get("failed"), f"{path.name}: a point failed"


def test_the_sweep_has_every_column_of_the_tables() -> None:
    results = report.read(report.RESULTS)
    if results:
        points = {(row["preset"], row["T"]) for row in report.chosen(results, "sweep")}
        assert {(preset, tokens) for preset in PEERS["shapes"] for tokens in report.TOKENS} <= points


def test_the_readme_quotes_the_results() -> None:
    results = report.read(report.RESULTS)
    before, between, after = report.section((ROOT / "README.md").read_text())
    assert between == report.render(results), "python -m kernel report"
    assert report.drawn(results, report.RESULTS / report.PICTURE), "python -m kernel report"
    if not results:  # none is of these sources
        assert "No time of the kernel is quoted here" in between
        assert "TFLOP/s" not in before + after
