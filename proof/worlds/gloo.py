"""The layer as one process a rank: results of a case whose ranks talk over torch.distributed with gloo.

Each process makes its inputs from the case's seed, and talks on the loopback device; results come back as safetensors
in a temporary folder. A rank that raises, dies or hangs ends the whole run with `RankFailure`, which names it; no
process outlives the call, nor the caller. Which rank is named, and when, is decided in `supervisor.py`.
"""

from __future__ import annotations

import atexit
import functools
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megaproof.cases import case_io
from megaproof.cases.cases import Case
from megaproof.cases.run import dimensions
from megaproof.proof.worlds.supervisor import Finding, Kind, Limits, Mark, Supervisor, View
from megaproof.reference.layer import LayerResult
from megaproof.reference.ranks import RankResult, gather
from megaproof.toolchain import child, files
from megaproof.toolchain.errors import EnvironmentMissing

POLL_S = 0.05
GLOO_EXTRA_S = 3600.0
"""How much longer gloo waits inside an exchange than a run may take: the supervisor decides first who hangs."""
LONGEST_GLOO_S = 365 * 86400.0
"""A run may take for ever (inf); a limit of gloo has to be a number of milliseconds."""
DUMP_S = 30.0
"""How long a rank that hangs is given to print its stack; it takes milliseconds unless the machine is busy."""
STACK_ENDS = ("in _run_module_as_main\n", "  ...\n")
"""The last line of a complete stack: the outermost frame of `python -m`, or the mark of one that is too deep."""
LAST_LINES = 30
"""Of what a rank that died had printed."""


class RankFailure(RuntimeError):
    """A rank that ended the run."""

    def __init__(self, rank: int, ranks: int, kind: Kind, how: str, text: str, code: int | None) -> None:
        """how: one line; text: its traceback or stack, or the last lines that it printed; code: the exit status of
        its process, negative when ended by that signal, None when it was running."""
        super().__init__(f"rank {rank} of {ranks} {kind}: {how}\n{text}".rstrip())
        self.rank, self.kind, self.how, self.text, self.code = rank, kind, how, text, code


def run_processes(
    case: Case, supervisor: Supervisor | None = None, before: str | None = None, device: str | None = None
) -> LayerResult:
    """The traced layer of a case, computed by one process a rank; see `rank_results` for arguments and errors."""
    return gather(dimensions(case), rank_results(case, supervisor, before, device))


def rank_results(
    case: Case, supervisor: Supervisor | None = None, before: str | None = None, device: str | None = None
) -> list[RankResult]:
    """What each rank has at the end, on the CPU.

    Args:
        case: shape, recipe, tokens of each rank, and the seed of all inputs.
        supervisor: decides who has failed; default: one with the default `Limits` and the real clock.
        before: 'module:function', called in each process as function(exchange, rank) before its layer, and returning
            the exchange to use.
        device: where the ranks compute; default: the GPU where there is one.

    Returns:
        One result a rank, with its trace.

    Raises:
        RankFailure: a rank raised, died, hung, or the run took too long; names the rank that was first.
        EnvironmentMissing: this is not Linux, this torch has no gloo, or there is no temporary folder.
    """
    if sys.platform != "linux":
        raise EnvironmentMissing(
            f"ranks as processes need Linux, this is {sys.platform}; all ranks in one process work"
        )
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise EnvironmentMissing("this torch was built without gloo; ranks as processes need it, all else works")
    supervisor = supervisor or Supervisor(Limits(), time.monotonic)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="ranks-", dir=files.scratch()) as name:
        folder = Path(name)
        job = {
            "folder": str(folder),
            "case": case_io.to_json(case),
            "exchange_timeout_s": min(supervisor.limits.whole_s, LONGEST_GLOO_S) + GLOO_EXTRA_S,
            "before": before,
            "device": device,
        }
        with _World(folder, case.ranks, job) as world:
            world.wait(supervisor)
        return [_read(folder, rank) for rank in range(case.ranks)]


