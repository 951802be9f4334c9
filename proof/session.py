"""A session of pytest in a child process that its parent outlives, so that the status is outside the session's reach.

A test, a kernel or a thread may end its process at any point with any status, 0 included. The process that the shell
waits for therefore runs nothing of a session: it forks before anything of a test or of a kernel is imported, waits, and
believes only a session that has told its status at its end, in memory that both share.

Sessions that a program begins by pytest.main() stay in that program's process, which is not ours to end.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

SIZE, HEAD = 1 << 14, 8
"""Bytes of each of the two places of shared memory, and of a length before a text."""
STARTERS = ("console_main", "_console_main")
"""Functions of pytest that are the whole of a process: what they return is its exit status."""
PR_SET_PDEATHSIG = 1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
DIED = 1
"""Exit status of a session that did not come to its end: a failure."""


@dataclass(frozen=True)
class End:
    """How a session's process ended, as its parent knows it."""

    code: int
    """Of the process; a signal's number, negative."""
    status: int | None
    """What the session has told at its end; None: it has told nothing."""
    test: str
    """The test that ran last, and had not ended; '' outside of tests."""

    @property
    def how(self) -> str:
        """The end of the process in words."""
        return f"exit status {self.code}" if self.code >= 0 else signal.Signals(-self.code).name

    @property
    def exit_status(self) -> int:
        """What the shell is told: 0 only if the session said so and its process ended so."""
        if self.status is None:
            return DIED
        return self.status or (self.code if self.code >= 0 else DIED)


class Wire:
    """What the session's process tells its parent, in memory that both have: no process in between can hold it back."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2 * SIZE)

    def running(self, test: str) -> None:
        """A test has begun; '': it has ended."""
        self._write(0, test)

    def ended(self, status: int) -> None:
        """The session has ended with this status."""
        self._write(SIZE, status)

    def read(self, code: int) -> End:
        """All that was told by a process that has ended."""
        status = self._read(SIZE)
        return End(code, status if isinstance(status, int) else None, str(self._read(0) or ""))

    def _write(self, place: int, value: object) -> None:
        data = json.dumps(value).encode()
        if len(data) > SIZE - HEAD:
            data = json.dumps(str(value)[: SIZE // 8]).encode()
        self._memory[place : place + HEAD] = bytes(HEAD)  # a process that ends in the middle has told nothing
        self._memory[place + HEAD : place + HEAD + len(data)] = data
        self._memory[place : place + HEAD] = len(data).to_bytes(HEAD, "little")

    def _read(self, place: int) -> object:
        length = int.from_bytes(self._memory[place : place + HEAD], "little")
        return json.loads(self._memory[place + HEAD : place + HEAD + length]) if length else None


def is_whole_process() -> bool:
    """Whether this session of pytest is all that its process is there for."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_name in STARTERS and frame.f_globals.get("__name__") == "_pytest.config":
            return True
    return False


def split(died: Callable[[End], None]) -> Wire:
    """Returns in a child process, which goes on with the session; the parent never returns.

    died: called in the parent if the session did not tell its end, or its process did not end as it had told.
    """
    line, parent = Wire(), os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    watched = {signal.SIGCHLD, *FORWARDED}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _end_with(parent)
        return line
    status = DIED
    try:
        end = line.read(_outlive(child, watched))
        status = end.exit_status
        if end.status is None or (status and not end.status):
            died(end)
    finally:
        os._exit(status)


def _end_with(parent: int) -> None:
    """This process is killed when its parent is: a caller that kills a run after a time limit ends all of it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _outlive(child: int, watched: set[signal.Signals]) -> int:
    """Waits for a child and passes on what is sent to this process alone; a terminal's Ctrl-C reaches both."""
    while True:
        told = signal.sigwaitinfo(watched)
        if told.si_signo == signal.SIGCHLD:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
        elif told.si_code <= 0:  # sent by a process, not by the kernel
            os.kill(child, told.si_signo)
