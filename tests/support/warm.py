"""Processes that begin where an import of torch has ended: a template, started once, forks each of them.

A run of pytest in a process of its own costs three to five seconds of imports, and then does a tenth of a second's
work. The template pays for the imports once. It never starts a thread and never touches a device, so that a fork of it
is as good as a new process; environment, folder, streams and arguments are the child's own.

The template is `python -c`'s program below, spoken to over a socket: a line of JSON asks for a run, a line answers with
its exit status. What a run prints goes to files that the caller names.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megaproof.tests.support.patience import PATIENCE_S

_TEMPLATE = """
import json, os, socket, sys, traceback
sys.path[:0] = json.loads(sys.argv[2])
import numpy, pytest, rich.console, safetensors.torch, torch, typer.testing  # not hypothesis: pytest rewrites it
import megaproof.cases.cases, megaproof.reference.layer
from megaproof.toolchain import build, launch

def child(request):
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = [request["folder"]]
    sys.argv = ["pytest", *request["arguments"]]
    try:
        status = int(pytest.console_main())
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)

channel = socket.socket(fileno=int(sys.argv[1]))
lines = channel.makefile("r")
print("ready", file=channel.makefile("w"), flush=True)
for line in lines:
    pid = os.fork()
    if pid == 0:
        channel.close()
        child(json.loads(line))
    channel.sendall((json.dumps({"pid": pid}) + "\\n").encode())
    _, status = os.waitpid(pid, 0)
    channel.sendall((json.dumps({"status": os.waitstatus_to_exitcode(status)}) + "\\n").encode())
"""


class _Template:
    """The template process of this test process."""

    def __init__(self, environment: dict[str, str]) -> None:
        ours, its = socket.socketpair()
        with its:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _TEMPLATE, str(its.fileno()), json.dumps(_paths(environment))],
                pass_fds=[its.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self.channel = ours
        self.lines = ours.makefile("r")
        atexit.register(self.end)
        if self.lines.readline() != "ready\n":
            raise RuntimeError("the template of test runs could not start: its imports fail, as printed above")

    def run(self, request: dict[str, Any], timeout_s: float) -> int:
        """The child's exit status. Raises subprocess.TimeoutExpired after its process group has been killed."""
        self.channel.sendall((json.dumps(request) + "\n").encode())
        pid = self._answer()["pid"]
        self.channel.settimeout(timeout_s)
        try:
            return self._answer()["status"]
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            self.end()
            _template.cache_clear()
            raise subprocess.TimeoutExpired(request["arguments"], timeout_s) from None
        finally:
            self.channel.settimeout(None)

    def _answer(self) -> dict[str, int]:
        line = self.lines.readline()
        if not line:
            raise RuntimeError("the template of test runs has ended")
        return json.loads(line)

    def end(self) -> None:
        """Ends the template. A second call does nothing."""
        self.channel.close()
        self.process.kill()
        self.process.wait()


def _paths(environment: dict[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


@functools.cache
def _template(python_path: str, devices: str) -> _Template:
    """One for each set of import paths and visible devices: both are fixed when torch is imported."""
    environment = os.environ | {"PYTHONPATH": python_path, "CUDA_VISIBLE_DEVICES": devices}
    return _Template({name: value for name, value in environment.items() if not name.startswith("PYTEST_")})


def pytest_main(
    folder: Path, arguments: list[str], environment: dict[str, str], timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """`python -m pytest ARGUMENTS` in `folder`, with both streams captured; see the module for what is shared.

    environment: the whole of it. Raises subprocess.TimeoutExpired after timeout_s.
    """
    template = _template(environment.get("PYTHONPATH", ""), environment.get("CUDA_VISIBLE_DEVICES", ""))
    with tempfile.TemporaryDirectory() as scratch:
        streams = {name: str(Path(scratch) / name) for name in ("stdout", "stderr")}
        request = {"arguments": arguments, "folder": str(folder), "environment": environment, **streams}
        status = template.run(request, timeout_s)
        texts = (Path(path).read_text(encoding="utf-8", errors="replace") for path in streams.values())
        return subprocess.CompletedProcess([sys.executable, "-m", "pytest", *arguments], status, *texts)
