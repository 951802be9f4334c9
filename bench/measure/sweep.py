"""The measurement itself: every point of a run, the kernel and its yardsticks in turn."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megaproof.bench.measure.card import Card, figures, sampled
from megaproof.bench.measure.load import Layer, Work
from megaproof.bench.measure.points import Options
from megaproof.bench.measure.profiling import write_trace
from megaproof.bench.measure.rows import Point, Row, row
from megaproof.bench.measure.timer import REGIMES, WARM_UPS, Call, Timer
from megaproof.bench.measure.yardsticks import Unfused, Yardsticks, promotions, require_baseline
from megaproof.bench.model import chips
from megaproof.kernel.programs import dense, moe, stream
from megaproof.toolchain.build import nvrtc_version
from megaproof.toolchain.errors import EnvironmentMissing
from megaproof.toolchain.launch import Device, require_device

KERNEL = "moe_"
"""In the name of every kernel that a call launches."""
Window = tuple[float, float]
"""Start and end, seconds since the epoch."""
Result = dict[str, Any]


class Terminated(BaseException):
    """SIGTERM came."""


@dataclass
class Sweep:
    """What has been measured so far, on which chip: None is one that chips.py does not know."""

    chip: chips.Chip | None = None
    points: list[tuple[Row, Window]] = field(default_factory=list)
    """Rows, and when each was measured."""
    gemm: str | None = None
    """The baseline's back end."""
    failed: list[str] = field(default_factory=list)
    """Points without a row, and why."""

    @contextmanager
    def point(self, name: str) -> Iterator[None]:
        """An exception is reported under this name and goes no further, unless the environment misses something."""
        try:
            yield
        except EnvironmentMissing:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            self.failed.append(f"{name}: {type(error).__name__}: {reason}")
            print(f"failed: {self.failed[-1]}", file=sys.stderr)
            if not isinstance(error, torch.OutOfMemoryError):
                traceback.print_exception(error)


def measure(
    options: Options, trace: Path | None = None, keep: Callable[[Result], None] = lambda result: None
) -> Result:
    """A result as it is written to JSON. Raises EnvironmentMissing.

    trace: where a Chrome trace of a few launches of the last point is written. keep: gets the result so far after every
    point and when the run is cut short, "complete" false; the card's figures are null before the run has ended.
    """
    device = require_device()
    if options.baseline or options.check_output_diff:
        require_baseline()
    timer, found = Timer(options.profiler, options.repeats), Sweep(chips.of_device(device.name))
    card, source = Card(), provenance(device, code(options))

    def result(complete: bool) -> Result:
        return {
            "what": options.what(),
            **{name: value for name, value in source.items() if name != "code"},
            "regime": ", ".join(REGIMES[name] for name in options.regimes),
            "method": f"{timer.method}; at least {WARM_UPS} launches warm up; "
            "where calls take turns, the second of two flushed launches counts",
            "baseline": found.gemm,
            **figures(card.samples),
            "code": source["code"],
            "command": options.command(),
            "complete": complete,
            "failed": list(found.failed),
            "rows": [entry | card.during(*window) for entry, window in found.points],
        }

    with _sigterm_as_exception():
        try:
            with sampled(device) as card:
                sweep(options, timer, trace, found, lambda: keep(result(False)))
        except BaseException:
            if found.points or found.failed:
                keep(result(False))
            raise
    return result(True)


def code(options: Options) -> dict[str, dict[str, str]]:
    """Target -> entry -> code digest of what a run launches; the baseline's library has a column of its own."""
    program = moe.moe(options.granularity)
    silu = "fast" if options.fast_math else "precise"
    found = {program.name: program.compile().code(f"moe_{silu}")}
    if options.yardsticks:
        gemms = [f"dense_{group}" for group in dict.fromkeys(promotions(options.granularity))]
        found["dense"] = dense.PROGRAM.compile().code(*gemms)
        found["stream"] = stream.PROGRAM.compile().code("stream_read")
    return found


def provenance(device: Device, code: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Where and of what a result is measured; code: target -> entry -> code digest."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "nvrtc": nvrtc_version()}
    return {
        "device": device.name,
        "driver": device.driver,
        "versions": {**versions, "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
        "code": code,
    }


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """SIGTERM leaves the block as an exception, which tidies up, and ends the process as ever after that."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before != signal.SIG_DFL:
        yield  # somebody else's signal
        return

    def terminate(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Terminated:
        signal.signal(signal.SIGTERM, before)
        os.kill(os.getpid(), signal.SIGTERM)
        raise  # for a reader: the process has ended
    finally:
        signal.signal(signal.SIGTERM, before)


def sweep(
    options: Options,
    timer: Timer,
    trace: Path | None,
    found: Sweep | None = None,
    done: Callable[[], None] = lambda: None,
) -> Sweep:
    """Adds a row to `found` for every point, and calls `done` after each; progress goes to stderr."""
    found = Sweep() if found is None else found
    for preset in options.points:
        with found.point(preset):
            last = preset == list(options.points)[-1]
            _sweep_shape(options, preset, timer, trace if last else None, found, done)
        done()
        with suppress(RuntimeError):  # a context that an error has broken says so at the next shape
            torch.cuda.empty_cache()  # which needs the memory
    return found


def _sweep_shape(
    options: Options, preset: str, timer: Timer, trace: Path | None, found: Sweep, done: Callable[[], None]
) -> None:
    recipe = options.clamp, options.fast_math, options.granularity
    layer = Layer(options.shapes[preset], options.capacity_of(preset), options.seed, *recipe)
    yardsticks = Yardsticks(layer) if options.yardsticks else None
    unfused = Unfused(layer, options.baseline, options.check_output_diff)
    found.gemm, work = unfused.gemm, None

    def measured(point: Point, work: Work) -> None:
        calls = [Call("fused", KERNEL, work.call), *(yardsticks.calls(work.load) if yardsticks else ())]
        start = time.time()
        times = timer(calls, point.regime)
        window = start, time.time()
        layer.buffer.check()  # before y is looked at: a launch may have given up
        new = row(point, times, unfused.times(work, timer, point.regime), unfused.differing(work))
        found.points.append((new, window))
        print(f"{name} {REGIMES[point.regime]}: {new['us']} us", file=sys.stderr)

    for t, routing in itertools.product(options.points[preset], options.routings):
        name, work = f"{preset} T={t} {routing}", None
        with found.point(name):
            work = layer.route(t, routing)
        for regime in options.regimes if work else ():
            with found.point(f"{name} {REGIMES[regime]}"):
                point = Point(preset, routing, regime, work.load, options.clamp, layer.recipe.silu, found.chip)
                measured(point, work)
            done()
    if trace is not None and work is not None:
        with found.point("--trace"):
            write_trace(work.call, timer.flush, trace)
