"""Processes that begin where an import of torch has ended: runs of pytest, forked from a template that is started once.

A run of pytest in a process of its own costs three to five seconds of imports, and then does a tenth of a second's
work. The template (toolchain/template.py) pays for the imports once; environment, folder, streams and arguments are the
run's own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from megaproof.quant import twin
from megaproof.tests.support.patience import PATIENCE_S
from megaproof.toolchain import child

PREPARE = "megaproof.tests.support.warm:load"
MODULES = (
    "pytest",
    "rich.console",
    "safetensors.torch",
    "typer.testing",
    "megaproof.reference.layer",
    "megaproof.cases.cases",
    "megaproof.toolchain.build",
    "megaproof.toolchain.launch",
)


class _Hypothesis:
    """A plugin that imports what every run with the checkout's plugin imports."""

    def pytest_configure(self) -> None:
        for module in ("hypothesis", "hypothesis.strategies"):
            if importlib.util.find_spec(module.partition(".")[0]):
                importlib.import_module(module)


def load() -> None:
    """What the template imports."""
    for module in MODULES:
        importlib.import_module(module)
    twin.describe("cpu")  # the header of a run names the compiled arithmetic, and loads it
    import pytest

    # pytest rewrites the asserts of hypothesis, and warns of one that another import has brought: so this is a run too.
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-c", os.devnull, "--rootdir", empty, "-p", "no:cacheprovider", empty], [_Hypothesis()])


def be_pytest(arguments: list[str]) -> int:
    """What a fork does: `python -m pytest` in its working directory."""
    import pytest

    sys.path[:0] = [os.getcwd()]
    sys.argv = ["pytest", *arguments]
    return int(pytest.console_main())


@functools.cache
def template(prepare: str = PREPARE) -> child.Template:
    """The one of this process that was made ready so."""
    made = child.Template(prepare)
    atexit.register(made.close)
    return made


def pytest_main(
    folder: Path,
    arguments: list[str],
    environment: dict[str, str],
    timeout_s: float = PATIENCE_S,
    source: child.Template | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python -m pytest ARGUMENTS` in `folder`, with both streams captured; see the module for what is shared.

    environment: the whole of it. source: default: `template()`. Raises subprocess.TimeoutExpired after timeout_s; then
    its processes have been killed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / name for name in ("stdout", "stderr")]
        with paths[0].open("w") as output, paths[1].open("w") as errors:
            process = (source or template()).fork(
                "megaproof.tests.support.warm:be_pytest", arguments, output, errors, folder=folder, environ=environment
            )
        try:
            status = process.wait(timeout_s)
        finally:
            process.close()
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
        return subprocess.CompletedProcess([sys.executable, "-m", "pytest", *arguments], status, *texts)
