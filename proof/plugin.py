"""All pytest hooks of the suite. Each says when something happens; what happens is in the modules beside this one.

A checkout's conftest.py loads it; elsewhere it is `pytest -p megaproof.proof.plugin --pyargs megaproof.proof.gate`.
torch is imported late: a run that needs no device starts at once.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from megaproof.proof import header, one_name, options, reproduce, selection, session, tally, workers
from megaproof.proof.record import NOT_CLAIMED, Record
from megaproof.proof.verdicts import (
    CASE_PROPERTY,
    COMPARED_PROPERTY,
    OUT_OF_MEMORY,
    REPRODUCE,
    REPRODUCE_PROPERTY,
    Attempts,
    Verdicts,
    died,
    final,
    out_of_memory,
    skip_reason,
)

pytest.register_assert_rewrite("megaproof.proof.gate")

VERDICTS = "megaproof-verdicts"
RECORD = pytest.StashKey[Record]()
DISTRIBUTION = pytest.StashKey[str | None]()
"""What the command line says of `--dist`; None: nothing."""
LINE = pytest.StashKey[session.Wire]()
"""To the parent of a session that has one; see proof/session.py."""
ATTEMPTS = pytest.StashKey[Attempts]()

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # The gate gives one verdict for one tree: no random examples, no deadline that depends on the machine, no memory of
    # earlier runs. `--hypothesis-profile default` explores.
    settings.register_profile("gate", derandomize=True, database=None, deadline=None, print_blob=True)
    settings.load_profile("gate")


# ---- The run ---------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """See proof/options.py."""
    options.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Refuses what can't be run, and begins the record."""
    for marker in options.MARKERS:
        config.addinivalue_line("markers", marker)
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnknownMarkWarning")
    options.check_python()
    options.end_on_sigterm()
    options.share_cores(config)
    options.check(config)
    record = Record.of(config)
    config.stash[RECORD], config.stash[ATTEMPTS] = record, Attempts()
    if not config.pluginmanager.register(Verdicts(config, record, config.stash[ATTEMPTS]), VERDICTS):
        raise pytest.UsageError(f"-p no:{VERDICTS} leaves nobody to say what a run proves: run without it")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
    """The session goes on in a child; and `--dist` is looked at before pytest-xdist gives it a value of its own."""
    dist = getattr(config.option, "dist", "no")
    config.stash[DISTRIBUTION] = None if dist == "no" else dist
    line = None
    if sys.platform == "linux" and session.is_whole_process():
        line = config.stash[LINE] = session.split(lambda end: died(config, end))
    status: int = pytest.ExitCode.TESTS_FAILED  # of a session that raises
    try:
        status = final(config, (yield), config.stash.get(RECORD, None))
    except pytest.UsageError:
        status = pytest.ExitCode.USAGE_ERROR
        raise
    finally:
        if line:
            line.ended(int(status))
    return status


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any | None:
    """See proof/workers.py."""
    return workers.scheduler(config, log, config.stash[DISTRIBUTION])


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What decides the result of this run: options, versions, device, arithmetic and silicon goldens."""
    record = config.stash[RECORD]
    record.described = header.describe()
    return [f"megaproof: {line}" for line in header.lines(record.options, record.versions, record.described)]


# ---- Collection ------------------------------------------------------------------------------------------------------


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """See proof/one_name.py."""
    return one_name.directory(path, parent)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """See proof/one_name.py."""
    return one_name.module(module_path, parent)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--ranks, --seed and --recipe; and what tests on cases are marked with."""
    dropped = selection.drop_other_ranks(items, config.option.ranks)
    config.stash[RECORD].dropped = len(dropped)
    config.hook.pytest_deselected(items=dropped)
    for item in items:
        if case := selection.case_of(item):
            item.user_properties.append((CASE_PROPERTY, selection.case_id(case)))
            if getattr(case, "tier", "cpu") == "gpu":
                item.add_marker("gpu")
    selection.change_cases(items, config.option.seed, config.option.recipe)


@pytest.hookimpl(tryfirst=True)  # before the terminal asks for the numbers
def pytest_collection_finish(session: pytest.Session) -> None:
    """After every deselection."""
    session.config.stash[RECORD].selected = selection.count(session.items)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """How many tests and cases were selected."""
    return [f"megaproof: {line}" for line in selection.lines(config.stash[RECORD].selected)]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that can't be collected is reproduced too."""
    report = yield
    if report.failed:
        report.sections.append((REPRODUCE, reproduce.line(collector)))
    return report


# ---- Tests -----------------------------------------------------------------------------------------------------------


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a GPU where there is none; under --require-gpu a case that would run without one fails."""
    needs_gpu, case = item.get_closest_marker("gpu"), selection.case_of(item)
    if needs_gpu and (reason := header.no_gpu()):
        pytest.skip(reason)
    if case and item.config.option.require_gpu and (reason := header.no_gpu()):
        pytest.fail(f"a case without a GPU under --require-gpu: {reason}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """After a test, whatever it was, its GPU memory is there for the workers beside this one."""
    line = item.config.stash.get(LINE, None)
    if line:
        line.running(item.nodeid)
    result = yield  # pytest has let go of the test's fixtures by now, which it has not when they are torn down
    if "torch" in sys.modules and (item.get_closest_marker("gpu") or selection.case_of(item)):
        from megaproof.proof import memory

        memory.free()
    if line:
        line.running("")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what was compared to a report, and to a failure the line that reproduces it."""
    if call.excinfo and out_of_memory(call.excinfo.value):
        call.excinfo.value.add_note(OUT_OF_MEMORY)
    report = yield
    item.config.stash[ATTEMPTS].add(report)
    if call.when == "call" and (compared := tally.take()):
        report.user_properties.append((COMPARED_PROPERTY, compared))
    expected = hasattr(report, "wasxfail")
    gpu_skip = report.skipped and not expected and item.get_closest_marker("gpu")
    if gpu_skip and item.config.option.require_gpu and not skip_reason(report).startswith(NOT_CLAIMED):
        report.outcome = "failed"
        report.longrepr = f"skipped under --require-gpu: {skip_reason(report)}"
    if report.failed:
        line = reproduce.line(item)
        report.sections.append((REPRODUCE, line))
        report.user_properties.append((REPRODUCE_PROPERTY, line))
    return report
