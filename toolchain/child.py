"""Processes of our own: the same interpreter and the very same megaproof, wherever the caller is.

A child is `python -P -m megaproof.<module>` in the caller's working directory. The folder that holds megaproof comes
first on its PYTHONPATH, so neither a file beside the caller nor another copy of this project takes a module's place;
the caller's directory comes last, so that a user's own adapter is found there, unless the caller runs without it
(`python -P`, PYTHONSAFEPATH).

Where many children would each import the same again, a `Template` imports it once and forks them: see template.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import megaproof

ROOT = Path(megaproof.__file__).resolve().parents[1]
"""What has to be on the path of imports: the checkout's root, or the folder that a wheel was installed into."""
REQUEST_BYTES = 8
"""Of a request to a template, as template.py says."""
CLOSE_S = 1.0
"""How long the end of a template is waited for, so that no zombie is left where nobody else uses it."""
END_S = 60.0
"""How long a child that was killed may take to end. It takes milliseconds, unless the machine stands still."""


def command(module: str, *arguments: str) -> list[str]:
    """The words that start `megaproof.<module>`; its environment has to be that of `environment`."""
    return [sys.executable, "-P", "-m", f"megaproof.{module}", *arguments]


def environment(**changes: str) -> dict[str, str]:
    """The caller's environment with these changes, in which megaproof and what lies beside the caller are found."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if not sys.flags.safe_path:
        paths.append(str(Path.cwd()))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **changes}


def start(module: str, *arguments: str, changes: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
    """Starts `megaproof.<module>`. changes: of the environment; options: those of subprocess.Popen."""
    return subprocess.Popen(command(module, *arguments), env=environment(**(changes or {})), **options)


class TemplateLost(RuntimeError):
    """The template process has ended, or could not start; what it forked has ended with it."""


class Template:
    """A process that has imported and loaded what its children need, and forks them.

    It has one thread, so that a fork of it is as good as a new process. A process that is forked from the one that made
    the template may use it as well. It ends when all of them have ended or have closed it.
    """

    def __init__(self, prepare: str) -> None:
        """prepare: 'module:function', which imports and loads. Raises TemplateLost, with what was printed."""
        self._control, its = socket.socketpair()
        self._owner = os.getpid()
        # numpy's OpenBLAS starts threads when it is imported, unless told not to; a child's own environment follows.
        environ = environment(OPENBLAS_NUM_THREADS="1")
        with its, tempfile.TemporaryFile("w+") as printed:
            words = command("toolchain.template", str(its.fileno()), prepare)
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": printed, "stderr": printed}
            # Its own session: an interrupt of the terminal reaches the caller alone.
            self._process = subprocess.Popen(
                words, env=environ, pass_fds=[its.fileno()], start_new_session=True, **streams
            )
            its.close()
            if self._control.recv(64) != b"ready\n":
                self._control.close()
                self._process.wait()
                printed.seek(0)
                raise TemplateLost(f"a template of processes could not start with {prepare}:\n{printed.read()}")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def lost(self) -> bool:
        """Whether it has ended."""
        # It never says more than that it is ready, so what can be read is the end of the stream.
        return _readable(self._control, 0.0)

    def fork(
        self,
        function: str,
        argument: Any,
        output: IO[Any],
        errors: IO[Any] | None = None,
        *,
        folder: Path | None = None,
        environ: dict[str, str] | None = None,
    ) -> Forked:
        """A child that calls `function` ('module:function') with `argument`, and exits with what it returns.

        argument: anything that JSON can carry. output: the file that it prints to. errors: the file of its standard
        error, default: output. folder: its working directory, default: the caller's. environ: all of its environment,
        PYTHONPATH for its imports; default: `environment()`.

        Raises TemplateLost if the template has ended.
        """
        request = {
            "function": function,
            "argument": argument,
            "folder": str(folder or Path.cwd()),
            "environment": environ if environ is not None else environment(),
        }
        channel, its = socket.socketpair()
        try:
            with its, tempfile.TemporaryFile("w", encoding="utf-8") as said:
                json.dump(request, said)
                said.flush()
                caller = os.getpid().to_bytes(REQUEST_BYTES, "little")
                files = (its, said, output, errors or output)
                socket.send_fds(self._control, [caller], [file.fileno() for file in files])
        except ConnectionError as error:
            channel.close()
            raise TemplateLost("the template of processes has ended") from error
        return Forked(channel)

    def close(self) -> None:
        """Ends it, unless a fork of the owner still uses it. A second call does nothing."""
        self._control.close()
        if os.getpid() == self._owner:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_S)


class Forked:
    """A child of a template. Closed, forgotten or left behind by the end of this process, it is killed."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._said, self._ended = channel, b"", False
        self._read(None, 1)
        self.pid = int(self._said.split(b"\n")[0] or -1)
        """Its process id, and that of its process group; -1 if its template was lost before it began."""

    def poll(self) -> int | None:
        """Its exit status, negative when ended by that signal; None while it runs, and if its template was lost."""
        self._read(0.0, 2)
        _, *after = self._said.split(b"\n")[:-1]
        return int(after[0]) if after else None

    @property
    def lost(self) -> bool:
        """Whether its template ended first, so that nobody knows its status; it has been killed."""
        return self.poll() is None and self._ended

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired while it runs on, TemplateLost if nobody knows it."""
        self._read(timeout_s, 2)
        code = self.poll()
        if code is None and self._ended:
            raise TemplateLost("the template of processes has ended")
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout_s or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Sends it a signal; nothing happens if it has ended."""
        with contextlib.suppress(OSError):
            self._channel.send(bytes([number]))

    def close(self) -> None:
        """Kills it and its process group if it still runs, and returns when it has ended. It may be called again."""
        self.send_signal(signal.SIGKILL)
        self._read(END_S, 2)
        self._ended = True
        self._channel.close()

    def _read(self, timeout_s: float | None, lines: int) -> None:
        """Waits for so many lines in all: the process id, then the status."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._said.count(b"\n") < lines and not self._ended:
            if not _readable(self._channel, deadline and max(0.0, deadline - time.monotonic())):
                return
            try:
                said = self._channel.recv(64)
            except ConnectionError:
                said = b""
            self._ended = not said
            self._said += said


def _readable(channel: socket.socket, timeout_s: float | None) -> bool:
    """Whether something, or the end, can be read within this time; None waits for it."""
    with selectors.DefaultSelector() as selector:  # select() takes no descriptor above 1023
        selector.register(channel, selectors.EVENT_READ)
        return bool(selector.select(timeout_s))
