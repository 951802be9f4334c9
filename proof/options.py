"""What a run may be asked for, and the environments and options that end it at the start, in one sentence.

torch is imported late: a run that needs no device starts at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import sys
import traceback

import pytest

from megaproof import moved
from megaproof.toolchain import optimized, signals
from megaproof.toolchain.optimized import EXIT_ENVIRONMENT

MAX_RANKS = 72
"""The largest number of ranks that the kernel's interface allows."""
SEED_BITS = 64
"""Philox takes a key of 64 bits."""
DEFAULT_KERNEL = "megaproof.proof.adapters:default"
"""As megaproof.proof.adapters.DEFAULT, which needs torch."""
WORLDS = ("virtual", "gloo", "processes")
"""As megaproof.proof.adapters.WORLDS."""
NEEDED = ("torch", "numpy", "safetensors", "hypothesis")
"""Modules without which nothing of the suite works."""
MARKERS = (
    "gpu: needs an SM90 GPU; skipped without one, a failure under --require-gpu",
    "clock: processes or real time decide it; `make clock` runs these 100 times on a machine that is kept busy",
    "slow: takes more than about ten seconds on two cores",
)


LISTING = ("--collect-only", "--co", "--collectonly")
ASKING = ("--help", "-h", "--version", "-V", "--markers")
"""Options with which nothing is run and status 0 stays, if they stand on the command line itself."""


def asks(config: pytest.Config, *names: str) -> bool:
    """Whether the command line itself has one of these options: PYTEST_ADDOPTS and addopts may be forgotten there."""
    return any(name in config.invocation_params.args for name in names)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- Values ----------------------------------------------------------------------------------------------------------


def ranks(text: str) -> frozenset[int]:
    """'1,2,8' -> {1, 2, 8}. Raises ArgumentTypeError."""
    parts = text.split(",")
    if not all(re.fullmatch(r"[0-9]{1,4}", part) and 1 <= int(part) <= MAX_RANKS for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of rank counts: it takes whole numbers from 1 to {MAX_RANKS} with commas between, "
            "such as 8 or 1,2,8"
        )
    return frozenset(map(int, parts))


def seed(text: str) -> int:
    """A whole number of 64 bits. Raises ArgumentTypeError."""
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) >= 1 << SEED_BITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: it takes a whole number from 0 to 2^{SEED_BITS} - 1")
    return int(text)


def recipe(text: str) -> str:
    """The name of a recipe. Raises ArgumentTypeError."""
    from megaproof.quant.recipe import RECIPES

    if text not in RECIPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a recipe: it takes one of {', '.join(RECIPES)}")
    return text


def add(parser: pytest.Parser) -> None:
    """Adds the options of the suite to pytest's."""
    parser.addini("one_worker", "files whose tests all run on one worker of pytest-xdist", "linelist")
    parser.addini("megaproof_plugin", "set where a run without this plugin is to be refused, by --strict-config")
    group = parser.getgroup("megaproof")
    group.addoption(
        "--ranks",
        type=ranks,
        metavar="LIST",
        help="run only the cases of these rank counts, such as 8 or 1,2,8 (default: those of every rank count)",
    )
    group.addoption(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="added to the seed of every case (default: 0, the seeds that the goldens were made with)",
    )
    group.addoption(
        "--recipe",
        type=recipe,
        metavar="NAME",
        help="run every case under this named recipe instead of its own; goldens are then not compared",
    )
    group.addoption(
        "--world",
        choices=WORLDS,
        default=WORLDS[0],
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
        "--nonce",
        default=os.environ.pop("MEGAPROOF_NONCE", ""),  # a run inside this one is another run
        metavar="TEXT",
        help="kept in the record of the run, to tell it from others (default: MEGAPROOF_NONCE, which make sets)",
    )
    group.addoption(
        "--require-pinned",
        action="store_true",
        help="a run whose cubins are not pinned, such as after an edit of the kernel, ends at the start",
    )
    group.addoption(
        "--require-gpu",
        action="store_true",
        help="a case that runs without a GPU fails, and so does a test that needs one and is skipped",
    )


# ---- Refusals --------------------------------------------------------------------------------------------------------


def check_python() -> None:
    """Ends pytest with EXIT_ENVIRONMENT unless this interpreter is new enough, asserts, and imports what is needed."""
    found = ".".join(map(str, sys.version_info[:2]))
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python reads this file too, to be told so
        pytest.exit(f"Python {found} runs this; megaproof needs 3.11 or later", EXIT_ENVIRONMENT)
    if reason := optimized.why_not():
        pytest.exit(reason, EXIT_ENVIRONMENT)
    if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
        names = ", ".join(missing)
        needed = "nothing of the suite works without; `make setup` prints an interpreter that has all it needs"
        pytest.exit(f"{sys.executable} (Python {found}) has no {names}: {needed}", EXIT_ENVIRONMENT)


def end_on_sigterm() -> None:
    """SIGTERM ends the session as an interrupt does: fixtures are torn down, and what is open is tidied up."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        pytest.exit("SIGTERM", signals.EXIT_TERMINATED)

    if signals.may_handle_sigterm():
        signal.signal(signal.SIGTERM, end)


def share_cores(config: pytest.Config) -> None:
    """In a worker of pytest-xdist, gives torch its share of the cores.

    Threads of several processes that wait for each other on the same cores are many times slower; no bit moves.
    """
    if workers := getattr(config, "workerinput", {}).get("workercount"):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))


def check(config: pytest.Config) -> None:
    """Raises UsageError, or ends pytest with EXIT_ENVIRONMENT, for options that can't be run."""
    for line in filter(None, map(moved.of_test, config.args)):
        raise pytest.UsageError(line)
    if config.option.kernel != DEFAULT_KERNEL:
        _check_kernel(config.option.kernel)
    if config.option.require_pinned and not hasattr(config, "workerinput"):
        _check_pinned()
    if config.option.world == "processes":
        import torch

        needed, gpus = max(config.option.ranks or {8}), torch.cuda.device_count()
        if gpus < needed:
            advice = "--world virtual runs all ranks on one GPU"
            pytest.exit(
                f"--world processes with {needed} ranks needs {needed} GPUs, found {gpus}; {advice}", EXIT_ENVIRONMENT
            )


def _check_pinned() -> None:
    from megaproof.proof import header
    from megaproof.toolchain.errors import BuildError, EnvironmentMissing

    try:
        names = header.unpinned()
    except EnvironmentMissing as error:
        pytest.exit(f"--require-pinned: {first_line(error)}", EXIT_ENVIRONMENT)
    except BuildError as error:
        pytest.exit(f"--require-pinned: {first_line(error)}", 1)
    if names:
        renew = "what was gated is pinned by python -m kernel build --all --pin"
        pytest.exit(f"--require-pinned: the cubins of {', '.join(names)} are not pinned; {renew}", 1)


def _check_kernel(spec: str) -> None:
    """One sentence at the start for a --kernel that is no adapter; else every case would say so."""
    from megaproof.proof import adapters
    from megaproof.toolchain.errors import EnvironmentMissing

    try:
        adapters.make(spec).close()
    except adapters.AdapterError as error:
        raise pytest.UsageError(str(error)) from None
    except EnvironmentMissing as error:
        pytest.exit(f"--kernel {spec}: {first_line(error)}", EXIT_ENVIRONMENT)
    except Exception as error:  # of other people's code: its own traceback, and the option that led there
        traceback.print_exc()
        raise pytest.UsageError(f"--kernel {spec} raises {type(error).__name__}: {first_line(error)}") from None
