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

from megaproof.proof import header, one_name, options, reproduce, selection, tally
from megaproof.proof.record import NOT_CLAIMED, Record
from megaproof.proof.verdicts import (
    CASE_PROPERTY,
    COMPARED_PROPERTY,
    OUT_OF_MEMORY,
    REPRODUCE,
    REPRODUCE_PROPERTY,
    Verdicts,
    out_of_memory,
    skip_reason,
)

pytest.register_assert_rewrite("megaproof.proof.gate")

RECORD = pytest.StashKey[Record]()
CHOOSES_DISTRIBUTION = pytest.StashKey[bool]()
"""Whether the command line says how pytest-xdist distributes tests."""

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
    options.share_cores(config)
    options.check(config)
    record = Record(
        command=list(config.invocation_params.args),
        options=header.options(config),
        versions=header.versions(),
        kernel_named=config.option.kernel != options.DEFAULT_KERNEL,
        listed_only=config.option.collectonly,
    )
    config.stash[RECORD] = record
    config.pluginmanager.register(Verdicts(config, record), "megaproof-verdicts")


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
    """Looks at `--dist` before pytest-xdist gives it a value of its own."""
    config.stash[CHOOSES_DISTRIBUTION] = getattr(config.option, "dist", "no") != "no"
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any | None:
    """With `-n` alone, all proofs of a case run on one worker, so that each case is computed once.

    `--dist loadgroup` would be pytest-xdist's own way; xdist 3.8 marks the groups in a field that pytest 9.2 lacks.
    """
    if config.stash[CHOOSES_DISTRIBUTION]:
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByCase(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            return f"{file}::{name[name.index('[') :]}" if name.endswith("]") else nodeid

    return ByCase(config, log)


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
    result = yield  # pytest has let go of the test's fixtures by now, which it has not when they are torn down
    if "torch" in sys.modules and (item.get_closest_marker("gpu") or selection.case_of(item)):
        from megaproof.proof import memory

        memory.free()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what was compared to a report, and to a failure the line that reproduces it."""
    if call.excinfo and out_of_memory(call.excinfo.value):
        call.excinfo.value.add_note(OUT_OF_MEMORY)
    report = yield
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
