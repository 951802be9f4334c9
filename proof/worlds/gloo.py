"""The layer as one process a rank: `python -m proof gloo CASE` compares it with all ranks in one process.

The processes talk over torch.distributed with gloo on the loopback device; each makes its inputs from the case's seed,
and the results come back as safetensors in a temporary folder. A rank that raises, dies or hangs ends the whole run
with `RankFailure`, within seconds; no process outlives the call, nor the caller.

Exit status: 0 proven, 1 differs or a rank failed, 2 usage, 3 environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file

from megaproof import HOME
from megaproof.cases import inputs
from megaproof.cases.cases import Case, find
from megaproof.cases.compare import Differs, same
from megaproof.proof.worlds.rank_process import case_to_json
from megaproof.reference.arguments import Dimensions
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.ranks import RankResult, gather
from megaproof.reference.stages import STAGES
from megaproof.toolchain.build import EnvironmentMissing

TIMEOUT_S = 300.0
"""A run that takes longer hangs. The largest case of the gate takes a tenth of it on two cores."""
POLL_S = 0.02
PATIENCE_S = 2.0
"""How long a broken exchange is held back for the rank whose end broke it to be seen."""
DUMP_S = 0.5
"""Time for a rank that hangs to print its stack."""
END_S = 10.0
"""Time for the starter to kill its ranks before it is killed itself; they go with it."""
STARTING = "starting"
"""State of a rank that has said nothing yet."""
LAST_LINES = 30
"""Of what a rank that died had printed."""


class RankFailure(RuntimeError):
    """A rank that raised, died or hung."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        kind: Literal["raised", "died", "hung"],
        how: str,
        text: str,
        code: int | None,
    ) -> None:
        """how: one line; text: its traceback, or the last lines that it printed; code: the exit status of its process,
        negative when ended by that signal, None when it was running."""
        super().__init__(f"rank {rank} of {ranks} {kind}: {how}\n{text}".rstrip())
        self.rank, self.kind, self.how, self.text, self.code = rank, kind, how, text, code


def run_processes(
    case: Case, timeout_s: float = TIMEOUT_S, before: str | None = None, device: str | None = None
) -> LayerResult:
    """The traced layer of a case, computed by one process a rank; see `rank_results` for arguments and errors."""
    shape = case.shape
    dimensions = Dimensions(case.ranks, shape.hidden, shape.topk, shape.experts, case.tokens, torch.device("cpu"))
    return gather(dimensions, rank_results(case, timeout_s, before, device))


def rank_results(
    case: Case, timeout_s: float = TIMEOUT_S, before: str | None = None, device: str | None = None
) -> list[RankResult]:
    """What each rank has at the end, on the CPU.

    timeout_s: of the whole run. before: 'module:function', called in each process as function(exchange, rank) before
    its layer, and returning the exchange to use. device: where the ranks compute; default: the GPU where there is one.

    Raises `RankFailure` for the rank that failed first, `EnvironmentMissing` without Linux or gloo.
    """
    if sys.platform != "linux":
        raise EnvironmentMissing(
            f"ranks as processes need Linux, this is {sys.platform}; all ranks in one process work"
        )
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise EnvironmentMissing("this torch was built without gloo; ranks as processes need it, all else works")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="megaproof-ranks-") as name:
        folder = Path(name)
        job = {
            "case": case_to_json(case),
            "parent": os.getpid(),
            "exchange_timeout_s": timeout_s + 60,  # this process decides first who hangs
            "before": before,
            "device": device,
        }
        (folder / "job.json").write_text(json.dumps(job))
        world = _World(folder, case.ranks)
        try:
            world.wait(timeout_s)
        finally:
            world.end()
        return [_read(folder, rank) for rank in range(case.ranks)]


def _read(folder: Path, rank: int) -> RankResult:
    tensors = load_file(folder / f"rank{rank}.result.safetensors")
    return RankResult(*(tensors.pop(name) for name in ("y", "stats", "sent")), trace=tensors)


