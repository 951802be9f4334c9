"""Launches on one buffer from several streams, threads and captures: their order, on a driver that is made up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megaproof.kernel import api
from megaproof.kernel.host.sizes import ConfigError
from megaproof.tests.support.fake_call import BF16, HIDDEN, FakeLibrary, call, installed
from megaproof.toolchain import launch
from megaproof.toolchain.errors import LaunchError


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return installed(monkeypatch)


EAGER: dict[int, int] = {}
ORDERS = {
    "one stream": ([(0, EAGER)] * 3, []),
    "there and back": ([(0, EAGER), (7, EAGER), (7, EAGER), (0, EAGER)], [(7, 0), (0, 7)]),
    "a capture waits for nothing outside": ([(0, EAGER), (7, {7: 1}), (0, EAGER)], []),
    "nothing waits for a capture": ([(7, {7: 1}), (0, EAGER), (8, EAGER)], [(8, 0)]),
    "two streams of one capture": (
        [(0, EAGER), (7, {7: 1, 8: 1}), (8, {7: 1, 8: 1}), (7, {7: 1, 8: 1})],
        [(8, 7), (7, 8)],
    ),
    "the eager stream is captured and forks": ([(7, EAGER), (7, {7: 1}), (8, {7: 1, 8: 1})], [(8, 7)]),
    "a fork is captured first": ([(7, EAGER), (8, {7: 1, 8: 1}), (7, {7: 1, 8: 1})], [(8, 7), (7, 8)]),
    "two captures": ([(7, {7: 1}), (8, {8: 2}), (9, {9: 3})], []),
    "a capture, then two streams": ([(3, EAGER), (7, {7: 1}), (4, EAGER), (3, EAGER)], [(4, 3), (3, 4)]),
    "launches beside a capture": ([(3, EAGER), (7, {7: 1}), (4, {7: 1}), (8, {7: 1, 8: 1})], [(4, 3), (8, 7)]),
}
"""Launches, each (current stream, stream -> capture that it is in) -> (stream, the one that it waits for)."""


@pytest.mark.parametrize("order", ORDERS)
def test_launches_wait_for_the_one_before(library: FakeLibrary, order: str) -> None:
    good = call()
    launches, waits = ORDERS[order]
    for library.stream, library.captures in launches:
        api.fp8_mega_moe(**good)
    assert library.waits == waits
    assert len(library.launches) == len(launches)


def test_a_stream_that_nothing_can_wait_for_is_refused(library: FakeLibrary) -> None:
    """The last launch may still run, and its stream is being captured now."""
    good = call()
    api.fp8_mega_moe(**good)
    library.stream, library.captures = 5, {0: 1}
    with pytest.raises(ConfigError, match="sym_buffer was last used on a stream that is now in a CUDA graph capture"):
        api.fp8_mega_moe(**good)
    library.captures = {}
    api.fp8_mega_moe(**good)
    assert library.waits == [(5, 0)]


def test_buffers_do_not_wait_for_each_other(library: FakeLibrary) -> None:
    first, second = call(), call()
    for library.stream, arguments in ((0, first), (1, second), (0, first), (1, second)):
        api.fp8_mega_moe(**arguments)
    assert library.waits == []


def test_a_refused_call_is_no_launch(library: FakeLibrary) -> None:
    good = call()
    api.fp8_mega_moe(**good)
    library.stream = 7
    with pytest.raises(ConfigError):
        api.fp8_mega_moe(**good | {"y": None})
    library.stream = 0
    api.fp8_mega_moe(**good)
    assert library.waits == []


# --- what the driver is asked ----------------------------------------------------------------------------------------


class Enum(int):
    """A number that prints as one of the driver's names."""

    name = "CUDA_ERROR_INVALID_VALUE"


