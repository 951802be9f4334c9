"""A measured point: its columns against a second opinion, what is not made up, and the table on stdout. No GPU."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaproof.bench import peers
from megaproof.bench.measure import rows
from megaproof.bench.measure.rows import Point
from megaproof.bench.model.chips import CHIPS, H200, Chip
from megaproof.bench.model.roofline import Load
from megaproof.quant.shapes import SHAPES
from megaproof.tests.support import results_again as again

FLASH_8 = Load(4096, 2048, 8, 48, 25)
TIMES = st.lists(st.floats(0.5, 1e4), min_size=2, max_size=4)
LAST_DIGIT = {"tflops": 0.1, "tflops_adjusted": 0.1, "hbm_gb_s": 1, "reduction_us": 0.01}
"""To which a column is rounded; ratios and shares to 0.001."""
ROW = {"preset": "dsv4_flash", "T": 8, "routing": "folded", "us": 175.8, "read_us": 146.0, "ratio_best": None}


def point(load: Load = FLASH_8, preset: str = "dsv4_flash", regime: str = "flush", chip: Chip | None = H200) -> Point:
    return Point(preset, "folded", regime, load, 10.0, "fast", chip)


@settings(max_examples=60)
@given(st.data(), st.sampled_from(list(again.SHAPES)), st.sampled_from([1, 8, 128, 512, 2048, 8192]))
def test_columns_are_those_of_the_second_opinion(data: st.DataObject, preset: str, tokens: int) -> None:
    shape, granularity = SHAPES[preset], data.draw(st.sampled_from([64, 128]))
    touched = data.draw(st.integers(1, shape.experts // 8))
    load = Load(shape.hidden, shape.intermediate, tokens, tokens * shape.topk, touched, granularity)
    routing, regime = data.draw(st.sampled_from(["folded", "distinct"])), data.draw(st.sampled_from(list(rows.REGIMES)))
    names = ["fused", *data.draw(st.lists(st.sampled_from(["read", "dense_128", "dense_64"]), unique=True))]
    times = {name: data.draw(TIMES) for name in names}
    unfused = data.draw(st.none() | TIMES)
    found = rows.row(Point(preset, routing, regime, load, None, "precise", H200), times, unfused, 3)
    assert list(found) == list(rows.COLUMNS)
    medians = {f"{name}_us": statistics.median(own) for name, own in times.items()}
    exact = dict.fromkeys(("read_us", "dense_128_us", "dense_64_us"))
    exact |= medians | {"us": medians["fused_us"], "baseline_us": unfused and statistics.median(unfused)}
    for name in ("us", "read_us", "dense_128_us", "dense_64_us", "baseline_us"):
        assert found[name] == (exact[name] and round(exact[name], 2))
    given_ = {"preset": preset, "T": tokens, "routing": routing, "regime": rows.REGIMES[regime], "clamp": None}
    given_ |= {"silu": "precise", "granularity": granularity, "touched": touched, "differing": 3}
    assert {name: found[name] for name in given_} == given_
    for name, wanted in again.columns(found | exact, peers.PEERS["h200"]).items():
        if wanted is not None:
            wanted = pytest.approx(wanted, abs=0.501 * LAST_DIGIT.get(name, 0.001), rel=1e-12)
        assert found[name] == wanted, name


def test_the_spread_is_of_the_kernels_times() -> None:
    times = {"fused": [float(us) for us in range(150, 171)], "read": [1.0, 9.0]}
    found = rows.row(point(), times)
    assert (found["us"], found["us_spread"], found["read_us"]) == (160.0, 8.0, 5.0)


@pytest.mark.parametrize("chip", [None, CHIPS["H20"]], ids=["unknown", "not measured"])
def test_a_chip_that_was_not_measured_has_no_floor_and_no_peers(chip: Chip | None) -> None:
    found = rows.row(point(chip=chip), {"fused": [9.0, 11.0]})
    nothing = {"share_floor", "reduction_us", "tflops_adjusted", *peers.NAMES, "ratio_best"}
    assert {found[name] for name in nothing} == {None}
    assert (found["us"], found["hbm_gb_s"]) == (10.0, round(FLASH_8.bytes / 1e4))
    assert rows.row(point(chip=chip), {"fused": [9.0, 11.0], "read": [4.0]})["reduction_us"] is not None


def test_a_shape_of_ones_own_has_no_floor_and_no_peers() -> None:
    found = rows.row(point(Load(512, 256, 8, 32, 9), "h512-i256-e16-k4"), {"fused": [9.0, 11.0]})
    empty = {name for name, value in found.items() if value is None}
    nothing = {"share_floor", "share_read", "share_compute", "read_us", "dense_128_us", "dense_64_us", *peers.NAMES}
    nothing |= {"ratio_pr323", "ratio_pr383", "ratio_best", "baseline_us", "speedup", "differing"}
    assert empty == nothing | {"clock_mhz", "power_w"}


def table(capsys: pytest.CaptureFixture[str], **columns: Any) -> str:
    rows.show([ROW | columns])
    return " ".join(capsys.readouterr().out.split())


def test_a_clock_is_shown_with_what_it_is_worth(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys, clock_mhz=1980.0)
    assert "1980.0" in text
    assert f"clock_mhz: {rows.CLOCK}" in text
    assert rows.COLUMNS["clock_mhz"].endswith(rows.CLOCK)
    assert "clock" not in table(capsys, clock_mhz=None)


def test_paper_and_empty_columns_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys)
    assert "175.8" in text
    assert not any(word in text for word in ("146.0", "ratio_best"))
