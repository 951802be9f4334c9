"""What a `child.Template` runs: imports once, then one fork of this process for each child that is asked for.

`python -P -m megaproof.toolchain.template CONTROL PREPARE`. CONTROL is the descriptor of a socket, PREPARE names the
function (module:function) that imports and loads what all children need; it may leave no thread behind, since a fork
copies only the thread that forks.

Each request is REQUEST_BYTES on the control socket, the process id of the caller, with four descriptors: a socket for
this child, a file of JSON that says what it does, and the files of its two streams. From the socket the caller reads
the child's process id and, when it has ended, its exit status; each byte that it sends is a signal for the child.

Nothing outlives what asked for it. A child leads a session of its own, and its whole process group is killed when it
ends, when the caller closes the socket, and when the caller or this process ends, however that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import itertools
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from megaproof.toolchain.child import REQUEST_BYTES

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when its parent ends."""


@dataclass
class _Child:
    """One that runs."""

    pid: int
    channel: socket.socket
    caller: int | None
    """A pidfd of the process that asked for it: it becomes readable when that process ends, also while a copy of that
    process keeps the channel open. None where the system has none."""


class Server:
    """The template, once it is prepared."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.children: dict[int, _Child] = {}
        self.selector = selectors.DefaultSelector()
        ours = set(_python_path(os.environ))
        self.paths = list(itertools.dropwhile(ours.__contains__, sys.path))
        self.wakes, wake = socket.socketpair()
        for end in (self.wakes, wake):
            end.setblocking(False)
        self.wake = wake  # kept open: a signal writes to it

        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self.selector.register(control, selectors.EVENT_READ, self._start)
        self.selector.register(self.wakes, selectors.EVENT_READ, self._reap)

    def serve(self) -> None:
        """Returns when nobody can ask any more; then no child is left."""
        open_ = True
        while open_:
            for key, _ in self.selector.select():
                open_ = key.data() is not False and open_
        for child in list(self.children.values()):
            self._end(child)

    def _start(self) -> bool:
        """Forks a child; False when the last caller has gone."""
        request, descriptors, _, _ = socket.recv_fds(self.control, REQUEST_BYTES, 4)
        if not request:
            return False
        channel = socket.socket(fileno=descriptors.pop(0))
        template = os.getpid()
        pid = os.fork()
        if pid == 0:
            channel.close()
            self._forget()
            request_file, output, errors = descriptors
            _be(template, request_file, output, errors, self.paths)
        for descriptor in descriptors:
            os.close(descriptor)
        child = _Child(pid, channel, _pidfd(int.from_bytes(request, "little")))
        self.children[pid] = child
        self.selector.register(channel, selectors.EVENT_READ, lambda: self._listen(child))
        if child.caller is not None:
            self.selector.register(child.caller, selectors.EVENT_READ, lambda: self._end(child))
        _say(channel, pid)
        return True

    def _listen(self, child: _Child) -> None:
        """A signal for the child, or the end of its caller."""
        if self.children.get(child.pid) is not child:
            return  # it ended in this very round
        try:
            said = child.channel.recv(1)
        except OSError:
            said = b""
        if said:
            os.kill(child.pid, said[0])
        else:
            self._end(child)

    def _reap(self) -> None:
        """Children have ended: their statuses go to their callers."""
        with contextlib.suppress(BlockingIOError):
            self.wakes.recv(4096)
        for child in list(self.children.values()):
            if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self._end(child)

    def _end(self, child: _Child) -> None:
        """Kills what is left of a child, which may have ended, and says its status."""
        if self.children.get(child.pid) is not child:
            return
        _kill(child.pid)
        _, status = os.waitpid(child.pid, 0)
        _say(child.channel, os.waitstatus_to_exitcode(status))
        self.selector.unregister(child.channel)
        child.channel.close()
        if child.caller is not None:
            self.selector.unregister(child.caller)
            os.close(child.caller)
        del self.children[child.pid]

    def _forget(self) -> None:
        """In a child: lets go of what belongs to the template and to its other children."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for end in (self.control, self.wakes, self.wake, *(child.channel for child in self.children.values())):
            end.close()
        for child in self.children.values():
            if child.caller is not None:
                os.close(child.caller)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or an old one; or it has ended, which its channel says too
        return None


def _kill(leader: int) -> None:
    """Kills a child that has not been waited for, and its process group."""
    for kill in (os.kill, os.killpg):  # it may not lead its group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(leader, signal.SIGKILL)


def _say(channel: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        channel.sendall(b"%d\n" % number)


# --- in a child -------------------------------------------------------------------------------------------------------


def _hear_signals() -> None:
    """A shell lets its jobs in the background ignore these; in a session of its own a child hears them again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def _be(template: int, request: int, output: int, errors: int, paths: list[str]) -> NoReturn:
    """The life of a child: what its request says, and the exit status of that."""
    status = 1
    try:
        os.setsid()
        _hear_signals()
        die_with(template)
        with open(request, encoding="utf-8") as text:
            text.seek(0)
            said = json.load(text)
        for number, file in ((1, output), (2, errors)):
            os.dup2(file, number)
            os.close(file)
        sys.stdout = sys.__stdout__ = _text(1)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = _text(2)  # type: ignore[misc]
        os.environ.clear()
        os.environ.update(said["environment"])
        os.chdir(said["folder"])
        sys.path[:] = [*_python_path(os.environ), *paths]
        importlib.invalidate_caches()
        status = _status_of(lambda: function(said["function"])(said["argument"]))
        atexit._run_exitfuncs()  # what the interpreter does at its end; _exit leaves the template's own end out
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _text(descriptor: int) -> io.TextIOWrapper:
    """A stream of text on a descriptor, which stays open with it."""
    return io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)


def _status_of(call: Callable[[], Any]) -> int:
    """What the interpreter would exit with: the result of the call, or what SystemExit carries."""
    try:
        code = call()
    except SystemExit as error:
        code = error.code
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def die_with(parent: int) -> None:
    """The kernel kills this process when its parent ends, however that ends. (Linux; elsewhere it does nothing.)"""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def function(name: str) -> Callable[..., Any]:
    """The function that 'module:function' names. Raises ImportError or AttributeError."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _python_path(environment: Mapping[str, str]) -> list[str]:
    """The entries as the interpreter takes them at its start."""
    return [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def main(control: int, prepare: str) -> None:
    """Prepares, says so, and serves."""
    function(prepare)()
    gc.collect()
    gc.freeze()  # children neither walk what was loaded nor copy its pages
    with socket.socket(fileno=control) as channel:
        server = Server(channel)
        channel.sendall(b"ready\n")
        server.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
