"""Options, header and verdicts of the suite: what a run may be asked for, what it says of itself, and when it is green.

Exit statuses are pytest's own, with two additions: 5 also when tests were selected and none of them passed or failed,
when `--ranks` left no case, when `--kernel` names a kernel and no proof of it ran, or when under `--require-gpu` all
proofs are of recipes that the kernel does not claim (a run that compared nothing is not green); and 3 for an
environment that can't run the suite at all. torch is imported late: a run that needs no device starts at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Generator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from megaproof import HOME, moved
from megaproof.proof import tally
from megaproof.proof.verdicts import (
    CASE_PROPERTY,
    COMPARED_PROPERTY,
    NOT_CLAIMED,
    OUT_OF_MEMORY,
    REPRODUCE,
    Verdicts,
    out_of_memory,
    skip_reason,
)

ROOT = HOME
MAX_RANKS = 72
"""The largest number of ranks that the kernel's interface allows."""
EXIT_ENVIRONMENT = 3
DEFAULT_KERNEL = "megaproof.proof.adapters:default"
"""As megaproof.proof.adapters.DEFAULT, which needs torch."""
VERDICTS = "megaproof-verdicts"
"""Name of the plugin that judges the run."""
CHOOSES_DISTRIBUTION = pytest.StashKey[bool]()
"""Whether the command line says how pytest-xdist distributes tests."""
SEED_BITS = 64
"""Philox takes a key of 64 bits."""

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # The gate gives one verdict for one tree: no random examples, no deadline that depends on the machine, no memory of
    # earlier runs. `--hypothesis-profile default` explores.
    settings.register_profile("gate", derandomize=True, database=None, deadline=None, print_blob=True)
    settings.load_profile("gate")


# ---- Options ---------------------------------------------------------------------------------------------------------


def _ranks(text: str) -> frozenset[int]:
    """'1,2,8' -> {1, 2, 8}."""
    parts = text.split(",")
    if not all(re.fullmatch(r"[0-9]{1,4}", part) and 1 <= int(part) <= MAX_RANKS for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of rank counts: it takes whole numbers from 1 to {MAX_RANKS} with commas between, "
            "such as 8 or 1,2,8"
        )
    return frozenset(map(int, parts))


def _seed(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) >= 1 << SEED_BITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: it takes a whole number from 0 to 2^{SEED_BITS} - 1")
    return int(text)


def _recipe(text: str) -> str:
    from megaproof.quant.recipe import RECIPES

    if text not in RECIPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a recipe: it takes one of {', '.join(RECIPES)}")
    return text


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("megaproof")
    group.addoption(
        "--ranks",
        type=_ranks,
        metavar="LIST",
        help="run only the cases of these rank counts, such as 8 or 1,2,8 (default: those of every rank count)",
    )
    group.addoption(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="added to the seed of every case (default: 0, the seeds that the goldens were made with)",
    )
    group.addoption(
        "--recipe",
        type=_recipe,
        metavar="NAME",
        help="run every case under this named recipe instead of its own; goldens are then not compared",
    )
    group.addoption(
        "--world",
        choices=("virtual", "gloo", "processes"),
        default="virtual",
        help="how the kernel's ranks run: all in one process or launch (default), one process each over gloo, or one "
        "process and one GPU each",
    )
    group.addoption(
        "--kernel",
        default=DEFAULT_KERNEL,
        metavar="MODULE:FACTORY",
        help="the kernel to prove, an adapter as in proof/adapters; this imports and RUNS FOREIGN CODE with your "
        f"rights (default: {DEFAULT_KERNEL})",
    )
    group.addoption(
        "--require-gpu",
        action="store_true",
        help="a case that runs without a GPU fails, and so does a test that needs one and is skipped",
    )


