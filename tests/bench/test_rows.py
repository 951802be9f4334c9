"""The table of a run on stdout, and what stands once for all who show a point. No GPU."""

from __future__ import annotations

import pytest

from megaproof.bench.measure import rows
from megaproof.bench.measure.points import PEERS

ROW = {"preset": "dsv4_flash", "T": 8, "routing": "folded", "us": 175.8, "read_us": 146.0, "ratio_best": None}


def table(capsys: pytest.CaptureFixture[str], **columns: float | None) -> str:
    rows.show([ROW | columns])
    return " ".join(capsys.readouterr().out.split())


def test_the_table_says_what_its_clock_is_worth(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys, clock_mhz=1980.0)
    assert "1980.0" in text
    assert f"clock_mhz: {rows.CLOCK}" in text
    assert "samples mostly the memsets" in rows.CLOCK


def test_a_table_without_a_clock_says_nothing_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "clock" not in table(capsys, clock_mhz=None)


def test_paper_and_empty_columns_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys)
    assert "175.8" in text
    assert not any(word in text for word in ("146.0", "ratio_best"))


def test_the_column_says_so_too() -> None:
    assert rows.COLUMNS["clock_mhz"].endswith(rows.CLOCK)


def test_a_whole_layer_is_compared_with_whole_layers() -> None:
    assert set(PEERS["source"]) - set(rows.FUSED) == {"grouped_gemms"}


@pytest.mark.parametrize("routing, name", [("folded", "us"), ("distinct", "us_distinct")])
def test_each_routing_has_its_peers(routing: str, name: str) -> None:
    assert rows.peer_table(routing) is PEERS[name]
