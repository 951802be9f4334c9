"""Device times of several calls in one run, in turn: every share and ratio is of the same card at the same time."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch

WARM_UPS, LEAST_REPEATS = 3, 20
FLUSH_BYTES, FLUSHES = 1 << 30, 8
"""8 GiB of memset, as the peers' measurements have: L2 holds none of our bytes, the host runs ahead of the device, and
the card is not hot from the launch before. With 1 GiB the same GEMM ran up to 15 % slower, at the power limit."""
TURN = 2
"""Launches of a flushed turn where calls take turns, of which the last counts: the first brings back the call's code,
which the other calls displaced from the instruction caches. So a time is that of the kernel alone, as the peers' are.
On an H200 an earlier build took 74.7 us at T=1 straight after the yardsticks, 69 alone; at T=8 194 and 183."""
ROUNDS = 3
"""In the sustained regime the calls take turns as often, each back to back for a while."""
SUSTAINED_US, MOST_LAUNCHES = 200_000, 1000
"""A turn of a call lasts as long, so that clock and power settle, or as many launches: the profiler keeps them all."""
REGIMES = {"flush": "l2 flushed", "sustained": "sustained"}


@dataclass(frozen=True)
class Call:
    """Something to time; `kernel` is in the name of every kernel that it launches."""

    name: str
    kernel: str
    run: Callable[[], None]


@dataclass(frozen=True)
class Schedule:
    """Rounds in which each call has its turn: so many launches, of which the last `keep` count."""

    rounds: int
    skip: int
    """First rounds that do not count."""
    launches: dict[str, int]
    keep: int
    flush: bool
    """L2 is flushed before every launch."""

    def kept(self, name: str, times: list[float]) -> list[float]:
        """Those of a call's times, one a launch in the order of launches, that count."""
        n = self.launches[name]
        turns = [times[r * n : (r + 1) * n] for r in range(self.skip, self.rounds)]
        return [time for turn in turns for time in turn[-self.keep :]]


def flushed(calls: list[Call], repeats: int) -> Schedule:
    """One launch a turn counts, L2 flushed before it; where there are others, a launch of its own goes before it."""
    launches = TURN if len(calls) > 1 else 1
    return Schedule(WARM_UPS + repeats, WARM_UPS, {call.name: launches for call in calls}, 1, True)


def sustained(estimates: dict[str, float], repeats: int) -> Schedule:
    """Launches back to back; estimates are each call's us, from which follows how many fill a turn."""
    keep = ceil(repeats / ROUNDS)
    least = WARM_UPS + keep
    launches = {n: max(least, min(MOST_LAUNCHES, ceil(SUSTAINED_US / us))) for n, us in estimates.items()}
    return Schedule(ROUNDS, 0, launches, keep, False)


def by_launch(times: list[float], launches: int) -> list[float] | None:
    """Kernel times, in order -> one sum a launch; None when they are not the same number for each."""
    kernels, rest = divmod(len(times), launches)
    if rest or not kernels:
        return None
    return [sum(times[n : n + kernels]) for n in range(0, len(times), kernels)]


def spread(times: list[float]) -> float:
    """Half the distance from the 10th to the 90th percentile."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return (tenths[-1] - tenths[0]) / 2


class Timer:
    """Device times: the profiler's, or CUDA events around a graph of the call."""

    def __init__(self, profiler: bool, repeats: int) -> None:
        self.repeats, self.profiler = repeats, profiler
        self.method = "profiler (CUPTI) kernel durations" if profiler else ""
        self._flushed: torch.Tensor | None = None

    def flush(self) -> None:
        """Queues the memsets."""
        if self._flushed is None:
            self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        for _ in range(FLUSHES):
            self._flushed.zero_()

    def __call__(self, calls: list[Call], regime: str) -> dict[str, list[float]]:
        """Microseconds of the launches of each call that count; regime is a key of REGIMES."""
        schedule = self._schedule(calls, regime)
        if self.profiler:
            times = self._profiled(calls, schedule)
            if times is not None:
                return times
            self.profiler, self.method = False, ""
        return self.by_events(calls, schedule)

    def spans(self, call: Call, regime: str) -> list[float]:
        """The same of one call, by events even where the profiler is used: from first start to last end."""
        return self.by_events([call], self._schedule([call], regime))[call.name]

    def _schedule(self, calls: list[Call], regime: str) -> Schedule:
        for call in calls:
            call.run()
        torch.cuda.synchronize()
        if regime == "flush":
            return flushed(calls, self.repeats)
        return sustained({call.name: _estimate(call.run) for call in calls}, self.repeats)

    def _run(self, calls: list[Call], schedule: Schedule) -> None:
        for _ in range(schedule.rounds):
            for call in calls:
                for _ in range(schedule.launches[call.name]):
                    if schedule.flush:
                        self.flush()
                    call.run()
        torch.cuda.synchronize()

    def _profiled(self, calls: list[Call], schedule: Schedule) -> dict[str, list[float]] | None:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self._run(calls, schedule)
        kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels.sort(key=lambda event: event.time_range.start)
        found = {}
        for call in calls:
            times = [e.time_range.elapsed_us() for e in kernels if call.kernel in e.name]
            launches = schedule.rounds * schedule.launches[call.name]
            summed = by_launch(times, launches)
            if summed is None:
                saw = f"the profiler saw {len(times)} kernels of {call.name} in {launches} launches"
                print(f"{saw}: using events from here", file=sys.stderr)
                return None
            found[call.name] = schedule.kept(call.name, summed)
        return found

    def by_events(self, calls: list[Call], schedule: Schedule) -> dict[str, list[float]]:
        """As a call of the timer, whatever kernels the calls launch: from the first's start to the last's end."""
        pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {call.name: [] for call in calls}

        def recorded(call: Call) -> Call:
            launch, what = captured(call.run)
            self.method = self.method or f"CUDA events around {what}"

            def run() -> None:
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                launch()
                after.record()
                pairs[call.name].append((before, after))

            return Call(call.name, call.kernel, run)

        self._run([recorded(call) for call in calls], schedule)
        times = {name: [1e3 * before.elapsed_time(after) for before, after in own] for name, own in pairs.items()}
        return {name: schedule.kept(name, own) for name, own in times.items()}


def _estimate(run: Callable[[], None]) -> float:
    """Microseconds a launch, roughly; never 0."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(WARM_UPS):
        run()
    after.record()
    torch.cuda.synchronize()
    return max(1e3 * before.elapsed_time(after) / WARM_UPS, 1.0)


def captured(run: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """A graph keeps the host's share of a call out of the time between two events."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, "the call (it cannot be captured)"
    return graph.replay, "a graph of the call"