# ---- The environment -------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    found = ".".join(map(str, sys.version_info[:2]))
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python reads this file too, to be told so
        pytest.exit(f"Python {found} runs this; megaproof needs 3.11 or later", EXIT_ENVIRONMENT)
    missing = [name for name in ("torch", "numpy", "safetensors", "hypothesis") if not importlib.util.find_spec(name)]
    if missing:
        names = ", ".join(missing)
        needed = "nothing of the suite works without; `make setup` prints an interpreter that has all it needs"
        pytest.exit(f"{sys.executable} (Python {found}) has no {names}: {needed}", EXIT_ENVIRONMENT)
    if workers := getattr(config, "workerinput", {}).get("workercount"):
        # Threads of several processes that wait for each other on the same cores are many times slower; no bit moves.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    for line in filter(None, map(moved.of_test, config.args)):
        raise pytest.UsageError(line)
    if config.option.kernel != DEFAULT_KERNEL:
        _check_kernel(config.option.kernel)
    if config.option.world == "processes":
        import torch

        needed, gpus = max(config.option.ranks or {8}), torch.cuda.device_count()
        if gpus < needed:
            advice = "--world virtual runs all ranks on one GPU"
            pytest.exit(
                f"--world processes with {needed} ranks needs {needed} GPUs, found {gpus}; {advice}", EXIT_ENVIRONMENT
            )
    config.pluginmanager.register(Verdicts(config, DEFAULT_KERNEL), VERDICTS)


def _check_kernel(spec: str) -> None:
    """One sentence at the start for a --kernel that is no adapter; else every case would say so."""
    from megaproof.proof import adapters
    from megaproof.toolchain.errors import EnvironmentMissing

    try:
        adapters.make(spec).close()
    except adapters.AdapterError as error:
        raise pytest.UsageError(str(error)) from None
    except EnvironmentMissing as error:
        pytest.exit(f"--kernel {spec}: {_first_line(error)}", EXIT_ENVIRONMENT)
    except Exception as error:  # of other people's code: its own traceback, and the option that led there
        traceback.print_exc()
        raise pytest.UsageError(f"--kernel {spec} raises {type(error).__name__}: {_first_line(error)}") from None


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
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


@functools.cache
def _no_gpu() -> str | None:
    """Why no test can run on a GPU here, on one line, or None if there is an SM90 GPU with a fitting driver."""
    from megaproof.toolchain.errors import EnvironmentMissing
    from megaproof.toolchain.launch import require_device

    try:
        require_device()
    except EnvironmentMissing as error:
        return f"needs a GPU: {_first_line(error)}"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- Collection ------------------------------------------------------------------------------------------------------


