"""Measured results belong to the code they were measured on, and to the pages that quote them.

That every figure of the page follows from the results is held by tests/bench/test_page.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from megaproof.bench import peers
from megaproof.bench.measure.points import PRESETS
from megaproof.bench.measure.rows import COLUMNS
from megaproof.bench.measure.yardsticks import DENSE, READ
from megaproof.bench.model.chips import CHIPS
from megaproof.bench.report import page, results, sections
from megaproof.kernel.programs import PINS
from megaproof.kernel.programs.moe import ENTRIES
from megaproof.tests.support import results_again as again
from megaproof.tests.support.runs import ROOT

LAST_DIGIT = {"tflops": 0.1, "tflops_adjusted": 0.1, "hbm_gb_s": 1, "reduction_us": 0.02}
"""Of what follows from a time that is rounded itself; of shares and ratios 0.001."""
FOLDERS = [chip.folder for chip in CHIPS.values() if (page.RESULTS / chip.folder).is_dir()]


def read(folder: str, name: str) -> dict[str, Any]:
    """A result; a test that asks for one that is not there has nothing to do."""
    found = results.read(page.RESULTS / folder)
    if name not in found:
        pytest.skip(f"{folder}/{name}.json: not measured with this code")
    return found[name]


def test_the_page_quotes_the_results() -> None:
    """And every result is whole, of this code and of the chip of its folder: `read_all` refuses all others."""
    found = results.read_all(page.RESULTS)
    before, between, after = page.section(page.PAGE.read_text())
    assert between == sections.render_all(found), "python -m bench report"
    for chip, own in found.items():
        assert page.drawn(own, page.RESULTS / chip.folder / sections.PICTURE), "python -m bench report"
    if not found:  # none is of this code
        assert between == sections.NOTHING
        assert "TFLOP/s" not in before + after


@pytest.mark.parametrize("name", results.POINTS)
def test_what_is_derived_follows_from_the_times(name: str) -> None:
    """Rates, shares and ratios stand in a result beside the times, and what they follow from is no kernel source."""
    for own in read("h200", name)["rows"]:
        wanted = again.columns(own, peers.PEERS["h200"])
        wanted |= {"clamp": 10.0, "silu": "fast", "differing": None if own["baseline_us"] is None else 0}
        for column, value in wanted.items():
            if isinstance(value, float):
                value = pytest.approx(value, abs=1.01 * LAST_DIGIT.get(column, 0.001), rel=0)
            assert own[column] == value, (own["preset"], own["T"], column)
        measured = {"preset", "T", "routing", "regime", "granularity", "us", "us_spread", "touched", "baseline_us"}
        measured |= {"read_us", *(f"{each}_us" for each in DENSE.values()), "clock_mhz", "power_w"}
        assert measured | set(wanted) == set(own) == set(COLUMNS), "a column is measured, or it is checked here"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_sweep_has_every_column_of_the_tables(folder: str) -> None:
    points = {(own["preset"], own["T"]) for own in again.kept({"sweep": read(folder, "sweep")}, "sweep")}
    assert {(preset, tokens) for preset in PRESETS for tokens in sections.TOKENS} <= points


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", results.COLUMNS)
def test_a_result_names_the_code_that_it_measured(folder: str, name: str) -> None:
    """Exactly: what is left out can change unseen, and what was not launched must not make a result stale."""
    found = read(folder, name)
    wanted: dict[str, set[str]] = {}
    for own in found["rows"]:
        if name == "dense":
            wanted.setdefault("dense", set()).add(f"dense_{own['group']}")
        elif name == "phases":
            wanted["phases"] = {"moe_fast"}
        else:
            fused = {64: "moe", 128: "moe_g128"}[own["granularity"]]
            wanted.setdefault(fused, set()).add(f"moe_{own['silu']}")
            beside = {column: own[f"{column}_us"] is not None for column in (READ, *DENSE.values())}
            if beside.pop(READ):
                wanted["stream"] = {"stream_read"}
            for entry in (entry for entry, ran in beside.items() if ran):
                wanted.setdefault("dense", set()).add(entry)
    assert {target: set(own) for target, own in found["code"].items()} == wanted


@pytest.mark.parametrize("folder", FOLDERS)
def test_phases_of_math_warpgroup_0_add_up_to_the_launch(folder: str) -> None:
    """They are an SM's time, of which launch and ramp, that no mark sees, are at most a tenth."""
    found = read(folder, "phases")["rows"]
    assert [(own["preset"], own["routing"], own["T"]) for own in found] == [
        ("dsv4_flash", "folded", tokens) for tokens in (1, 8, 128, 1024, 8192)
    ]
    for own in found:
        assert 0.9 * own["us"] < sum(phase["mean"] for phase in own["roles"]["math 0"].values()) <= own["us"]


def test_runs_that_are_reported_are_of_this_code() -> None:
    """Beside times it reports what passed on a GPU, with the digests' first digits: run again, or take it out."""
    proven = " ".join((ROOT / "docs" / "proven.md").read_text().split())
    code = [PINS.code()[target][entry][:12] for target in ("moe", "moe_g128") for entry in ENTRIES]
    quoted = [re.findall(r"`([0-9a-f]{12})`", text) for text in re.findall(r"with code ([^:|]+):", proven)]
    assert all(digits == code for digits in quoted)
    if "| the gate, scales per 64 and per 128: `pytest" in proven:
        assert quoted
