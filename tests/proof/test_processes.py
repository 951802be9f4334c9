"""One process a rank over gloo: the same bits as all ranks in one process; and no way to fail without turning red.

The functions named by `before=` run inside the ranks: they are the faults of these tests, and live here alone. Who is
named for what, and when, is tested without processes in test_supervisor.py; here the supervisor's clock moves only
while the ranks are where a test wants them, so that no verdict depends on how busy the machine is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from megaproof.cases import inputs
from megaproof.cases.cases import CASES, Case
from megaproof.cases.compare import same
from megaproof.proof import __main__ as cli
from megaproof.proof.worlds import gloo
from megaproof.proof.worlds.gloo import RankFailure, process_state, run_processes
from megaproof.proof.worlds.supervisor import Finding, Limits, Supervisor, View
from megaproof.quant import twin
from megaproof.quant.recipe import RECIPES
from megaproof.quant.shapes import SHAPES
from megaproof.reference.arguments import check
from megaproof.reference.exchange import Exchange, lockstep
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.ranks import RankResult, rank_layer
from megaproof.reference.stages import STAGES
from megaproof.tests.support.patience import PATIENCE_S, wait_for

ROOT = Path(__file__).resolve().parents[2]
SMOKE = SHAPES["smoke"]
FAULTY = Case(SMOKE, (2, 0, 1), routing="zipf")
"""Three ranks, one of them idle."""


def compare(case: Case, actual: LayerResult) -> int:
    """Number of elements compared; every stage, y and the statistics by rank."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = moe_layer(case.recipe, *inputs.make(case, device).arguments(), trace=True, experts=case.shape.experts)
    assert expected.trace is not None
    assert actual.trace is not None
    assert list(actual.trace) == [*STAGES, "rows"]
    assert [len(y) for y in actual.y] == list(case.tokens)
    same("y", torch.cat(expected.y), torch.cat(actual.y))
    assert [stats.tolist() for stats in actual.stats] == [stats.tolist() for stats in expected.stats]
    return sum(same(stage, expected.trace[stage], actual.trace[stage]) for stage in expected.trace)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(SMOKE, (3, 9), RECIPES["precise"]),
        Case(SMOKE, (7, 0, 0, 2), RECIPES["fp32_scales"], routing="one_rank"),
        Case(SMOKE, (5, 0, 9, 1, 0, 3, 2, 12), routing="zipf", masked=30),
    ],
    ids=["even", "idle", "uneven"],
)
def test_gloo_equals_one_process(case: Case) -> None:
    """Two ranks; four, of which two have no token and one has all the experts; eight, uneven."""
    assert compare(case, run_processes(case)) > 10_000


def test_gloo_equals_one_process_at_full_size() -> None:
    if not torch.cuda.is_available() and twin.describe("cpu").startswith("readable"):
        pytest.skip(f"too slow at full size: {twin.describe('cpu')}")
    case = Case(SHAPES["dsv4_flash"], (1, 1, 1, 1, 1, 1, 1, 0), routing="few_experts", masked=70)
    assert compare(case, run_processes(case)) > 100_000


# --- faults, each in one rank -----------------------------------------------------------------------------------------


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


def at_fault(pids: Path) -> bool:
    """Whether the rank that hangs does so by now."""
    return pids.with_suffix(".hangs").exists()


