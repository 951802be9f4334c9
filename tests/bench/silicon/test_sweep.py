"""Short runs of `python -m bench sweep` on a GPU."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from megaproof.bench.measure.load import ROUTINGS
from megaproof.tests.support import command_line

invoke = partial(command_line.bench, "sweep")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["--profiler", "--events"])
def test_a_short_run(method: str, tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    run = ("--preset", "dsv4_flash", "--tokens", "8", "--repeats", "3", method)
    status, text = invoke(*run, "--json", str(path))
    assert status == 0, text
    found = json.loads(path.read_text())["rows"]
    assert {row["routing"] for row in found} == set(ROUTINGS)
    assert all(row["us"] > 0 and row["share_floor"] < 1.1 and 0.3 < row["share_read"] < 1.1 for row in found)
    assert invoke(*run, "--compare", str(path), "--fail-slower", "1000")[0] == 0


@pytest.mark.gpu
def test_everything_at_once_on_a_small_shape(tmp_path: Path) -> None:
    path, trace = tmp_path / "new.json", tmp_path / "trace.json"
    shape = ("--hidden", "512", "--intermediate", "256", "--experts", "16", "--topk", "4")
    run = ("--tokens", "3,130", "--repeats", "4", "--l2-flush", "--sustained", "--baseline", "--check-output-diff")
    status, text = invoke(
        *shape, *run, "--clamp", "none", "--precise", "--capacity", "256", "--json", str(path), "--trace", str(trace)
    )
    assert status == 0, text
    result = json.loads(path.read_text())
    assert len(result["rows"]) == 2 * 2 * 2
    assert {row["regime"] for row in result["rows"]} == {"l2 flushed", "sustained"}
    assert all(row["differing"] == 0 and row["baseline_us"] > 0 for row in result["rows"])
    assert all(row["share_read"] and row["share_compute"] for row in result["rows"])
    assert result["baseline"]
    assert any("moe_precise" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])
