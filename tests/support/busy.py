"""`python -m megaproof.tests.support.busy`: tests that processes or real time decide, many times on a busy machine.

A test marked `clock` waits for what processes do. On a machine with other work it has to give the verdict that it gives
on an idle one; here such a machine is made: processes that do nothing but use a core each, while pytest runs again and
again. Each run is forked from a process that has imported torch (tests/support/warm.py), and the ranks of all runs from
another, so that a run spends its time in the tests. The last line counts runs and failures; the exit status is 0 if
none failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megaproof.proof.worlds import gloo
from megaproof.tests.support import warm
from megaproof.toolchain import child

ROOT = Path(__file__).resolve().parents[2]
PREPARE = "megaproof.tests.support.busy:load"
BURNER = """
import os
parent = os.getppid()
while os.getppid() == parent:  # it ends with the process that started it, however that ends
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def burners(count: int) -> Iterator[None]:
    """While it lasts, `count` processes use a core each. Raises RuntimeError at the end if one of them did not last."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", BURNER]) for _ in range(count)]
    try:
        yield
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a process that was to keep the machine busy has ended: the runs prove nothing")
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def load() -> None:
    """What the template of the runs does once: it has a template of ranks, which every run inherits."""
    warm.load()
    for module in ("megaproof.proof.__main__", "megaproof.proof.adapters.megaproof"):  # what the tests import
        importlib.import_module(module)
    gloo.template()


def pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One run in the checkout, without a memory of earlier ones."""
    source = warm.template(PREPARE)
    return warm.pytest_main(ROOT, ["-q", "-p", "no:cacheprovider", *arguments], child.environment(), source=source)


def marked_clock() -> list[str]:
    """The ids of the tests that are marked so: collecting them once is cheaper than a hundred times."""
    listed = pytest("--collect-only", "-m", "clock")
    if listed.returncode:
        raise RuntimeError(f"the tests can't be collected:\n{listed.stdout}{listed.stderr}")
    return [line for line in listed.stdout.splitlines() if re.match(r"\S+\.py::", line)]


def run_again_and_again(times: int, burn: int, selection: list[str]) -> list[int]:
    """The status of each of `times` runs of pytest; what a run printed that did not end with 0 is shown."""
    statuses: list[int] = []
    with burners(burn):
        for number in range(1, times + 1):
            started = time.monotonic()
            run = pytest(*selection)
            statuses.append(run.returncode)
            seconds, failed = time.monotonic() - started, sum(map(bool, statuses))
            counts = run.stdout.rstrip().rpartition("\n")[2].strip("= ")
            print(
                f"run {number} of {times}: status {run.returncode}, {seconds:.0f} s, {failed} failed so far; {counts}",
                flush=True,
            )
            if run.returncode:
                print(run.stdout + run.stderr, flush=True)
    return statuses


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m megaproof.tests.support.busy", description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="runs of pytest (default: %(default)s)")
    parser.add_argument("--burn", type=int, default=4, help="processes that use a core each (default: %(default)s)")
    parser.add_argument("selection", nargs="*", help="what pytest runs (default: the tests marked clock)")
    options = parser.parse_args(arguments)
    if options.times < 1 or options.burn < 0:
        parser.error(f"--times {options.times} --burn {options.burn}: at least one run, and no negative number")
    started = time.monotonic()
    statuses = run_again_and_again(options.times, options.burn, options.selection or marked_clock())
    failed, seconds = sum(map(bool, statuses)), (time.monotonic() - started) / len(statuses)
    print(f"{len(statuses)} runs beside {options.burn} busy processes, {seconds:.1f} s a run: {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