def _case(item: pytest.Item) -> Any | None:
    """The case of cases/cases.py that an item was parametrised with, if any."""
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    return case if hasattr(case, "ranks") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ranks, seed = config.option.ranks, config.option.seed
    if ranks:
        dropped = [item for item in items if (case := _case(item)) and case.ranks not in ranks]
        config.hook.pytest_deselected(items=dropped)
        config.pluginmanager.get_plugin(VERDICTS).dropped = len(dropped)
        gone = set(dropped)
        items[:] = [item for item in items if item not in gone]
    for item in items:
        if case := _case(item):
            item.user_properties.append((CASE_PROPERTY, getattr(case, "id", "")))
            if getattr(case, "tier", "cpu") == "gpu":
                item.add_marker("gpu")
    if seed or config.option.recipe:
        from megaproof.quant.recipe import RECIPES

        # One new case for each old one: fixtures of a wider scope compare their parameter by identity.
        reseeded: dict[int, Any] = {}
        for item in items:
            if case := _case(item):
                if id(case) not in reseeded:
                    changes: dict[str, Any] = {"seed": (case.seed + seed) % (1 << SEED_BITS)}
                    if config.option.recipe and hasattr(case, "recipe"):
                        changes["recipe"] = RECIPES[config.option.recipe]
                    reseeded[id(case)] = dataclasses.replace(case, **changes)
                item.callspec.params["case"] = reseeded[id(case)]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    on_cases = [item for item in items if _case(item)]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    found: dict[tuple[str, int], str] = {}
    for item in on_cases:
        case, needs_gpu = _case(item), item.get_closest_marker("gpu") is not None
        key = getattr(case, "id", ""), case.ranks
        found[key] = "gpu" if needs_gpu and found.get(key) != "cpu" else "cpu"
    tiers = Counter(found.values())
    return [
        f"megaproof: {len(items)} tests selected, {len(on_cases)} of them on cases; {len(on_gpu)} need a GPU",
        f"megaproof: {tiers.total()} cases, {tiers['cpu']} of tier cpu and {tiers['gpu']} of tier gpu",
    ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := _no_gpu()):
        pytest.skip(reason)
    if _case(item) and item.config.option.require_gpu and (reason := _no_gpu()):
        pytest.fail(f"a case without a GPU under --require-gpu: {reason}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """After a test, whatever it was, its GPU memory is there for the workers beside this one."""
    result = yield  # pytest has let go of the test's fixtures by now, which it has not when they are torn down
    if "torch" in sys.modules and (item.get_closest_marker("gpu") or _case(item)):
        from megaproof.proof import memory

        memory.free()
    return result


# ---- Verdicts --------------------------------------------------------------------------------------------------------


def _python(root: Path) -> str:
    """The shortest name by which a shell in `root` finds the running interpreter."""
    executable = Path(sys.executable)
    if root == ROOT and executable.is_relative_to(ROOT):
        return str(executable.relative_to(ROOT))
    return next((name for name in ("python", "python3") if shutil.which(name) == sys.executable), sys.executable)


def _reproduce(item: pytest.Item | pytest.Collector) -> str:
    option, case = item.config.option, _case(item) if isinstance(item, pytest.Item) else None
    command = f"{shlex.quote(_python(item.config.rootpath))} -m pytest {shlex.quote(item.nodeid)}"
    if item.config.invocation_params.dir != item.config.rootpath:
        command = f"cd {shlex.quote(str(item.config.rootpath))} && {command}"
    if case:
        command += f" --ranks {case.ranks} --seed {option.seed}"
        command += f" --recipe {option.recipe}" if option.recipe else ""
        command += f" --world {option.world}" if option.world != "virtual" else ""
        command += f" --kernel {shlex.quote(option.kernel)}" if option.kernel != DEFAULT_KERNEL else ""
    if option.require_gpu:
        command += " --require-gpu"
    return command


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
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
        line = _reproduce(item)
        report.sections.append((REPRODUCE, line))
        report.user_properties.append(("reproduce", line))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.failed:
        report.sections.append((REPRODUCE, _reproduce(collector)))
    return report


# ---- Header ----------------------------------------------------------------------------------------------------------


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What decides the result of this run: options, versions, device, arithmetic and silicon goldens."""
    option = config.option
    ranks = ",".join(map(str, sorted(option.ranks))) if option.ranks else "all"
    recipe = f"recipe {option.recipe or 'of each case'}, world {option.world}, kernel {option.kernel}"
    lines = [f"ranks {ranks}, seed {option.seed}, {recipe}, require-gpu {'yes' if option.require_gpu else 'no'}"]
    for describe in (_versions, _device, _arithmetic, _silicon):
        try:
            lines.append(describe())
        except Exception as error:  # a header never stops a run: the tests will say the same, with a traceback
            lines.append(f"{describe.__name__.removeprefix('_')}: unknown ({_first_line(error)})")
    return [f"megaproof: {line}" for line in lines]


def _versions() -> str:
    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "absent"

    names = ("torch", "numpy", "numba", "cuda-core", "nvidia-cuda-nvrtc")
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def _device() -> str:
    if reason := _no_gpu():
        return f"device cpu ({reason})"
    from megaproof.toolchain.launch import require_device

    device = require_device()
    return f"device {device.name}, chip {device.chip}, {device.sms} SMs, driver {device.driver}"


def _arithmetic() -> str:
    from megaproof.quant import twin

    return "arithmetic " + "; ".join(map(twin.describe, ["cpu"] if _no_gpu() else ["cpu", "cuda"]))


def _silicon() -> str:
    from megaproof.quant.tables import DEFAULT_CHIP, chips

    measured = chips()
    chip = DEFAULT_CHIP
    if not _no_gpu():
        from megaproof.toolchain.launch import require_device

        chip = require_device().chip
    if chip in measured:
        return f"silicon goldens of {chip}: measured"
    known = ", ".join(measured) or "none"
    return f"silicon goldens of {chip}: unmeasured (measured: {known}); `python -m golden capture` measures this chip"