class FakeDriver:
    """Answers like cuda.bindings, and keeps what it was asked."""

    CUstream = staticmethod(lambda handle: ("stream", handle))

    class CUevent_flags:
        CU_EVENT_DISABLE_TIMING = 2

    class CUstreamCaptureStatus:
        CU_STREAM_CAPTURE_STATUS_ACTIVE = 1

    def __init__(self, failing: str = "", captured: int = 0) -> None:
        self.asked: list[tuple] = []
        self.failing, self.captured = failing, captured

    def cuCtxGetCurrent(self) -> tuple:
        return 0, 1

    def cuStreamGetCaptureInfo(self, stream: Any) -> tuple:
        return 0, int(bool(self.captured)), self.captured, None, None, None, 0

    def __getattr__(self, name: str) -> Callable[..., tuple]:
        def answer(*arguments: Any) -> tuple:
            self.asked.append((name, *arguments))
            code = Enum(name == self.failing)
            return (code, "event") if name == "cuEventCreate" else (code,)

        return answer


WAITED = [
    ("cuEventCreate", 2),
    ("cuEventRecord", "event", ("stream", 0)),
    ("cuStreamWaitEvent", ("stream", 7), "event", 0),
    ("cuEventDestroy", "event"),
]


def test_one_stream_waits_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an event that is recorded on the one, the legacy default stream too, and waited for on the other."""
    driver = FakeDriver()
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    launch.wait_for(7, 0, 0)
    assert driver.asked == WAITED


def test_an_event_that_fails_is_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(failing="cuEventRecord")
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    with pytest.raises(LaunchError, match="cuEventRecord failed: CUDA_ERROR_INVALID_VALUE"):
        launch.wait_for(7, 0, 0)
    assert driver.asked == [*WAITED[:2], WAITED[3]]


def test_a_capture_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 41):
        monkeypatch.setattr(launch, "_driver", lambda number=number: FakeDriver(captured=number))
        assert launch.capture_of(0, 0) == number


def test_the_driver_has_these_calls() -> None:
    driver = launch._driver()
    assert all(callable(getattr(driver, name)) for name, *_ in WAITED)
    assert callable(driver.cuStreamGetCaptureInfo)
    assert int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING) == 2
    assert int(driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE) == 1


# --- threads ---------------------------------------------------------------------------------------------------------


class AskedFor:
    """A lock that says when a second thread has asked for it."""

    def __init__(self) -> None:
        self.lock, self.second, self.entered = threading.Lock(), threading.Event(), 0

    def __enter__(self) -> None:
        self.entered += 1
        if self.entered == 2:
            self.second.set()
        self.lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self.lock.release()


def test_every_thread_launches_its_own_y(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is about to launch when the second calls: it asks for the lock, or it has changed the first one's y."""
    good = call()
    buffer = good["sym_buffer"]
    api.fp8_mega_moe(**good)
    buffer.lock = lock = AskedFor()
    ys = {number: torch.zeros(number, HIDDEN, dtype=BF16) for number in (1, 2)}
    threads = {n: threading.Thread(target=api.fp8_mega_moe, kwargs=good | {"y": y}) for n, y in ys.items()}
    found: dict[threading.Thread, tuple[int, int]] = {}

    def kernel(name: str) -> Callable[..., None]:
        def launched(params: Any, *sizes: int, **options: Any) -> None:
            me = threading.current_thread()
            if me is threads[1]:
                threads[2].start()
                assert lock.second.wait(30)
            else:
                lock.second.set()
            found[me] = params.ranks[0].outputs.y_ptr, params.ranks[0].num_tokens

        return launched

    monkeypatch.setattr(library, "kernel", kernel)
    threads[1].start()
    for number in (1, 2):
        threads[number].join(60)
    assert found == {threads[number]: (y.data_ptr(), number) for number, y in ys.items()}


@pytest.mark.parametrize("method", ["destroy", "check"])
def test_a_buffer_is_destroyed_and_checked_between_calls(library: FakeLibrary, method: str) -> None:
    buffer = call()["sym_buffer"]
    buffer.lock = lock = AskedFor()
    getattr(buffer, method)()
    assert lock.entered == 1


def test_a_refused_call_lets_go_of_the_lock(library: FakeLibrary) -> None:
    good = call()
    for wrong in ({"y": None}, {"l1_weights": None}):
        with pytest.raises(ConfigError):
            api.fp8_mega_moe(**good | wrong)
    api.fp8_mega_moe(**good)
    good["sym_buffer"].destroy()
    for _ in range(2):
        with pytest.raises(ConfigError, match="sym_buffer was destroyed"):
            api.fp8_mega_moe(**good)
