"""One process a rank over gloo: the same bits as all ranks in one process; and no way to fail without turning red.

The faults are in tests/support/faulty_ranks.py, since they run inside the ranks. Who is named for what, and when, is
tested without processes in test_supervisor.py; here the supervisor's clock moves only while the ranks are where a test
wants them, so that no verdict depends on how busy the machine is.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import pytest
import torch
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
from megaproof.quant.shapes import SHAPES, Shape
from megaproof.reference.arguments import check
from megaproof.reference.exchange import Exchange, lockstep
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.ranks import RankResult, rank_layer
from megaproof.reference.stages import STAGES
from megaproof.tests.support.patience import PATIENCE_S, wait_for
from megaproof.toolchain import child

SMOKE = SHAPES["smoke"]
FAULTY = Case(Shape("three", 128, 128, 3, 2), (2, 0, 1), routing="zipf")
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


@pytest.mark.skipif(sys.platform != "linux", reason="looks at threads in /proc")
def test_the_template_has_one_thread() -> None:
    """A fork copies no other: a lock that one of them held would stay locked for ever."""
    assert len(os.listdir(f"/proc/{gloo.template().pid}/task")) == 1


# --- faults, each in one rank -----------------------------------------------------------------------------------------


def at_fault(pids: Path) -> bool:
    """Whether the rank that hangs does so by now."""
    return pids.with_suffix(".hangs").exists()


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the ranks leave their process ids."""
    monkeypatch.setenv("MEGAPROOF_TEST_PIDS", str(tmp_path))
    return tmp_path


def running(pids: Path) -> list[int]:
    """The noted processes that still run; a zombie has ended."""
    found = [int(path.name) for path in pids.iterdir() if path.name.isdigit()]
    return [pid for pid in found if process_state(pid) not in ("", "Z", "X")]


class WhenReady(Supervisor):
    """Its clock stands still until the ranks are where the test wants them; then a second passes with each look."""

    def __init__(self, ready: Callable[[Sequence[View]], bool] = lambda views: False) -> None:
        self.ready, self.seconds, self.begun = ready, 0.0, time.monotonic()
        super().__init__(Limits(quiet_s=10, echo_s=10), lambda: self.seconds)

    def look(self, views: Sequence[View], lost: bool = False) -> Finding | Literal["done"] | None:
        if self.ready(views) or time.monotonic() - self.begun > PATIENCE_S:
            self.seconds += 1
        return super().look(views, lost)


def fail(fault: str, supervisor: Supervisor | None = None) -> RankFailure:
    with pytest.raises(RankFailure) as caught:
        run_processes(FAULTY, supervisor, before=f"megaproof.tests.support.faulty_ranks:{fault}")
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
    """No rank gets to its first mark."""
    failure = fail("no_such_hook", WhenReady())
    assert (failure.kind, failure.code) == ("raised", 1)
    assert "has no attribute 'no_such_hook'" in failure.text


@pytest.mark.clock
@pytest.mark.parametrize("copy", [False, True], ids=["alone", "a copy of it lives on"])
def test_ranks_end_with_the_process_that_started_them(pids: Path, tmp_path: Path, copy: bool) -> None:
    """Killed, it can clean up nothing; its ranks, one of which hangs, go all the same, and their template stays.

    The starter is a fork of this process, so that it need not import torch; a fork of its own, such as a loader of
    data, holds all that it had open.
    """
    gloo.template()  # of this process, so that a kill of its fork leaves it
    starter = os.fork()
    if starter == 0:
        start_and_hang(pids, copy)
    wait_for(lambda: len(running(pids)) == 3 + copy)
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)
    wait_for(lambda: len(running(pids)) == copy)
    for pid in running(pids):
        os.kill(pid, signal.SIGKILL)
    assert not gloo.template().lost


@pytest.mark.clock
def test_a_template_that_is_killed_takes_the_ranks_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is blamed for it. This template imports nothing beforehand, so no other test misses it."""
    template = child.Template("os:getpid")
    monkeypatch.setattr(gloo, "template", lambda: template)

    def kill(views: Sequence[View]) -> bool:
        os.kill(template.pid, signal.SIGKILL)
        return False

    with pytest.raises(RankFailure) as caught:
        run_processes(FAULTY, WhenReady(kill))
    assert (caught.value.kind, caught.value.code) == ("died", None)
    assert caught.value.how == "the process that forks the ranks has ended, and they with it"
    template.close()


@pytest.mark.clock
def test_a_template_that_was_killed_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo, "started", functools.cache(lambda: child.Template("os:getpid")))
    first = gloo.template()
    assert gloo.template() is first
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: first.lost)
    second = gloo.template()
    assert second is not first
    assert not second.lost
    second.close()


def start_and_hang(pids: Path, copy: bool) -> NoReturn:
    """In the fork of a test: a run of ranks that does not end, in a folder that stays."""
    tempfile.tempdir = str(pids)
    try:
        if copy and os.fork() == 0:
            Path(pids, str(os.getpid())).touch()
            signal.pause()
        run_processes(FAULTY, WhenReady(), before="megaproof.tests.support.faulty_ranks:hanging", device="cpu")
    finally:
        os._exit(1)


# --- the command line -------------------------------------------------------------------------------------------------

CASE = next(case for case in CASES if case.shape is SMOKE and case.ranks == 2 and case.masked == 0 and all(case.tokens))


def invoke(*arguments: str) -> tuple[int, str]:
    """(exit status, output)."""
    ended = CliRunner().invoke(cli.app, ("gloo", *arguments))
    return ended.exit_code, ended.output


def test_the_command_compares_every_stage() -> None:
    """In this process; tests/megaproof/test_neighbours.py starts it as a user does."""
    status, output = invoke(CASE.id)
    assert status == 0, output
    for stage in ("rows", *STAGES):
        assert f"equal  {stage} " in output
    assert f"0 of {len(STAGES) + 1} stages differ" in output
    rows = sum(CASE.tokens) * SMOKE.topk
    assert f"{rows * (512 + 16 + 16):,} bytes sent to experts, {rows * (1024 + 8):,} back" in output


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


@pytest.mark.parametrize("option", ["--timeout", "--quiet"])
@pytest.mark.parametrize("value", ["nan", "0", "-1", "-inf"])
def test_what_is_no_time_is_a_usage_error(option: str, value: str) -> None:
    status, output = invoke(CASE.id, option, value)
    assert status == 2
    assert f"{float(value):g} must be more than 0 seconds" in " ".join(output.replace("│", " ").split())


def test_without_a_limit_a_run_is_as_ever() -> None:
    status, output = invoke(CASE.id, "--timeout", "inf", "--quiet", "inf")
    assert status == 0, output


def test_an_unknown_case_is_a_usage_error() -> None:
    status, output = invoke("no-such-case")
    assert status == 2
    assert "no case 'no-such-case'" in output


def test_a_torch_without_gloo_is_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    status, output = invoke(CASE.id)
    assert status == 3
    assert "built without gloo" in output
