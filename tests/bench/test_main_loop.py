"""`python -m bench dense`: sizes, rows and turns without a GPU; a small size with one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megaproof.bench.measure import main_loop
from megaproof.bench.measure.timer import WARM_UPS, Timer
from megaproof.kernel.programs import dense
from megaproof.tests.support import command_line
from megaproof.toolchain.errors import EnvironmentMissing

FIELDS = ["group", "m", "n", "k", "us", "tflops", "cublaslt_us", "cublaslt_tflops"]


invoke = partial(command_line.bench, "dense")


def test_a_row_by_hand() -> None:
    """2 * 8192^3 in a millisecond are 1099.5 TFLOP/s."""
    row = main_loop.dense_row(64, (8192, 8192, 8192), 1000.04, 500.0)
    assert list(row) == FIELDS
    assert list(row.values()) == [64, 8192, 8192, 8192, 1000.0, 1099, 500.0, 2199]


def test_what_names_the_clock() -> None:
    assert "8 GiB of memset before each, median of 20 after 3" in main_loop.what(20)


def test_default_sizes_are_valid() -> None:
    assert [main_loop.parse_size("x".join(map(str, size))) for size in main_loop.SIZES] == list(main_loop.SIZES)


class FakeEvent:
    """Time is the number of events and calls so far, in ms."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_calls_take_turns_and_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def call(name: str, ms: float) -> None:
        log.append(name)
        FakeEvent.now += ms if len(log) > 4 * WARM_UPS else 99.0  # the flush is in the log too

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Timer, "flush", lambda self: call("flush", 1000.0))
    found = main_loop.times([lambda: call("a", 2.0), lambda: call("b", 3.0)], 4)
    assert found == pytest.approx([2000.0, 3000.0])
    assert log == ["flush", "a", "flush", "b"] * (WARM_UPS + 4)


def test_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fields are those that `tests/meta/test_results.py` wants of a committed one, and those of a run."""
    monkeypatch.setattr(main_loop, "require_device", lambda: SimpleNamespace(name="fake", driver="0"))
    monkeypatch.setattr(main_loop, "rows", lambda size, repeats: iter([main_loop.dense_row(128, size, 10.0, 9.0)]))
    path = tmp_path / "dense.json"
    status, text = invoke("--size", "128x256x384", "--json", str(path))
    assert status == 0, text
    assert "128x256x384 per 128: 10.0 us, 3 TFLOP/s; cuBLASLt 9.0 us, 3 TFLOP/s" in text
    found = json.loads(path.read_text())
    assert set(found) == {"what", "device", "driver", "versions", "date", "code", "rows"}
    assert found["code"] == {"dense": dense.PROGRAM.compile().code()}
    assert [list(row) for row in found["rows"]] == [FIELDS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "128x128"), "--size '128x128' must be MxNxK, each a positive multiple of 128"),
        (("--size", "128x128x64"), "--size '128x128x64' must be MxNxK"),
        (("--size", "0x128x128"), "--size '0x128x128' must be MxNxK"),
        (("--size", "-128x128x128"), "must be MxNxK"),
        (("--repeats", "0"), "Invalid value for '--repeats'"),
        (("--json", "nowhere/a.json"), "--json nowhere/a.json must lie in a folder that exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_usage(arguments: tuple[str, ...], message: str) -> None:
    command_line.assert_usage(invoke(*arguments), message)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> None:
        raise EnvironmentMissing("no GPU here")

    monkeypatch.setattr(main_loop, "require_device", no_gpu)
    assert invoke() == (3, "environment: no GPU here\n")


@pytest.mark.gpu
def test_a_small_size() -> None:
    result = main_loop.measure([(256, 512, 1024)], 3)
    assert [(row["group"], row["m"], row["n"], row["k"]) for row in result["rows"]] == [
        (128, 256, 512, 1024),
        (64, 256, 512, 1024),
    ]
    assert all(0 < row["us"] < 1000 and 0 < row["cublaslt_us"] < 1000 for row in result["rows"])
