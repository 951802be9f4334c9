"""What a whole run amounts to: counts, skips by reason, when a run without a failure is not green. Needs no torch."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from megaproof.proof import tally

REPRODUCE = "reproduce with"
"""Title of the line that ends every failure."""
KERNEL_PROPERTY, CASE_PROPERTY = "kernel", "case"
"""Properties of a test that compared a kernel with the reference, and of one that ran on a case."""
COMPARED_PROPERTY = "compared"
"""What a passed test has compared a kernel in, see proof/tally.py."""
NOT_CLAIMED = "not claimed"
"""Start of the skip of a recipe that an adapter says it can't run: a statement about the kernel, not a missing GPU."""
DROPPED = "megaproof_dropped_cases"
"""What a worker of pytest-xdist tells at its end."""
OUT_OF_MEMORY = "out of GPU memory, which says nothing about the kernel: fewer workers (-n), or a GPU that is free"
"""Note of an error that is not the kernel's."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether torch ran out of GPU memory: this error, or one that it came from."""
    torch, seen = sys.modules.get("torch"), set()
    while torch and error and id(error) not in seen:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


class Verdicts:
    """What a whole run amounts to. With pytest-xdist the controller sees the reports of all workers."""

    def __init__(self, config: pytest.Config, default_kernel: str) -> None:
        self.compared = 0
        self.kernel = config.option.kernel
        self.named = self.kernel != default_kernel
        self.kernel_proofs = self.cases = 0
        self.ranks, self.require_gpu = config.option.ranks, config.option.require_gpu
        self.dropped = 0
        """Tests on cases that --ranks left out."""
        self.skips: Counter[str] = Counter()
        self.tally: tally.Tally = {}
        self.failures: list[str] = []
        self.is_worker = hasattr(config, "workerinput")
        self.runs_tests = not config.option.collectonly

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skips[skip_reason(report)] += 1
        elif report.failed or (report.passed and report.when == "call"):
            self.compared += 1
            properties = dict(report.user_properties)
            self.kernel_proofs += report.failed or KERNEL_PROPERTY in properties
            self.cases += CASE_PROPERTY in properties
            tally.merge(self.tally, properties.get(COMPARED_PROPERTY, {}) if report.passed else {})
        self._note_failure(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skips[f"{skip_reason(report)} (a whole {'file' if report.nodeid.endswith('.py') else 'group'})"] += 1
        self._note_failure(report)

    def _note_failure(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.failures += [line for name, line in report.sections if name == REPRODUCE]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        """A worker of pytest-xdist has ended: each has collected all tests, the controller none."""
        self.dropped = max(self.dropped, getattr(node, "workeroutput", {}).get(DROPPED, 0))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.is_worker:
            session.config.workeroutput[DROPPED] = self.dropped
        if exitstatus == pytest.ExitCode.OK and self.runs_tests and not self.is_worker and self._unproven():
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    def _unproven(self) -> str:
        """Why a run without a failure proves nothing, or ''."""
        if not self.compared:
            return "No test passed or failed"
        if self.dropped and not self.cases:
            return f"No case of --ranks {','.join(map(str, sorted(self.ranks)))} ran"
        if self.named and not self.kernel_proofs:
            return f"No proof of --kernel {self.kernel} ran"
        unclaimed = sum(count for reason, count in self.skips.items() if reason.startswith(NOT_CLAIMED))
        if self.require_gpu and unclaimed and not self.kernel_proofs:
            return f"No proof of the kernel ran: all {unclaimed} are of recipes that it does not claim"
        return ""

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        write = terminalreporter.write_line
        if self.skips:
            terminalreporter.section("skipped, by reason")
            for reason, count in self.skips.most_common():
                write(f"{count:5d}  {reason}")
        if self.tally:
            terminalreporter.section("equal to the reference, bit for bit")
            for line in tally.lines(self.tally):
                write(line)
        if self.failures and "no" in (config.option.tbstyle, config.option.showcapture):  # the tracebacks hid them
            terminalreporter.section(REPRODUCE)
            for line in self.failures:
                write(line)
        if self.runs_tests and (reason := self._unproven()):
            terminalreporter.section("nothing was compared")
            write(f"{reason}, so nothing is proven: this is not green (exit status 5).")