def process_state(pid: int) -> str:
    """One letter for the state of a process, as in proc(5): R, S, D, T (stopped), Z (zombie); '' if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _read(folder: Path, rank: int) -> RankResult:
    tensors = load_file(folder / f"rank{rank}.result.safetensors")
    return RankResult(*(tensors.pop(name) for name in ("y", "stats", "sent")), trace=tensors)


@functools.cache
def started() -> child.Template:
    """The template that was started last; see `template`."""
    made = child.Template("megaproof.proof.worlds.rank_process:load")
    atexit.register(made.close)
    return made


def template() -> child.Template:
    """The process that ranks are forked from: started by the first run, and again if it was killed since.

    Raises TemplateLost if it can't start.
    """
    if started().lost:
        started.cache_clear()
    return started()


class _World:
    """The ranks of one run, until the block is left."""

    def __init__(self, folder: Path, ranks: int, job: dict[str, Any]) -> None:
        self.folder, self.ranks = folder, ranks
        self.processes: list[child.Forked] = []
        source = template()
        # gloo takes the loopback device, and not the one of the host name, which need not resolve.
        environ = child.environment(GLOO_SOCKET_IFNAME="lo")
        try:
            for rank in range(ranks):
                with self._file(rank, "log").open("wb") as log:
                    rank_job = {**job, "rank": rank}
                    self.processes.append(
                        source.fork("megaproof.proof.worlds.rank_process:be_rank", rank_job, log, environ=environ)
                    )
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> _World:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kills what still runs, and returns when nothing does."""
        for process in self.processes:
            process.close()

    def wait(self, supervisor: Supervisor) -> None:
        """Returns when every rank has left its result. Raises `RankFailure`."""
        while True:
            lost = any(process.lost for process in self.processes)
            views = [self._view(rank) for rank in range(self.ranks)]
            found = supervisor.look(views, lost)
            if found == "done":
                return
            if found is not None:
                raise self._failure(found, views)
            time.sleep(POLL_S)

    def _view(self, rank: int) -> View:
        """The exit status is read first: a rank leaves everything else before it ends."""
        process = self.processes[rank]
        code, mark = process.poll(), self._text(rank, "mark")
        found = Mark.from_json(mark) if mark else None
        if code is None:
            return View(found, stopped=process_state(process.pid) == "T")
        error = json.loads(self._text(rank, "error.json") or "null")
        return View(
            found,
            code,
            result=self._file(rank, "result.safetensors").exists(),
            raised=error and error["traceback"].rstrip().rpartition("\n")[2],
            echo=bool(error and error["peer_lost"]),
        )

    def _failure(self, found: Finding, views: list[View]) -> RankFailure:
        rank, view = found.rank, views[found.rank]
        if found.kind == "raised":
            text = json.loads(self._text(rank, "error.json") or "{}").get("traceback", "")
        elif found.kind == "died":
            text = self._last_lines(rank)
        else:
            others = [f"rank {other} {at.where()}" for other, at in enumerate(views) if at.runs and other != rank]
            parts = (self._last_lines(rank), self._stack(rank, view), "; ".join(others) or "no other rank runs")
            text = "\n".join(filter(None, parts))
        return RankFailure(rank, self.ranks, found.kind, found.how, text, view.code)

    def _stack(self, rank: int, view: View) -> str:
        """Where each thread of a running rank is; '' for one that can't answer."""
        if view.mark is None or view.stopped:  # before its first mark, the signal would end it
            return ""
        self.processes[rank].send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + DUMP_S
        while not (stack := self._text(rank, "stack") or "").endswith(STACK_ENDS) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return stack.rstrip()

    def _file(self, rank: int, name: str) -> Path:
        return self.folder / f"rank{rank}.{name}"

    def _text(self, rank: int, name: str) -> str | None:
        try:
            return self._file(rank, name).read_text(errors="replace")
        except FileNotFoundError:
            return None

    def _last_lines(self, rank: int) -> str:
        return "\n".join((self._text(rank, "log") or "").splitlines()[-LAST_LINES:])
