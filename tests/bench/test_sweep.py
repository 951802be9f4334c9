"""A whole sweep with the device played by the CPU: what is called with what, and the rows that come of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megaproof.bench.measure import load, sweep, yardsticks
from megaproof.bench.measure.card import Card
from megaproof.bench.measure.points import Options
from megaproof.bench.measure.timer import Call
from megaproof.bench.model.roofline import RANKS, Load
from megaproof.kernel import api
from megaproof.kernel.host.buffer import BufferSize
from megaproof.kernel.host.symm_buffer import SymmBuffer
from megaproof.kernel.programs import PINS, dense, stream
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape
from megaproof.tests.support import command_line
from megaproof.toolchain.errors import EnvironmentMissing

SHAPE = Shape("h512-i256-e4-k2", 512, 256, 4 * RANKS, 2)
Log = list[tuple[Any, ...]]
invoke = partial(command_line.bench, "sweep")


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return args[0] if function is Tensor.cuda else function(*args, **kwargs)


class FakeTimer:
    """Runs each call once; the n-th call of a point takes n * 10 us."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __call__(self, calls: list[Call], regime: str) -> dict[str, list[float]]:
        self.log.append(("turn", regime, [call.name for call in calls]))
        for call in calls:
            call.run()
        return {call.name: [10.0 * (n + 1)] * 3 for n, call in enumerate(calls)}

    def flush(self) -> None:
        raise AssertionError("a trace alone flushes here")

    def spans(self, call: Call, regime: str) -> list[float]:
        return [80.0] * 3


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """What was launched."""
    seen: Log = []
    generator = torch.Generator

    def symm_buffer(group: None, experts: int, capacity: int, *sizes: int) -> SymmBuffer:
        return SymmBuffer(group, BufferSize(1, experts, *sizes, capacity), torch.device("cpu"))

    def fused(y: Tensor, l1: Any, l2: Any, buffer: SymmBuffer, stats: Tensor, **options: Any) -> None:
        seen.append(("fused", y.shape[0], buffer.size.capacity, options))

    def gemm(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, group: int, out: Tensor) -> None:
        (m, k), n = a.shape, b.shape[0]
        assert (a.dtype, b.dtype, out.dtype) == (torch.uint8, torch.uint8, torch.float32)
        assert (tuple(a_sf.shape), tuple(b_sf.shape)) == ((k // group, m), (n // 128, k // 128))
        assert all(t.is_contiguous() for t in (a, a_sf, b, b_sf, out)), "as dense.dense wants them"
        assert not ((a & 0x7F) == 0x7F).any(), "no NaN in what is multiplied"
        assert tuple(out.shape) == (m, n)
        seen.append(("gemm", group, m, n, k))

    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(api, "get_symm_buffer_for_mega_moe", symm_buffer)
    monkeypatch.setattr(api, "fp8_mega_moe", fused)
    monkeypatch.setattr(dense, "dense", gemm)
    monkeypatch.setattr(stream, "stream_read", lambda data: seen.append(("read", data.numel())))
    with OnCpu():
        yield seen


def swept(options: Options, log: Log, trace: Path | None = None) -> list[dict[str, Any]]:
    found = sweep.sweep(options, FakeTimer(log), trace)
    assert (found.gemm, found.failed) == (None, [])
    assert all(start <= end for _, (start, end) in found.points)
    return [row for row, _ in found.points]


def test_a_sweep(log: Log) -> None:
    options = Options({SHAPE.name: SHAPE}, (3, 70), ("folded",), ("flush", "sustained"), 80, None, False)
    rows = swept(options, log)
    assert [(row["T"], row["regime"]) for row in rows] == [
        (3, "l2 flushed"),
        (3, "sustained"),
        (70, "l2 flushed"),
        (70, "sustained"),
    ]
    assert all((row["us"], row["read_us"], row["share_compute"]) == (10.0, 20.0, 7.0) for row in rows)
    assert all(
        (row["clamp"], row["silu"], row["baseline_us"], row["differing"]) == (None, "precise", None, None)
        for row in rows
    )
    turns = [entry for entry in log if entry[0] == "turn"]
    assert turns[0] == ("turn", "flush", ["fused", "read", "dense_128", "dense_64"])
    assert log[1] == ("fused", 3, 80, {"recipe": Recipe(clamp=None, silu="precise")})
    assert log[3:5] == [("gemm", 128, 128, 512, 512), ("gemm", 64, 128, 512, 256)], "6 rows, and one tile of them"
    assert log[-2:] == [("gemm", 128, 256, 512, 512), ("gemm", 64, 256, 512, 256)], "140 rows, two tiles"


def test_a_sweep_of_the_other_granularity(log: Log) -> None:
    """Both GEMMs are promoted per 128 and launch one kernel, so they are one call."""
    options = Options({SHAPE.name: SHAPE}, (3, 70), ("folded",), ("flush",), granularity=128)
    rows = swept(options, log)
    assert log[0] == ("turn", "flush", ["fused", "read", "dense_128"])
    assert log[1] == ("fused", 3, 8192, {"recipe": Recipe(activation_granularity=128)})
    assert log[3:5] == [("gemm", 128, 128, 512, 512), ("gemm", 128, 128, 512, 256)]
    assert log[-2:] == [("gemm", 128, 256, 512, 512), ("gemm", 128, 256, 512, 256)]
    for row in rows:
        assert (row["granularity"], row["dense_128_us"], row["dense_64_us"]) == (128, 30.0, None)
        assert (row["share_compute"], row["share_floor"]) == (3.0, None)


def test_the_read_is_of_the_bytes_that_must_move(log: Log) -> None:
    (row,) = swept(Options({SHAPE.name: SHAPE}, (5,), ("distinct",)), log)
    (size,) = (entry[1] for entry in log if entry[0] == "read")
    needed = Load(512, 256, 5, row["rows"], row["touched"]).bytes
    assert needed <= size < needed + stream.GRAIN
    assert size % stream.GRAIN == 0


def test_yardsticks_leave_the_inputs_alone(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without them the kernel is measured on the same bytes."""
    found: list[list[Tensor]] = []
    route = load.Layer.route

    def seen(layer: load.Layer, tokens: int, routing: str) -> load.Work:
        work = route(layer, tokens, routing)
        found.append([tensor.clone() for tensor in work.arguments])
        return work

    monkeypatch.setattr(load.Layer, "route", seen)
    for wanted in (True, False):
        swept(Options({SHAPE.name: SHAPE}, (3, 9), ("folded",), yardsticks=wanted), log)
    for with_them, without in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(with_them, without, strict=True))
    assert [tensor.dtype for tensor in found[0]] == [torch.uint8, torch.float32, torch.int64, torch.float32]
    assert [tuple(tensor.shape) for tensor in found[1]] == [(9, 512), (9, 4), (9, 2), (9, 2)]


def test_the_last_point_is_traced(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Path] = []
    monkeypatch.setattr(sweep, "write_trace", lambda call, flush, path: (call(), traced.append(path)))
    other = Shape("h512-i256-e8-k2", 512, 256, 8 * RANKS, 2)
    swept(Options({SHAPE.name: SHAPE, other.name: other}, (3, 4), yardsticks=False), log, Path("t.json"))
    assert traced == [Path("t.json")]
    assert log[-1][:2] == ("fused", 4)


def test_a_baseline_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EnvironmentMissing("triton is not installed")

    monkeypatch.setattr(sweep, "require_device", lambda: None)
    monkeypatch.setattr(sweep, "require_baseline", missing)
    assert invoke("--baseline") == (3, "environment: triton is not installed\n")
    assert yardsticks.FASTEST[-1] == "triton", "the back end that every recipe has comes last"


# ---- What a run leaves behind ----------------------------------------------------------------------------------------

SMALL = ("--hidden", "512", "--intermediate", "256", "--experts", "4", "--topk", "2", "--tokens", "3,5,7")
RUN = (*SMALL, "--routing", "folded")
Turn = Callable[[int], None]


def zeros(experts: int, rows: int, columns: int, generator: torch.Generator) -> load.Quantised:
    codes = torch.zeros(experts, rows, columns, dtype=torch.float8_e4m3fn)
    return codes, torch.ones(experts, rows // 128, columns // 128)


@pytest.fixture
def turn(log: Log, monkeypatch: pytest.MonkeyPatch) -> Callable[[Turn], None]:
    """Makes `bench` run on the fakes; what it is given is called in the n-th turn of the clock, from 1."""

    def use(act: Turn) -> None:
        class Acting(FakeTimer):
            turns, method = 0, "fake"

            def __call__(self, calls: list[Call], regime: str) -> dict[str, list[float]]:
                self.turns += 1
                act(self.turns)
                return super().__call__(calls, regime)

        monkeypatch.setattr(sweep, "Timer", lambda profiler, repeats: Acting(log))

    monkeypatch.setattr(sweep, "require_device", lambda: SimpleNamespace(name="fake", driver="0"))
    monkeypatch.setattr(sweep, "sampled", lambda device: nullcontext(Card()))
    monkeypatch.setattr(sweep, "code", lambda options: {})
    monkeypatch.setattr(load, "random_weights", zeros)  # what a run leaves behind does not depend on them
    return use


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"moe": {"moe_fast"}, "dense": {"dense_128", "dense_64"}, "stream": {"stream_read"}}),
        ({"granularity": 128}, {"moe_g128": {"moe_fast"}, "dense": {"dense_128"}, "stream": {"stream_read"}}),
        ({"fast_math": False, "yardsticks": False}, {"moe": {"moe_precise"}}),
    ],
    ids=["default", "per 128", "precise, alone"],
)
def test_a_result_names_the_code_that_is_launched(options: dict[str, Any], wanted: dict[str, set[str]]) -> None:
    found = sweep.code(Options({SHAPE.name: SHAPE}, (3,), **options))
    assert {target: set(own) for target, own in found.items()} == wanted
    assert all(PINS.code()[target][entry] == own[entry] for target, own in found.items() for entry in own)


def read(path: Path) -> tuple[list[int], bool, list[str]]:
    """(T of the rows, complete, failed) of a result; nothing else lies beside it."""
    assert [path.name for path in path.parent.iterdir()] == [path.name]
    result = json.loads(path.read_text())
    return [row["T"] for row in result["rows"]], result["complete"], result["failed"]


def test_a_result_grows_point_by_point(turn: Callable[[Turn], None], tmp_path: Path) -> None:
    path, seen = tmp_path / "new.json", []
    turn(lambda n: seen.append(read(path)[:2] if path.exists() else None))
    status, text = invoke(*RUN, "--json", str(path))
    assert status == 0, text
    assert seen == [None, ([3], False), ([3, 5], False)]
    assert read(path) == ([3, 5, 7], True, [])


@pytest.mark.parametrize(("device", "known"), [("NVIDIA H200", True), ("another", False)])
def test_a_row_is_put_beside_the_figures_of_its_own_card(
    device: str, known: bool, turn: Callable[[Turn], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without yardsticks the time of the reduction is estimated from the card's measured reads."""
    turn(lambda n: None)
    monkeypatch.setattr(sweep, "require_device", lambda: SimpleNamespace(name=device, driver="0"))
    path = tmp_path / "new.json"
    assert invoke(*RUN, "--no-yardsticks", "--json", str(path))[0] == 0
    assert all((row["reduction_us"] is not None) is known for row in json.loads(path.read_text())["rows"])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("17 GiB\nand more"), ValueError("odd")], ids=["oom", "other"])
def test_a_run_outlives_a_point_that_fails(error: Exception, turn: Callable[[Turn], None], tmp_path: Path) -> None:
    def act(n: int) -> None:
        if n == 2:
            raise error

    turn(act)
    path = tmp_path / "new.json"
    status, text = invoke(*RUN, "--json", str(path))
    reason = f"h512-i256-e4-k2 T=5 folded l2 flushed: {type(error).__name__}: {str(error).splitlines()[0]}"
    assert status == 1
    assert f"failed: {reason}\n" in text
    assert ("Traceback" in text) == isinstance(error, ValueError)
    assert read(path) == ([3, 7], True, [reason])
    assert invoke(*RUN, "--compare", str(path))[0] == 1, "a point failed; the others are compared all the same"


def test_every_point_of_a_shape_may_fail(
    turn: Callable[[Turn], None], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*sizes: object) -> None:
        raise torch.OutOfMemoryError("no room for weights")

    turn(lambda n: None)
    monkeypatch.setattr(load, "random_weights", none)
    status, text = invoke(*RUN)
    assert status == 1
    assert "failed: h512-i256-e4-k2: OutOfMemoryError: no room for weights\n" in text


def test_yardsticks_that_ran_out_of_memory_are_whole_at_the_next_point(
    turn: Callable[[Turn], None], log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second GEMM's operands are what does not fit, once; both regimes have the same."""
    made, rows = [], yardsticks.Yardsticks._random_rows

    def scarce(self: yardsticks.Yardsticks, *size: int) -> Any:
        made.append(size)
        if len(made) == 2:
            raise torch.OutOfMemoryError("no room for operands")
        return rows(self, *size)

    turn(lambda n: None)
    monkeypatch.setattr(yardsticks.Yardsticks, "_random_rows", scarce)
    path = tmp_path / "new.json"
    assert invoke(*RUN, "--l2-flush", "--sustained", "--json", str(path))[0] == 1
    tokens, _, (failed,) = read(path)
    assert tokens == [3, 5, 5, 7, 7]
    assert "T=3 folded l2 flushed: OutOfMemoryError" in failed
    assert all(row["dense_64_us"] for row in json.loads(path.read_text())["rows"])


def test_an_interrupted_run_leaves_its_points(turn: Callable[[Turn], None], tmp_path: Path) -> None:
    def act(n: int) -> None:
        if n == 3:
            raise KeyboardInterrupt

    turn(act)
    path = tmp_path / "new.json"
    assert invoke(*RUN, "--json", str(path))[0] in (1, 130), "as typer has it"
    assert read(path) == ([3, 5], False, [])


def test_a_terminated_run_leaves_its_points_and_dies_of_it(
    turn: Callable[[Turn], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = []
    monkeypatch.setattr(sweep.os, "kill", lambda *who: killed.append((*who, signal.getsignal(signal.SIGTERM))))
    turn(lambda n: signal.raise_signal(signal.SIGTERM) if n == 3 else None)
    path = tmp_path / "new.json"
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a command finds it; a session of pytest has its own
    try:
        with pytest.raises(sweep.Terminated):
            invoke(*RUN, "--json", str(path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert killed == [(sweep.os.getpid(), signal.SIGTERM, signal.SIG_DFL)]
    assert read(path) == ([3, 5], False, [])


def test_a_run_that_measured_nothing_leaves_an_old_result(turn: Callable[[Turn], None], tmp_path: Path) -> None:
    def act(n: int) -> None:
        raise KeyboardInterrupt

    turn(act)
    path = tmp_path / "old.json"
    path.write_text("{}")
    invoke(*RUN, "--json", str(path))
    assert path.read_text() == "{}"


def test_a_missing_environment_ends_a_run(turn: Callable[[Turn], None], tmp_path: Path) -> None:
    def act(n: int) -> None:
        if n == 2:
            raise EnvironmentMissing("nvcc went home")

    turn(act)
    path = tmp_path / "new.json"
    status, text = invoke(*RUN, "--json", str(path))
    assert status == 3
    assert text.endswith("environment: nvcc went home\n")
    assert read(path) == ([3], False, [])


def test_a_full_disk_is_said_and_the_run_goes_on(
    turn: Callable[[Turn], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megaproof.bench import files

    write, full = files.write_json, []

    def scarce(result: dict[str, Any], path: str) -> None:
        if not result["complete"]:
            full.append(len(result["rows"]))
            raise OSError("no space left")
        write(result, path)

    turn(lambda n: None)
    monkeypatch.setattr(files, "write_json", scarce)
    path = tmp_path / "new.json"
    status, text = invoke(*RUN, "--json", str(path))
    assert status == 0
    assert f"--json {path}: no space left" in text
    assert full[:3] == [1, 2, 3]
    assert read(path) == ([3, 5, 7], True, [])
