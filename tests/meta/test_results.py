"""Measured results belong to the kernel sources they were measured on, and to the README that quotes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernel.build import FOLDER, sources_sha256
from tests.meta.runs import ROOT

RESULTS = sorted((FOLDER / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_is_of_these_sources(path: Path) -> None:
    result = json.loads(path.read_text())
    assert {"what", "device", "driver", "versions", "date", "rows"} <= set(result)
    columns = {
        "sweep": {"preset", "T", "routing", "us", "us_spread", "tflops", "hbm_gb_s", "share_floor", "granularity"}
    }
    columns["dense"] = {"group", "m", "n", "k", "us", "tflops", "cublaslt_us", "cublaslt_tflops"}
    assert all(columns.get(path.stem, set()) <= set(row) for row in result["rows"])
    assert result["sources_sha256"] == sources_sha256(), f"{path.name} is stale: measure again, or delete it"


def test_the_readme_quotes_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = {path.stem: json.loads(path.read_text())["rows"] for path in RESULTS}
    if not rows:  # none is of these sources
        assert "No time of the kernel is quoted here" in readme
        assert "TFLOP/s" not in readme
        return
    quoted = (1, 8, 32, 128, 512, 2048, 8192)
    for preset in ("dsv4_flash", "dsv4_pro"):
        points = {row["T"]: row for row in rows["sweep"] if (row["preset"], row["granularity"]) == (preset, 64)}
        for name, column, digits in (("us", "us", 0), ("of the best", "ratio_best", 2)):
            line = " | ".join(f"{points[tokens][column]:.{digits}f}" for tokens in quoted)
            assert f"| {preset}, {name} | {line} |" in readme
    worst = max(row["ratio_best"] for row in rows["sweep"] if row["ratio_best"])
    assert f"at most {worst:.2f} times" in readme
    best = {group: max(row["tflops"] for row in rows["dense"] if row["group"] == group) for group in (128, 64)}
    assert f"reaches {best[128]:,} TFLOP/s at 8192^3 and per 64 {best[64]:,}" in readme
