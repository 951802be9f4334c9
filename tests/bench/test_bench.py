"""The benchmark: its arithmetic by hand, its columns, routings and yardsticks without a GPU; short runs with one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaproof.bench.measure import card, rows, yardsticks
from megaproof.bench.measure.load import ROUTINGS, Layer, distinct, folded, quantised_blocks, quantised_rows
from megaproof.bench.measure.points import PEERS
from megaproof.bench.measure.rows import Point
from megaproof.bench.model.roofline import (
    CEILING_TFLOPS,
    RANKS,
    READ_GB_S,
    Load,
    adjusted_tflops,
    floor_us,
    multiply_us,
    read_us,
    reduction_us,
)
from megaproof.kernel import api
from megaproof.quant.cast import quantise_per_block, quantise_per_token
from megaproof.quant.shapes import SHAPES
from megaproof.tests.bench.test_points import invoke

TINY = Load(hidden=128, intermediate=256, tokens=2, rows=6, touched=3)
FLASH_8 = Load(4096, 2048, 8, 48, 25)
LOADS = st.builds(
    Load,
    hidden=st.integers(1, 60).map(lambda n: 128 * n),
    intermediate=st.integers(1, 30).map(lambda n: 128 * n),
    tokens=st.integers(1, 8192),
    rows=st.integers(1, 65536),
    touched=st.integers(1, 64),
)


def test_flops_and_bytes_by_hand() -> None:
    assert TINY.flops == 1_179_648
    weights = 3 * 3 * (128 * 256 + 4 * 1 * 2)
    assert TINY.bytes == weights + 6 * (128 + 4) + 6 * 2 * (256 + 16) + 6 * 4 * 128 + 2 * 2 * 128 == 302_624


def test_half_the_scales_are_half_the_bytes_of_them() -> None:
    coarse = dataclasses.replace(TINY, granularity=128)
    assert TINY.bytes - coarse.bytes == 6 * 2 * 4 * (4 - 2)


def test_bytes_over_nvlink_and_of_the_reduction_by_hand() -> None:
    """Seven of eight rows come from elsewhere: 128 codes and a scale of 4 bytes there, 256 bytes back."""
    assert TINY.nvlink_bytes == 7 * 6 * (128 + 4 + 256) // 8 == 2037
    assert TINY.reduction_bytes == 6 * 2 * 128 + 2 * 2 * 128 == 2048


def test_bytes_of_a_decode_step() -> None:
    """dsv4_flash, one token: six experts of 25 MB each, and little else."""
    assert Load(4096, 2048, 1, 6, 6).bytes == 6 * 3 * (8388608 + 2048) + 6 * 4224 + 6 * 4352 + 6 * 16384 + 8192


@pytest.mark.parametrize(("gb", "rate"), READ_GB_S)
def test_a_measured_read_is_met(gb: float, rate: float) -> None:
    assert read_us(round(gb * 1e9)) == pytest.approx(gb * 1e6 / rate)


def test_a_read_between_and_beyond_measured_points() -> None:
    at_2, at_3 = 2e6 / 4490, 3e6 / 4535
    assert read_us(2_500_000_000) == pytest.approx((at_2 + at_3) / 2)
    assert read_us(4_000_000_000) == pytest.approx(2 * at_3 - at_2)
    assert 0 < read_us(0) < read_us(100_000_000) < read_us(150_000_000)


def test_the_floor_is_the_longer_of_reading_and_multiplying() -> None:
    large = Load(4096, 2048, 8192, 49152, 32)
    assert floor_us(FLASH_8) == read_us(FLASH_8.bytes) > multiply_us(FLASH_8)
    assert floor_us(large) == multiply_us(large) == pytest.approx(1940.4, abs=0.1)


@given(LOADS, st.floats(1, 1e5), st.floats(1, 1e5))
def test_the_adjusted_rate_is_higher_or_nothing(load: Load, us: float, read: float) -> None:
    reduction = reduction_us(load, read)
    assert 0 < reduction < read, "the combine's bytes are some of the load's"
    adjusted = adjusted_tflops(load, us, reduction)
    assert (adjusted is None) == (us <= reduction)
    assert adjusted is None or adjusted >= load.flops / us / 1e6


def test_the_peers_measured_our_shapes() -> None:
    for name, shape in PEERS["shapes"].items():
        ours = SHAPES[name]
        local = {"experts_local": ours.experts // RANKS, "topk": ours.topk}
        assert shape == {"h": ours.hidden, "i": ours.intermediate, **local}
        assert (ours.hidden, ours.intermediate) in CEILING_TFLOPS
    assert set(PEERS["us"]) == set(PEERS["shapes"])


def test_the_peers_table_says_where_it_comes_from() -> None:
    assert {"what", "device", "date", "source", "method"} <= set(PEERS)
    tables = [*PEERS["us"].values(), *PEERS["us_distinct"].values()]
    assert all(set(table) <= set(PEERS["source"]) for table in tables)
    assert all(us > 0 for table in tables for column in table.values() for us in column.values())


def test_peers_of_a_point() -> None:
    assert rows.peers("dsv4_flash", "folded", 8) == {"pr323": 178.6, "pr383": 177.1, "grouped_gemms": 208.7}
    assert rows.peers("dsv4_pro", "distinct", 8192) == {"pr323": 7594.0, "pr383": 8115.4, "grouped_gemms": None}
    assert set(rows.peers("glm", "distinct", 7).values()) == {None}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_are_reproducible_and_local(routing: str) -> None:
    route = ROUTINGS[routing]
    first = route(512, 32, 6, 1)
    assert first.shape == (512, 6)
    assert first.dtype == torch.int64
    assert torch.equal(first, route(512, 32, 6, 1))
    assert not torch.equal(first, route(512, 32, 6, 2))
    assert first.unique().tolist() == list(range(32))


def test_only_folded_routing_repeats_an_expert() -> None:
    def least(topk_idx: torch.Tensor) -> int:
        return min(len(set(token)) for token in topk_idx.tolist())

    assert least(distinct(512, 32, 6, 0)) == 6
    assert least(folded(512, 32, 6, 0)) < 6


def test_inputs_are_quantised_as_a_caller_does() -> None:
    v = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    for ours, readable in ((quantised_rows, quantise_per_token), (quantised_blocks, quantise_per_block)):
        (codes, scale), (expected_codes, expected_scale) = ours(v), readable(v)
        assert torch.equal(codes.view(torch.uint8), expected_codes)
        assert torch.equal(scale, expected_scale)


def test_the_baseline_gets_the_weights_that_the_kernel_has() -> None:
    w1, w2 = (torch.randint(0, 256, (2, *size), dtype=torch.uint8) for size in ((256, 128), (128, 128)))
    w1_sf, w2_sf = torch.rand(2, 2, 1), torch.rand(2, 1, 1)
    l1, l2 = api.transform_weights_for_mega_moe_sm90(
        (w1.view(torch.float8_e4m3fn), w1_sf), (w2.view(torch.float8_e4m3fn), w2_sf)
    )
    assert not torch.equal(l1[0].view(torch.uint8), w1)
    found = Layer.weights(SimpleNamespace(l1=l1, l2=l2), 1)
    assert all(torch.equal(a, b) for a, b in zip(found, (w1[1], w1_sf[1], w2[1], w2_sf[1]), strict=True))
    assert found[0].is_contiguous()


def test_elements_of_other_bits() -> None:
    y = torch.tensor([1.0, -0.0, float("nan"), 2.0], dtype=torch.bfloat16)
    assert yardsticks.differing(y, y.clone()) == 0
    assert yardsticks.differing(y, torch.tensor([1.0, 0.0, float("nan"), 2.015625], dtype=torch.bfloat16)) == 2


def test_a_row() -> None:
    times = {"fused": [float(us) for us in range(150, 171)]}
    times |= {"read": [120.0, 122.0], "dense_128": [20.0, 20.0], "dense_64": [12.0, 12.0]}
    found = rows.row(Point("dsv4_flash", "folded", "flush", FLASH_8, 10.0, "fast"), times, [320.0, 320.0], 0)
    assert (found["us"], found["us_spread"], found["rows"], found["touched"]) == (160.0, 8.0, 48, 25)
    assert (found["tflops"], found["regime"], found["nvlink_bytes"]) == (15.1, "l2 flushed", FLASH_8.nvlink_bytes)
    assert found["ratio_pr323"] == round(160 / 178.6, 3)
    assert found["ratio_pr383"] == found["ratio_best"] == round(160 / 177.1, 3)
    assert (found["read_us"], found["share_read"], found["share_compute"]) == (121.0, 0.756, 0.2)
    assert found["reduction_us"] == round(121 * FLASH_8.reduction_bytes / FLASH_8.bytes, 2)
    assert found["tflops_adjusted"] >= found["tflops"]
    assert (found["baseline_us"], found["speedup"], found["differing"]) == (320.0, 2.0, 0)
    assert 0 < found["share_floor"] < 1
    assert list(found) == list(rows.COLUMNS)


def test_a_row_of_what_was_not_measured() -> None:
    """Sustained, and a shape of its own: no peers, no ceiling, no yardsticks; nothing is made up."""
    load = Load(512, 256, 8, 32, 9)
    found = rows.row(Point("h512-i256-e16-k4", "folded", "sustained", load, None, "precise"), {"fused": [9.0, 11.0]})
    empty = {name for name, value in found.items() if value is None}
    nothing = {"clamp", "share_floor", "share_read", "share_compute", "read_us", "dense_128_us", "dense_64_us"}
    nothing |= {"pr323", "pr383", "grouped_gemms", "ratio_pr323", "ratio_pr383", "ratio_best"}
    assert empty == nothing | {"baseline_us", "speedup", "differing", "clock_mhz", "power_w"}
    assert (found["us"], found["regime"]) == (10.0, "sustained")
    flash = Point("dsv4_flash", "folded", "sustained", FLASH_8, 10.0, "fast")
    assert rows.row(flash, {"fused": [160.0, 160.0]})["ratio_best"] is None, "the peers were measured flushed"


def test_samples_of_the_card() -> None:
    lines = ("1.000, 1980, 650.5", "2.000, 1200, 701.25", "3.000, [N/A], [N/A]", "4.000, 1500, 640.00", "5.000, 16")
    samples = "\n".join(f"2026/11/24 11:00:0{line}" for line in lines)
    assert card.figures(samples) == {"clock_mhz": 1500.0, "power_w": 701.25}
    nothing = {"clock_mhz": None, "power_w": None}
    assert card.figures("[N/A], 300.0\n") == card.Card().during(0.0, 1e12) == nothing


def test_samples_of_a_while() -> None:
    from datetime import datetime

    samples = (
        "2026/11/24 11:00:01.000, 1980, 300\n2026/11/24 11:00:02.500, 1300, 690\n2026/11/24 11:00:04.000, 1900, 400\n"
    )
    at = datetime(2026, 11, 24, 11, 0, 2).timestamp()
    assert (
        card.figures(samples, at, at + 1)
        == card.Card(samples).during(at, at + 1)
        == {"clock_mhz": 1300.0, "power_w": 690.0}
    )


# ---- on a GPU --------------------------------------------------------------------------------------------------------


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
    shape = (
        "--hidden",
        "512",
        "--intermediate",
        "256",
        "--experts",
        "16",
        "--topk",
        "4",
        "--clamp",
        "none",
        "--precise",
    )
    run = ("--tokens", "3,130", "--repeats", "4", "--l2-flush", "--sustained", "--baseline", "--check-output-diff")
    status, text = invoke(*shape, *run, "--capacity", "256", "--json", str(path), "--trace", str(trace))
    assert status == 0, text
    result = json.loads(path.read_text())
    assert len(result["rows"]) == 2 * 2 * 2
    assert {row["regime"] for row in result["rows"]} == {"l2 flushed", "sustained"}
    assert all(row["differing"] == 0 and row["baseline_us"] > 0 for row in result["rows"])
    assert all(row["share_read"] and row["share_compute"] for row in result["rows"])
    assert result["baseline"]
    assert any("moe_precise" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])
