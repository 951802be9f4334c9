"""The benchmark: its arithmetic by hand, its table, routings and verdicts without a GPU; one short run with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from kernel import bench
from kernel.build import EnvironmentMissing
from kernel.roofline import CEILING_TFLOPS, READ_GB_S, Load, floor_us, multiply_us, read_us
from quant.cast import quantise_per_block, quantise_per_token
from quant.recipe import SHAPES

TINY = Load(hidden=128, intermediate=256, tokens=2, rows=6, touched=3)
POINT = {"preset": "dsv4_flash", "T": 8, "routing": "folded"}
APP = typer.Typer()
APP.command("bench")(bench.bench_command)


def invoke(*arguments: str) -> tuple[int, str]:
    # Wide and without colour: an option's name is then in one piece.
    result = CliRunner().invoke(APP, arguments, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    return result.exit_code, result.output


def test_flops_and_bytes_by_hand() -> None:
    assert TINY.flops == 1_179_648
    weights = 3 * 3 * (128 * 256 + 4 * 1 * 2)
    assert TINY.bytes == weights + 6 * (128 + 4) + 6 * 2 * (256 + 16) + 6 * 4 * 128 + 2 * 2 * 128 == 302_624


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
    small, large = Load(4096, 2048, 8, 48, 25), Load(4096, 2048, 8192, 49152, 32)
    assert floor_us(small) == read_us(small.bytes) > multiply_us(small)
    assert floor_us(large) == multiply_us(large) == pytest.approx(1940.4, abs=0.1)


def test_the_peers_measured_our_shapes() -> None:
    for name, shape in bench.PEERS["shapes"].items():
        ours = SHAPES[name]
        assert shape == {
            "h": ours.hidden,
            "i": ours.intermediate,
            "experts_local": ours.experts // bench.RANKS,
            "topk": ours.topk,
        }
        assert (ours.hidden, ours.intermediate) in CEILING_TFLOPS
    assert set(bench.PEERS["us"]) == set(bench.PEERS["shapes"])


def test_the_peers_table_says_where_it_comes_from() -> None:
    assert {"what", "device", "date", "source", "method"} <= set(bench.PEERS)
    tables = [*bench.PEERS["us"].values(), *bench.PEERS["us_distinct"].values()]
    assert all(set(table) <= set(bench.PEERS["source"]) for table in tables)
    assert all(us > 0 for table in tables for column in table.values() for us in column.values())


def test_peers_of_a_point() -> None:
    assert bench.peers("dsv4_flash", "folded", 8) == {"pr323": 178.6, "pr383": 177.1, "grouped_gemms": 208.7}
    assert bench.peers("dsv4_pro", "distinct", 8192) == {"pr323": 7594.0, "pr383": 8115.4, "grouped_gemms": None}
    assert set(bench.peers("glm", "distinct", 7).values()) == {None}


@pytest.mark.parametrize("routing", bench.ROUTINGS)
def test_routings_are_reproducible_and_local(routing: str) -> None:
    route = bench.ROUTINGS[routing]
    first = route(512, 32, 6, 1)
    assert first.shape == (512, 6)
    assert first.dtype == torch.int64
    assert torch.equal(first, route(512, 32, 6, 1))
    assert not torch.equal(first, route(512, 32, 6, 2))
    assert first.unique().tolist() == list(range(32))


def test_only_folded_routing_repeats_an_expert() -> None:
    def least(topk_idx: torch.Tensor) -> int:
        return min(len(set(token)) for token in topk_idx.tolist())

    assert least(bench.distinct(512, 32, 6, 0)) == 6
    assert least(bench.folded(512, 32, 6, 0)) < 6


def test_inputs_are_quantised_as_a_caller_does() -> None:
    v = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    for ours, readable in ((bench.quantised_rows, quantise_per_token), (bench.quantised_blocks, quantise_per_block)):
        (codes, scale), (expected_codes, expected_scale) = ours(v), readable(v)
        assert torch.equal(codes.view(torch.uint8), expected_codes)
        assert torch.equal(scale, expected_scale)


def test_a_row() -> None:
    times = [float(us) for us in range(150, 171)]
    row = bench.row("dsv4_flash", "folded", Load(4096, 2048, 8, 48, 25), times)
    assert (row["us"], row["us_spread"], row["rows"], row["touched"]) == (160.0, 8.0, 48, 25)
    assert row["tflops"] == 15.1
    assert row["ratio_pr323"] == round(160 / 178.6, 3)
    assert 0 < row["share_floor"] < 1


def test_compare_by_point() -> None:
    new, old = [POINT | {"us": 104.0}, POINT | {"T": 9, "us": 1.0}], [POINT | {"us": 100.0}]
    assert bench.compare(new, old, 5) == (1, [])
    count, slower = bench.compare(new, old, 3)
    assert count == 1
    assert slower == ["dsv4_flash T=8 folded: 104.0 us, was 100.0"]
    assert bench.compare(new, [], 3) == (0, [])


def test_samples_of_the_card() -> None:
    found = bench.median_and_peak("1980, 650.5\n1200, 701.25\n[N/A], [N/A]\n1500, 640.00\n16")
    assert found == {"clock_mhz": 1500.0, "power_w": 701.25}
    assert bench.median_and_peak("[N/A], 300.0\n") == {"clock_mhz": None, "power_w": None}


def test_help_names_every_option() -> None:
    status, text = invoke("--help")
    assert status == 0
    options = ("preset", "tokens", "routing", "repeats", "seed", "profiler", "json", "compare", "fail-slower")
    assert [name for name in options if f"--{name}" not in text] == []


@pytest.mark.parametrize(
    "arguments",
    [("--tokens", "0"), ("--tokens", "1,x"), ("--preset", "smoke"), ("--routing", "zipf"), ("--fail-slower", "3")],
    ids=" ".join,
)
def test_usage(arguments: tuple[str, ...]) -> None:
    status, text = invoke(*arguments)
    assert status == 2
    assert arguments[0] in text


def test_an_unreadable_comparison_is_usage(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"rows": [{}]}')
    assert invoke("--compare", str(path))[0] == 2


def no_gpu() -> None:
    raise EnvironmentMissing("no GPU here")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "require_device", no_gpu)
    status, text = invoke("--tokens", "8")
    assert status == 3
    assert text == "environment: no GPU here\n"


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["--profiler", "--events"])
def test_a_short_run(method: str, tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    run = ("--preset", "dsv4_flash", "--tokens", "8", "--repeats", "3", method)
    assert invoke(*run, "--json", str(path))[0] == 0
    result = json.loads(path.read_text())
    assert {row["routing"] for row in result["rows"]} == set(bench.ROUTINGS)
    assert all(row["us"] > 0 and row["share_floor"] < 1.1 for row in result["rows"])
    assert invoke(*run, "--compare", str(path), "--fail-slower", "1000")[0] == 0
