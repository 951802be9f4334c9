"""Which rank ends a run, and why: judged from what the ranks leave behind, without processes, files or a clock.

A rank leaves a `Mark` whenever it gets on. Time counts from marks: a rank hangs when the others wait for it and it has
left no mark for a while, however long the run has taken. Time in which nobody looked does not count, so that a machine
that is busy or was suspended convicts nobody. `gloo.py` shows the supervisor what it sees; tests show it what they
like.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["raised", "died", "hung", "late"]
"""What ended a run: an exception in a rank, the end of its process, a rank without progress, or a run that still makes
progress after all the time it was given."""

LONGEST_LOOK_S = 1.0
"""How much time may count between two looks. Looks come every 50 ms; a longer gap is a machine with other things to
do."""


@dataclass(frozen=True)
class Limits:
    """How long each thing may take, in seconds that somebody looked."""

    start_s: float = 300.0
    """Until a rank leaves its first mark: an interpreter starts and imports torch, which takes seconds on an idle
    machine and has taken half a minute on a busy one."""
    quiet_s: float = 120.0
    """Between two marks of a rank. The longest step between marks, one expert of the largest shape, takes seconds."""
    whole_s: float = 3600.0
    """The whole run. The largest case of the gate takes half a minute on two cores."""
    echo_s: float = 10.0
    """How long the failure of a rank whose peer is gone waits for the cause, once nothing else happens."""

    def __post_init__(self) -> None:
        """inf is no limit. Raises ValueError for what is no time: 0, less, or NaN."""
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} = {value} must be more than 0 seconds")


@dataclass(frozen=True)
class Mark:
    """Where a rank is."""

    number: int
    """Of this mark; each is one larger than the one before it."""
    exchange: int
    """How many times this rank has begun to wait for all the others, the rendezvous included."""
    waits: bool
    """Whether it is in such a wait now: then its silence is the fault of a rank that is not."""
    text: str
    """The same in words, such as 'computing, 3 of 8 experts done'."""

    def to_json(self) -> str:
        """One line; inverse of `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Mark:
        """Raises TypeError or ValueError for anything that `to_json` has not made."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class View:
    """What can be seen of one rank at one moment."""

    mark: Mark | None = None
    """Its last one; None: it has not started."""
    code: int | None = None
    """Exit status of its process, negative when a signal ended it; None while it runs."""
    result: bool = False
    """Whether it has left its result."""
    raised: str | None = None
    """The last line of its traceback, where it raised."""
    echo: bool = False
    """Whether what it raised only says that another rank is gone."""
    stopped: bool = False
    """Whether its process is stopped (SIGSTOP), so that it can't answer."""

    @property
    def runs(self) -> bool:
        """Whether its process has not ended."""
        return self.code is None

    @property
    def failed(self) -> bool:
        """Whether it has ended otherwise than with status 0 and a result."""
        return self.code is not None and (self.code != 0 or not self.result)

    def where(self) -> str:
        """Where the rank is, in words."""
        text = self.mark.text if self.mark else "has not started"
        return f"{text}, and its process is stopped" if self.stopped else text


@dataclass(frozen=True)
class Finding:
    """The rank that ended the run."""

    rank: int
    kind: Kind
    how: str
    """One line."""


class Supervisor:
    """Judges one run from one look after another."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        """clock: returns seconds that never go back, such as time.monotonic."""
        self.limits = limits
        self._clock = clock
        self._last_look: float | None = None
        self._now = 0.0
        self._views: list[View] = []
        self._changed: list[float] = []
        """When each rank's view was last seen to change."""

    def look(self, views: Sequence[View], lost: bool = False) -> Finding | Literal["done"] | None:
        """What is known now: the rank that ended the run; 'done' when each has left a result; None: wait on.

        views: of every rank. lost: whether the process that forks the ranks has ended, and with it they; it has to
        be asked before the views are taken, since its end comes after the ranks'.
        """
        self._tick(views)
        failures = [rank for rank, view in enumerate(views) if view.failed]
        for rank in failures:
            if not views[rank].echo:
                return self._failure(rank)
        if failures:
            if self._now - max(self._changed) >= self.limits.echo_s or not any(view.runs for view in views):
                return self._failure(failures[0])
            return None
        running = [rank for rank, view in enumerate(views) if view.runs]
        if not running:
            return "done"
        if lost:
            return Finding(running[0], "died", "the process that forks the ranks has ended, and they with it")
        rank = self._waited_for(running)
        silence = self._silence(rank)
        if silence >= self._allowed(rank):
            if views[rank].mark is None:
                return Finding(rank, "hung", f"{views[rank].where()} after {silence:.0f} s")
            return Finding(rank, "hung", f"no progress for {silence:.0f} s, {views[rank].where()}")
        if self._now >= self.limits.whole_s:
            return Finding(rank, "late", f"the run has not ended after {self._now:.0f} s; {views[rank].where()}")
        return None

    def _tick(self, views: Sequence[View]) -> None:
        now = self._clock()
        if self._last_look is None:
            self._views, self._changed = list(views), [0.0] * len(views)
        else:
            self._now += min(now - self._last_look, LONGEST_LOOK_S)
        self._last_look = now
        for rank, (before, view) in enumerate(zip(self._views, views, strict=True)):
            # The kernel's word that a process is stopped is no progress of that process.
            if dataclasses.replace(before, stopped=view.stopped) != view:
                self._changed[rank] = self._now
        self._views = list(views)

    def _failure(self, rank: int) -> Finding:
        view = self._views[rank]
        if view.raised is not None:
            return Finding(rank, "raised", view.raised)
        return Finding(rank, "died", f"{status(view.code)}, {view.where()}")

    def _waited_for(self, running: Sequence[int]) -> int:
        """The running rank that the others wait for.

        A rank that waits for all the others is to blame only if every running rank waits; then it is one in the
        earliest exchange. Of several, one that is overdue comes first; among those one whose process is stopped, then
        the one that has got least far, then the one that has been silent longest.
        """
        busy = [rank for rank in running if not self._waits(rank)]
        return min(
            busy or running,
            key=lambda rank: (
                self._silence(rank) < self._allowed(rank),
                not self._views[rank].stopped,
                self._exchange(rank),
                -self._silence(rank),
                rank,
            ),
        )

    def _silence(self, rank: int) -> float:
        """How long a rank has left no mark. Ranks that wait together wait since the last of them came."""
        return self._now - (max(self._changed) if self._waits(rank) else self._changed[rank])

    def _allowed(self, rank: int) -> float:
        return self.limits.start_s if self._views[rank].mark is None else self.limits.quiet_s

    def _waits(self, rank: int) -> bool:
        mark = self._views[rank].mark
        return mark is not None and mark.waits

    def _exchange(self, rank: int) -> int:
        mark = self._views[rank].mark
        return mark.exchange if mark else -1


def status(code: int | None) -> str:
    """'exit status 1', or 'signal SIGKILL' for -9."""

    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
