"""`python -m megaproof.tests.support.busy`: tests that processes or real time decide, many times on a busy machine.

A test marked `clock` waits for what processes do. On a machine with other work it has to give the verdict that it gives
on an idle one; here such a machine is made: processes that do nothing but use a core each, while pytest runs again and
again. The last line says how many runs failed; the exit status is 0 if none did.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BURNER = """
import os
parent = os.getppid()
while os.getppid() == parent:  # it ends with the process that started it, however that ends
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def burners(count: int) -> Iterator[None]:
    """While it lasts, `count` processes use a core each."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", BURNER]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def marked_clock() -> list[str]:
    """The ids of the tests that are marked so: collecting them once is cheaper than a hundred times."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "clock"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in output.splitlines() if "::" in line]


def run_again_and_again(times: int, burn: int, selection: list[str]) -> int:
    """How many of `times` runs of pytest did not end with status 0; each one's output is printed."""
    failed = 0
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    with burners(burn), tempfile.TemporaryFile("w+") as output:
        for number in range(1, times + 1):
            output.seek(0)
            output.truncate()
            started = time.monotonic()
            status = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
            seconds = time.monotonic() - started
            print(f"run {number} of {times}: status {status}, {seconds:.0f} s", flush=True)
            if status:
                failed += 1
                output.seek(0)
                print(output.read(), flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m megaproof.tests.support.busy", description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="runs of pytest (default: %(default)s)")
    parser.add_argument("--burn", type=int, default=4, help="processes that use a core each (default: %(default)s)")
    parser.add_argument("selection", nargs="*", help="what pytest runs (default: the tests marked clock)")
    options = parser.parse_args(arguments)
    failed = run_again_and_again(options.times, options.burn, options.selection or marked_clock())
    print(f"{failed} of {options.times} failed")
    return int(failed > 0 or options.times < 1)


if __name__ == "__main__":
    sys.exit(main())
