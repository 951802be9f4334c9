"""Every limit of every target from both sides, and where it begins and ends. No GPU.

That a miss is said with its value, and what was not measured, test_page.py compares on whole pages.
"""

from __future__ import annotations

from typing import Any

import pytest

from megaproof.bench.measure.rows import COLUMNS
from megaproof.bench.model.chips import H200
from megaproof.bench.report import derived, results
from megaproof.bench.report.targets import TARGETS, Target, verdict
from megaproof.tests.support import results_again
from megaproof.tests.support import targets_again as again

EPSILON = 0.0005
CUBE = {"m": 8192, "n": 8192, "k": 8192}


def one(text: str) -> Target:
    (target,) = (target for target in TARGETS if target.text == text)
    return target


@pytest.mark.parametrize("wanted", again.TARGETS, ids=lambda wanted: wanted[0])
def test_both_sides_of_a_limit(wanted: tuple[Any, ...]) -> None:
    """The limit itself is met and a little beyond is not; T before the first and after the last do not count."""
    text, result, column, side, limit, first, last, presets = wanted
    beyond = limit + (EPSILON if side == "<=" else -EPSILON)
    ends, presets_seen = {first - 1, first, last, last + 1}, (*results_again.SHAPES, "another")
    for value, met in ((limit, True), (beyond, False)):
        rows = [{"preset": preset, "T": t, column: value} for t in ends for preset in presets_seen]
        own = [row for row in rows if first <= row["T"] <= last and (presets is None or row["preset"] in presets)]
        found = verdict(one(text), {result: rows}, H200)
        assert (found.met, found.points) == (met * len(own), len(own))
    assert verdict(one(text), {"another": rows}, H200).points == 0, "it judges its own result"


@pytest.mark.parametrize(
    ("ours", "cublaslt", "met"),
    [(1298, 9999, True), (1297, 1323, True), (1297, 1324, False), (1262, 1466, False)],
    ids=["0.95 of DeepGEMM", "0.98 of cuBLASLt", "neither, closely", "neither"],
)
def test_the_main_loop_per_128(ours: int, cublaslt: int, met: bool) -> None:
    """DeepGEMM's rate of the cube is 1366."""
    rows = derived.dense([CUBE | {"group": 128, "tflops": ours, "cublaslt_tflops": cublaslt}], H200)
    found = verdict(
        one("main loop alone, per 128: at least 0.95 of DeepGEMM's or 0.98 of cuBLASLt's"), {"dense": rows}, H200
    )
    assert (found.met, found.points) == (int(met), 1)


@pytest.mark.parametrize(("ours", "met"), [(1180, True), (1179, False)])
def test_the_main_loop_per_64(ours: int, met: bool) -> None:
    """The plain kernel's rate of the cube is 1180."""
    rows = derived.dense([CUBE | {"group": 64, "tflops": ours, "cublaslt_tflops": 1}], H200)
    found = verdict(one("main loop alone, per 64: at least the plain kernel's"), {"dense": rows}, H200)
    assert (found.met, found.points) == (int(met), 1)


def test_the_targets_are_those_that_are_checked() -> None:
    assert [target.text for target in TARGETS if target.result != "dense"] == [text for text, *_ in again.TARGETS]
    for target in TARGETS:
        assert target.result in (*results.POINTS, "dense")
        known = derived.points([{"preset": "glm", "T": 1, "us": 1, "tflops": 1, "grouped_gemms": 1}], H200)[0]
        assert target.column in (derived.REFERENCES if target.result == "dense" else {*COLUMNS, *known})