def sleep_for_ever() -> None:
    Path(os.environ["MEGAPROOF_TEST_PIDS"]).with_suffix(".hangs").touch()
    while True:
        time.sleep(3600)


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the ranks leave their process ids."""
    monkeypatch.setenv("MEGAPROOF_TEST_PIDS", str(tmp_path))
    return tmp_path


def running(pids: Path) -> list[int]:
    """The noted processes that still run; a zombie has ended."""
    found = [int(path.name) for path in pids.iterdir()]
    return [pid for pid in found if process_state(pid) not in ("", "Z", "X")]


class WhenReady(Supervisor):
    """Its clock stands still until the ranks are where the test wants them; then a second passes with each look."""

    def __init__(self, ready: Callable[[Sequence[View]], bool] = lambda views: False) -> None:
        self.ready, self.seconds, self.begun = ready, 0.0, time.monotonic()
        super().__init__(Limits(quiet_s=10, echo_s=10), lambda: self.seconds)

    def look(self, views: Sequence[View], starter: str | None = None) -> Finding | Literal["done"] | None:
        if self.ready(views) or time.monotonic() - self.begun > PATIENCE_S:
            self.seconds += 1
        return super().look(views, starter)


def fail(fault: str, supervisor: Supervisor | None = None) -> RankFailure:
    with pytest.raises(RankFailure) as caught:
        run_processes(FAULTY, supervisor, before=f"megaproof.tests.proof.test_processes:{fault}")
    return caught.value


@pytest.mark.clock
def test_a_rank_that_raises(pids: Path) -> None:
    failure = fail("raising", WhenReady())
    assert (failure.rank, failure.kind, failure.code) == (1, "raised", 1)
    assert "rank 1 of 3 raised: OverflowError: a fault of the test" in str(failure)
    assert "in all_to_all" in failure.text
    assert "in rank_layer" in failure.text
    wait_for(lambda: running(pids) == [])


@pytest.mark.clock
def test_a_rank_that_is_killed(pids: Path) -> None:
    """The others raise, since the connection is gone; the cause is what gets reported."""
    failure = fail("killed", WhenReady())
    assert (failure.rank, failure.kind, failure.code) == (2, "died", -signal.SIGKILL)
    assert "signal SIGKILL, computing, " in str(failure)
    assert "after exchange 1" in failure.how
    wait_for(lambda: running(pids) == [])


@pytest.mark.clock
def test_a_rank_that_leaves_with_status_0_and_no_result(pids: Path) -> None:
    failure = fail("leaving", WhenReady())
    assert (failure.rank, failure.kind, failure.code) == (0, "died", 0)
    assert "on my way out" in failure.text
    wait_for(lambda: running(pids) == [])


def others_wait(views: Sequence[View]) -> bool:
    """Whether ranks 0 and 2 are in the second exchange."""
    return all(view.mark is not None and view.mark.text == "in exchange 2" for view in (views[0], views[2]))


@pytest.mark.clock
def test_a_rank_that_hangs(pids: Path) -> None:
    """The others wait in their second exchange; the report has the stack of the one that never got there."""
    failure = fail("hanging", WhenReady(lambda views: others_wait(views) and at_fault(pids)))
    assert (failure.rank, failure.kind, failure.code) == (1, "hung", None)
    assert failure.how.startswith("no progress for 10 s, computing, ")
    assert "in sleep_for_ever" in failure.text
    assert "rank 0 in exchange 2; rank 2 in exchange 2" in failure.text
    wait_for(lambda: running(pids) == [])


@pytest.mark.clock
def test_a_rank_that_is_stopped(pids: Path) -> None:
    failure = fail("stopped", WhenReady(lambda views: others_wait(views) and views[1].stopped))
    assert (failure.rank, failure.kind) == (1, "hung")
    assert "and its process is stopped" in failure.how
    wait_for(lambda: running(pids) == [])


@pytest.mark.clock
def test_a_hook_that_cannot_be_found() -> None:
    """The starter never gets to its ranks."""
    failure = fail("no_such_hook", WhenReady())
    assert (failure.rank, failure.kind, failure.code) == (0, "died", 1)
    assert "has no attribute 'no_such_hook'" in failure.text


@pytest.mark.clock
def test_ranks_end_with_the_process_that_started_them(pids: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Killed, it can clean up nothing; its ranks, one of which hangs, go all the same."""
    hanging = "megaproof.tests.proof.test_processes:hanging"
    code = f"from megaproof.tests.proof import test_processes as t\nt.run_processes(t.FAULTY, before='{hanging}')\n"
    environment = os.environ | {"TMPDIR": str(tmp_path_factory.mktemp("parent"))}  # of the run's folder, which stays
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    try:
        wait_for(lambda: len(running(pids)) == 3)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: running(pids) == [])


# --- the command line -------------------------------------------------------------------------------------------------

CASE = next(case for case in CASES if case.shape is SMOKE and case.ranks == 2 and case.masked == 0 and all(case.tokens))


def invoke(*arguments: str) -> tuple[int, str]:
    """(exit status, output)."""
    ended = CliRunner().invoke(cli.app, ("gloo", *arguments))
    return ended.exit_code, ended.output


def test_the_command_compares_every_stage() -> None:
    """As a user starts it; the other tests call it in this process."""
    line = [sys.executable, "-m", "megaproof.proof", "gloo", CASE.id]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for stage in ("rows", *STAGES):
        assert f"equal  {stage} " in ended.stdout
    assert f"0 of {len(STAGES) + 1} stages differ" in ended.stdout
    rows = sum(CASE.tokens) * SMOKE.topk
    assert f"{rows * (512 + 16 + 16):,} bytes sent to experts, {rows * (1024 + 8):,} back" in ended.stdout


def one_bit_off(case: Case, supervisor: Supervisor) -> list[RankResult]:
    """Results of ranks in one process; the last rank's y has one bit flipped."""
    x, x_sf, topk_idx, topk_weights, weights = inputs.make(case).arguments()
    problem = check(case.recipe, x, x_sf, topk_idx, topk_weights, case.shape.experts, None)

    def work(exchange: Exchange, rank: int) -> RankResult:
        own = (x[rank], x_sf[rank], topk_idx[rank], topk_weights[rank], weights)
        return rank_layer(exchange, rank, problem, case.recipe, *own, trace=True)

    results = lockstep(case.ranks, work)
    results[-1].y.view(torch.int16)[-1, -1] ^= 1
    return results


def test_one_bit_that_differs_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo, "rank_results", one_bit_off)
    status, output = invoke(CASE.id)
    assert status == 1
    assert "stage y: 1 of " in output
    assert "equal  slots " in output
    assert f"1 of {len(STAGES) + 1} stages differ" in output


def test_a_run_that_fails_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the options are the limits of its supervisor."""

    def late(case: Case, supervisor: Supervisor) -> list[RankResult]:
        assert (supervisor.limits.quiet_s, supervisor.limits.whole_s) == (7, 0.5)
        raise RankFailure(0, case.ranks, "late", "the run has not ended", "in exchange 2", None)

    monkeypatch.setattr(gloo, "rank_results", late)
    status, output = invoke(CASE.id, "--timeout", "0.5", "--quiet", "7")
    assert status == 1
    assert "rank 0 of 2 late: the run has not ended\nin exchange 2" in output


def test_an_unknown_case_is_a_usage_error() -> None:
    status, output = invoke("no-such-case")
    assert status == 2
    assert "no case 'no-such-case'" in output


def test_a_torch_without_gloo_is_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    status, output = invoke(CASE.id)
    assert status == 3
    assert "built without gloo" in output
