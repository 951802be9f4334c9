"""What goes wrong in a rank: hooks for `before=` of proof/worlds/gloo.py, which run inside the ranks.

Each rank imports this module, so it imports little.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from megaproof.reference.exchange import Exchange


class Failing:
    """The exchange of a rank that does something else instead of its second exchange: the others wait inside it."""

    def __init__(self, exchange: Exchange, fault: Callable[[], None]) -> None:
        self.exchange, self.fault, self.calls = exchange, fault, 0

    def all_to_all(self, messages: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        if self.calls == 2:
            self.fault()
        return self.exchange.all_to_all(messages)


def _noted(exchange: Exchange, rank: int, faulty: int, fault: Callable[[], None]) -> Exchange:
    """Leaves this process's id in the folder that a test made for it."""
    Path(os.environ["MEGAPROOF_TEST_PIDS"], str(os.getpid())).touch()
    return Failing(exchange, fault) if rank == faulty else exchange


def raising(exchange: Exchange, rank: int) -> Exchange:
    def fault() -> None:
        raise OverflowError("a fault of the test")

    return _noted(exchange, rank, 1, fault)


def killed(exchange: Exchange, rank: int) -> Exchange:
    return _noted(exchange, rank, 2, lambda: os.kill(os.getpid(), signal.SIGKILL))


def leaving(exchange: Exchange, rank: int) -> Exchange:
    """Ends with exit status 0, as if all were well."""

    def fault() -> None:
        print("on my way out", flush=True)
        os._exit(0)

    return _noted(exchange, rank, 0, fault)


def stopped(exchange: Exchange, rank: int) -> Exchange:
    """A rank that is stopped answers nothing, and can be killed."""
    return _noted(exchange, rank, 1, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def hanging(exchange: Exchange, rank: int) -> Exchange:
    return _noted(exchange, rank, 1, sleep_for_ever)


def sleep_for_ever() -> None:
    Path(os.environ["MEGAPROOF_TEST_PIDS"]).with_suffix(".hangs").touch()
    while True:
        time.sleep(3600)
