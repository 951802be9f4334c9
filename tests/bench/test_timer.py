"""The benchmark's clock: turns, what counts of them, and kernels that belong to one launch. No GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaproof.bench.measure import timer
from megaproof.bench.measure.timer import MOST_LAUNCHES, ROUNDS, SUSTAINED_US, WARM_UPS, Call, Schedule, Timer


def test_flushed_launches_take_turns() -> None:
    schedule = timer.flushed([Call("a", "", print), Call("b", "", print)], 5)
    assert schedule == Schedule(WARM_UPS + 5, WARM_UPS, {"a": 2, "b": 2}, 1, True)
    times = [float(n) for n in range(2 * (WARM_UPS + 5))]
    assert schedule.kept("a", times) == times[2 * WARM_UPS + 1 :: 2], "the second of each turn"


def test_every_launch_of_a_single_flushed_call_counts() -> None:
    schedule = timer.flushed([Call("a", "", print)], 5)
    assert schedule == Schedule(WARM_UPS + 5, WARM_UPS, {"a": 1}, 1, True)
    times = [float(n) for n in range(WARM_UPS + 5)]
    assert schedule.kept("a", times) == times[WARM_UPS:]


@given(st.floats(1, 1e6), st.integers(2, 200))
def test_a_sustained_turn_is_long_but_not_endless(us: float, repeats: int) -> None:
    schedule = timer.sustained({"a": us}, repeats)
    launches = schedule.launches["a"]
    assert launches >= WARM_UPS + schedule.keep
    assert launches * us >= SUSTAINED_US or launches >= MOST_LAUNCHES
    times = [float(n) for n in range(schedule.rounds * launches)]
    kept = schedule.kept("a", times)
    assert len(kept) == ROUNDS * schedule.keep >= repeats
    assert kept[-1] == times[-1]
    assert kept[: schedule.keep] == times[launches - schedule.keep : launches]
    assert not schedule.flush


def test_kernels_of_a_launch_are_added() -> None:
    assert timer.by_launch([1.0, 2.0, 3.0, 4.0], 2) == [3.0, 7.0]
    assert timer.by_launch([1.0, 2.0], 2) == [1.0, 2.0]
    assert timer.by_launch([1.0, 2.0, 3.0], 2) is None
    assert timer.by_launch([], 2) is None


def test_the_spread_is_half_of_p90_less_p10() -> None:
    assert timer.spread([float(n) for n in range(101)]) == pytest.approx(40.0)
    assert timer.spread([7.0, 7.0]) == 0.0


MEMSET = ("Memset (Device)", 99.0)


class FakeProfile:
    """A profiler that saw what the calls wrote to `log`: (name, start, us)."""

    log: list[tuple[str, float]]

    def __init__(self, activities: object) -> None:
        FakeProfile.log = []

    def __enter__(self) -> FakeProfile:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def events(self) -> list[SimpleNamespace]:
        cuda = torch.autograd.DeviceType.CUDA
        kernels = [
            SimpleNamespace(
                name=name, device_type=cuda, time_range=SimpleNamespace(start=n, elapsed_us=lambda us=us: us)
            )
            for n, (name, us) in enumerate(self.log)
        ]
        host = SimpleNamespace(name="moe_launch", device_type=torch.autograd.DeviceType.CPU, time_range=None)
        return [host, *reversed(kernels)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Timer:
    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    made = Timer(True, 4)
    monkeypatch.setattr(made, "flush", lambda: FakeProfile.log.append(MEMSET))
    FakeProfile.log = []
    return made


def launching(*kernels: tuple[str, float]) -> Call:
    return Call(kernels[0][0], kernels[0][0], lambda: FakeProfile.log.extend(kernels))


def test_a_profile_is_sorted_out_by_call(clock: Timer) -> None:
    """One of the calls launches two kernels; flushes, the host and kernels of others do not count."""
    calls = [launching(("moe_fast", 5.0), ("moe_fast_2", 6.0)), launching(("stream_read", 3.0))]
    assert clock(calls, "flush") == {"moe_fast": [11.0] * 4, "stream_read": [3.0] * 4}
    turn = [*2 * [MEMSET, ("moe_fast", 5.0), ("moe_fast_2", 6.0)], *2 * [MEMSET, ("stream_read", 3.0)]]
    assert FakeProfile.log == (WARM_UPS + 4) * turn, "each launch has its flush, and the calls take turns"


def test_a_launch_straight_after_another_call_does_not_count(clock: Timer) -> None:
    """Its code has been displaced from the instruction caches, which shows."""

    def run(name: str) -> None:
        before = [kernel for kernel in FakeProfile.log if kernel != MEMSET]
        FakeProfile.log.append((name, 69.0 if before and before[-1][0] == name else 74.7))

    calls = [Call(name, name, lambda name=name: run(name)) for name in ("moe_fast", "stream_read")]
    assert clock(calls, "flush") == {"moe_fast": [69.0] * 4, "stream_read": [69.0] * 4}


def test_by_events_the_second_launch_of_a_turn_counts_too(clock: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            self.at = len(FakeProfile.log)

        def elapsed_time(self, after: Event) -> float:
            assert FakeProfile.log[self.at - 1] == MEMSET, "the flush lies before the time"
            return sum(us for _, us in FakeProfile.log[self.at : after.at]) / 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timer, "captured", lambda run: (run, "the call"))
    launches = {"a": 0, "b": 0}

    def run(name: str) -> None:
        FakeProfile.log.append((name, float(launches[name])))
        launches[name] += 1

    calls = [Call(name, name, lambda name=name: run(name)) for name in launches]
    found = clock.by_events(calls, timer.flushed(calls, 4))
    assert found == {name: pytest.approx([7.0, 9.0, 11.0, 13.0]) for name in launches}


def test_a_sustained_turn_has_no_flush(clock: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "_estimate", lambda run: SUSTAINED_US / 10)
    calls = [launching(("moe_fast", 5.0)), launching(("stream_read", 3.0))]
    assert clock(calls, "sustained") == {"moe_fast": [5.0] * 6, "stream_read": [3.0] * 6}
    assert FakeProfile.log == ROUNDS * [*10 * [("moe_fast", 5.0)], *10 * [("stream_read", 3.0)]]


def test_without_kernels_in_the_profile_events_are_used(
    clock: Timer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clock, "by_events", lambda calls, schedule: {call.name: [1.0] for call in calls})
    lost = Call("fused", "moe_", lambda: None)
    assert clock([lost], "flush") == {"fused": [1.0]}
    assert "the profiler saw 0 kernels of fused in 7 launches: using events from here" in capsys.readouterr().err
    assert not clock.profiler
