"""Tiny pytest runs with this repository's conftest.py and configuration, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """This process's environment without what steers pytest, with the checkout importable and no GPU visible."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter in `folder`; text of both streams is captured."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


def pytest_run(folder: Path, source: str, *arguments: str, header: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs pytest on one test file of this text. The header imports torch, so it is left out unless asked for."""
    (folder / "test_tiny.py").write_text(textwrap.dedent(source))
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    options += [] if header else ["--no-header"]
    return python(folder, "-m", "pytest", *options, *arguments, "test_tiny.py")
