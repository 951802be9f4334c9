"""What a whole run amounts to: takes every report into the record, and says when a run without a failure is not green.

Needs no torch. Exit statuses are pytest's own, with these additions: 5 also when tests were selected and none of them
passed or failed, when `--ranks` left no case, when `--kernel` names a kernel and no proof of it ran, or when under
`--require-gpu` all proofs are of recipes that the kernel does not claim (a run that compared nothing is not green);
1 also when a module of ours was loaded under two names, when the session's process or a worker of pytest-xdist ended
before its end, and when calls of one test do not agree; 2 also when a test ends the run by pytest.exit, whatever status
it names; and 3 for an environment that can't run the suite at all.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Generator
from typing import Any

import pytest

from megaproof.proof import loaded, options, report, tally
from megaproof.proof.record import NOT_CLAIMED, Record, Test
from megaproof.proof.report import text
from megaproof.proof.session import End

REPRODUCE = "reproduce with"
"""Title of the line that ends every failure."""
KERNEL_PROPERTY, CASE_PROPERTY, COMPARED_PROPERTY, REPRODUCE_PROPERTY = "kernel", "case", "compared", "reproduce"
"""Properties of a test that compared a kernel with the reference, of one that ran on a case, of a passed one what it
compared a kernel in (see proof/tally.py), and of a failed one the command that repeats it."""
FROM_WORKER, TOLD = "megaproof", ("dropped", "selected", "names", "disagree")
"""What a worker of pytest-xdist tells at its end: these fields of its record."""
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
    """The reason that was given for a skip."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def unproven(record: Record) -> str:
    """Why a run without a failure proves nothing, or ''."""
    if not record.compared:
        return "No test passed or failed"
    if record.dropped and not record.on_cases:
        return f"No case of --ranks {','.join(map(str, record.options['ranks']))} ran"
    if record.kernel_named and not record.kernel_proofs:
        return f"No proof of --kernel {record.options['kernel']} ran"
    unclaimed = sum(count for reason, count in record.skips.items() if reason.startswith(NOT_CLAIMED))
    if record.options["require_gpu"] and unclaimed and not record.kernel_proofs:
        return f"No proof of the kernel ran: all {unclaimed} are of recipes that it does not claim"
    return ""


class Attempts:
    """The outcomes of every call of a test: plugins that run tests again until they pass show the last alone."""

    def __init__(self) -> None:
        self._found: dict[str, set[str]] = {}

    def add(self, report: pytest.TestReport) -> None:
        """One more report; of setup and teardown, failures alone."""
        if report.when == "call" or report.outcome not in ("passed", "skipped"):
            self._found.setdefault(report.nodeid, set()).add(report.outcome)

    def disagree(self, report: pytest.TestReport) -> bool:
        """Whether a call's report is not what every other call of its test came to."""
        return report.when == "call" and bool(self._found.get(report.nodeid, set()) - {report.outcome})


DISAGREE = "this test was run more than once and its calls do not agree: a run again makes nothing right"


def died(config: pytest.Config, end: End) -> None:
    """Says on standard error, and in the record, that the session's process ended too early. Runs in its parent."""
    record = Record.of(config)
    record.exit_status = end.exit_status
    if end.status is None:
        place = f" in {end.test}" if end.test else ""
        record.lost = [f"the session's process ended before its session ({end.how}){place}: a failure"]
    else:
        record.lost = [f"the session's process ended wrongly after its session ({end.how}): a failure"]
    if end.test:
        record.tests = {end.test: Test(end.test, "failed")}
    os.write(2, "".join(f"megaproof: {line}\n" for line in record.lost).encode())
    with contextlib.suppress(OSError):
        record.write(report.folder())


def final(config: pytest.Config, status: int, record: Record | None) -> int:
    """A run's exit status: 0 only for one whose record says so, and for a question on the command line itself."""
    if status != pytest.ExitCode.OK or hasattr(config, "workerinput"):
        return status
    if record and record.exit_status is not None:
        return record.exit_status
    if options.asks(config, *options.ASKING):
        return status
    sys.stderr.write("megaproof: nothing was run, so nothing is proven: this is not green (exit status 5)\n")
    return pytest.ExitCode.NO_TESTS_COLLECTED