class _World:
    """The processes of one run: the starter (`megaproof.proof.worlds.rank_process`) and its ranks."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        with (folder / "starter.log").open("wb") as log:
            self.starter = subprocess.Popen(
                [sys.executable, "-m", "megaproof.proof.worlds.rank_process", str(folder)],
                cwd=HOME,
                env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},  # not the host name, which need not resolve
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt of the terminal reaches the parent alone
            )

    def wait(self, timeout_s: float) -> None:
        """Returns when every rank has left its result. Raises `RankFailure`."""
        deadline, patience = time.monotonic() + timeout_s, None
        while True:
            starter = self.starter.poll()
            codes = [self._code(rank) for rank in range(self.ranks)]
            failures = [self._failure(rank, code) for rank, code in enumerate(codes) if self._failed(rank, code)]
            for failure, peer_lost in failures:
                if not peer_lost:
                    raise failure
            now = time.monotonic()
            if failures:
                patience = patience or now + PATIENCE_S
                if now > patience:
                    raise failures[0][0]
            elif None not in codes:
                return
            elif starter is not None:
                how = f"the process that starts the ranks ended with {_status(starter)}"
                raise RankFailure(codes.index(None), self.ranks, "died", how, self._last_lines("starter"), starter)
            if now > deadline:
                raise self._hung(codes, timeout_s)
            time.sleep(POLL_S)

    def end(self) -> None:
        """Kills what still runs."""
        self.starter.terminate()  # it kills its ranks
        try:
            self.starter.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.starter.pid, signal.SIGKILL)
            self.starter.wait()

    def _code(self, rank: int) -> int | None:
        ended = self._file(rank, "exit")
        return int(ended.read_text()) if ended.exists() else None

    def _failed(self, rank: int, code: int | None) -> bool:
        return code not in (None, 0) or (code == 0 and not self._file(rank, "result.safetensors").exists())

    def _failure(self, rank: int, code: int | None) -> tuple[RankFailure, bool]:
        """(what happened, whether it is only the echo of another rank's end) for a rank that has ended."""
        error = self._file(rank, "error.json")
        if error.exists():
            report = json.loads(error.read_text())
            last = report["traceback"].rstrip().rpartition("\n")[2]
            return RankFailure(rank, self.ranks, "raised", last, report["traceback"], code), report["peer_lost"]
        how = f"{_status(code)}, {self._state(rank)}"
        return RankFailure(rank, self.ranks, "died", how, self._last_lines(f"rank{rank}"), code), False

    def _hung(self, codes: list[int | None], timeout_s: float) -> RankFailure:
        """The rank that the others wait for: one that is in no exchange, or in the earliest."""
        running = [rank for rank, code in enumerate(codes) if code is None]
        states = {rank: self._state(rank) for rank in running}
        rank = min(running, key=lambda rank: (states[rank].startswith("in "), states[rank], rank))
        pid = self._file(rank, "pid")
        if pid.exists():  # it prints the stack of every thread; a stopped process can't
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGUSR1)
            time.sleep(DUMP_S)
        others = "; ".join(f"rank {other} {states[other]}" for other in running if other != rank)
        text = f"{self._last_lines(f'rank{rank}')}\n{others or 'no other rank runs'}"
        return RankFailure(rank, self.ranks, "hung", f"no end after {timeout_s:g} s, {states[rank]}", text, None)

    def _file(self, rank: int, name: str) -> Path:
        return self.folder / f"rank{rank}.{name}"

    def _state(self, rank: int) -> str:
        state = self._file(rank, "state")
        return state.read_text() if state.exists() else STARTING

    def _last_lines(self, name: str) -> str:
        log = self.folder / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "\n".join(lines[-LAST_LINES:])


def _status(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"


# --- the command line -------------------------------------------------------------------------------------------------

console = Console(highlight=False, soft_wrap=True)


def gloo_command(
    case_id: Annotated[str, typer.Argument(metavar="CASE", help="a case id of cases/cases.py; it says how many ranks")],
    timeout: Annotated[float, typer.Option(min=0, help="seconds after which a run counts as hung")] = TIMEOUT_S,
) -> None:
    """Runs the case both ways and compares every stage, bit for bit."""
    try:
        case = find(case_id)
    except KeyError as error:
        raise typer.BadParameter(str(error.args[0]), param_hint="CASE") from None
    try:
        started = time.monotonic()
        results = rank_results(case, timeout)
        seconds = time.monotonic() - started
    except EnvironmentMissing as error:
        console.print(f"environment: {error}")
        raise typer.Exit(3) from None
    except RankFailure as failure:
        console.print(str(failure), style="red", markup=False)
        raise typer.Exit(1) from None

    made = inputs.make(case, "cuda" if torch.cuda.is_available() else "cpu")
    expected = moe_layer(case.recipe, *made.arguments(), trace=True, experts=case.shape.experts)
    dimensions = Dimensions(
        case.ranks, case.shape.hidden, case.shape.topk, case.shape.experts, case.tokens, made.x[0].device
    )
    actual, differing, compared = gather(dimensions, results), 0, 0
    assert expected.trace is not None
    assert actual.trace is not None
    console.print(f"{case.id}: {case.ranks} processes over gloo, {seconds:.1f} s")
    for stage in ("rows", *STAGES):
        try:
            size = same(stage, expected.trace[stage], actual.trace[stage])
        except Differs as error:
            differing += 1
            console.print(str(error), style="red", markup=False)
        else:
            compared += size * expected.trace[stage].element_size()
            console.print(f"  equal  {stage:11} {size:,} elements")
    sent = torch.stack([result.sent for result in results])  # [from, there or back, to]
    there, back = sent.sum(dim=(0, 2)).tolist()
    inside = int(sent.diagonal(dim1=0, dim2=2).sum())
    console.print(f"  {there:,} bytes sent to experts, {back:,} back; {inside:,} of them from a rank to itself")
    console.print(f"  {compared:,} bytes compared, {differing} of {len(STAGES) + 1} stages differ")
    if differing:
        raise typer.Exit(1)