class Verdicts:
    """The pytest plugin that keeps the record. With pytest-xdist the controller sees the reports of all workers."""

    def __init__(self, config: pytest.Config, record: Record, attempts: Attempts) -> None:
        self.record = record
        self.attempts = attempts
        self.is_worker = hasattr(config, "workerinput")
        self._begun = time.monotonic()
        self._written = ""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None]:
        """One phase of one test: setup, call or teardown. Before anybody else hears of it, calls have to agree."""
        if self.attempts.disagree(report):
            if report.nodeid not in self.record.disagree:
                self.record.disagree.append(report.nodeid)
            if not report.failed:
                report.outcome, report.longrepr = "failed", DISAGREE
        self.attempts.add(report)
        self._keep(report)
        return (yield)

    def _keep(self, report: pytest.TestReport) -> None:
        record, properties = self.record, dict(report.user_properties)
        test = record.tests.setdefault(report.nodeid, Test(report.nodeid))
        test.seconds = round(test.seconds + getattr(report, "duration", 0.0), 3)
        if report.skipped and not hasattr(report, "wasxfail"):
            test.outcome, test.skip = "skipped", skip_reason(report)
            record.skips[test.skip] = record.skips.get(test.skip, 0) + 1
        elif report.skipped:
            test.outcome = "xfailed"
        elif report.failed or (report.passed and report.when == "call"):
            test.outcome = "passed" if report.passed else "failed" if report.when == "call" else "error"
            record.compared += 1
            record.kernel_proofs += report.failed or KERNEL_PROPERTY in properties
            record.on_cases += CASE_PROPERTY in properties
            tally.merge(record.tally, properties.get(COMPARED_PROPERTY, {}) if report.passed else {})
        test.case = properties.pop(CASE_PROPERTY, test.case)
        test.kernel = str(properties.pop(KERNEL_PROPERTY, test.kernel))
        ours = (COMPARED_PROPERTY, REPRODUCE_PROPERTY)
        test.properties |= {name: value for name, value in properties.items() if name not in ours}
        test.reproduce += self._note_failure(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """One file, class or module that was looked through for tests."""
        if report.skipped:
            reason = f"{skip_reason(report)} (a whole {'file' if report.nodeid.endswith('.py') else 'group'})"
            self.record.skips[reason] = self.record.skips.get(reason, 0) + 1
        self._note_failure(report)

    def _note_failure(self, report: pytest.TestReport | pytest.CollectReport) -> list[str]:
        lines = [line for name, line in report.sections if name == REPRODUCE]
        self.record.reproduce += lines
        return lines

    def pytest_keyboard_interrupt(self) -> None:
        """Ctrl-C, or somebody's pytest.exit()."""
        self.record.interrupted = True

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker of pytest-xdist has ended: each has collected all tests, the controller none."""
        if error:
            self.record.lost.append(f"worker {node.gateway.id} ended before its session ({error}): a failure")
        told = getattr(node, "workeroutput", {}).get(FROM_WORKER, {})
        self.record.dropped = max(self.record.dropped, told.get("dropped", 0))
        self.record.selected = told.get("selected", self.record.selected)
        self.record.names = sorted({*self.record.names, *told.get("names", ())})
        self.record.disagree = sorted({*self.record.disagree, *told.get("disagree", ())})

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Decides what the run amounts to, and writes the record."""
        record = self.record
        record.names = sorted({*record.names, *loaded.problems()})
        if self.is_worker:
            told = {name: getattr(record, name) for name in TOLD}
            session.config.workeroutput[FROM_WORKER] = told
            return
        record.unproven = "" if record.listed_only else unproven(record)
        if record.unproven and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        green = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if record.interrupted and session.exitstatus in green:
            session.exitstatus = pytest.ExitCode.INTERRUPTED
        if (record.names or record.lost or record.disagree) and session.exitstatus in green:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        record.exit_status = int(session.exitstatus)
        record.seconds = round(time.monotonic() - self._begun, 3)
        if not record.listed_only:
            try:
                self._written = f"record of this run: {record.write(report.folder())}"
            except OSError as error:  # a folder that can't be written to is no verdict
                self._written = f"record of this run: not written ({error})"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        """Shows the record; the lines that repeat failures only where the tracebacks hid them."""
        hidden = "no" in (config.option.tbstyle, config.option.showcapture)
        for title, lines in text.sections(self.record, reproduce=hidden):
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)
        if self.record.listed_only:
            terminalreporter.write_line("megaproof: tests were listed and none was run: this is no verdict")
        if self._written and terminalreporter.verbosity >= 0:
            terminalreporter.write_line(self._written)
