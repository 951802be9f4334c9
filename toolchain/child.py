"""Processes of our own: the same interpreter and the very same megaproof, wherever the caller is.

A child is `python -P -m megaproof.<module>` in the caller's working directory. The folder that holds megaproof comes
first on its PYTHONPATH, so neither a file beside the caller nor another copy of this project takes a module's place;
the caller's directory comes last, so that a user's own adapter is found there, unless the caller runs without it
(`python -P`, PYTHONSAFEPATH).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import megaproof

ROOT = Path(megaproof.__file__).resolve().parents[1]
"""What has to be on the path of imports: the checkout's root, or the folder that a wheel was installed into."""


def command(module: str, *arguments: str) -> list[str]:
    """The words that start `megaproof.<module>`; its environment has to be that of `environment`."""
    return [sys.executable, "-P", "-m", f"megaproof.{module}", *arguments]


def environment(**changes: str) -> dict[str, str]:
    """The caller's environment with these changes, in which megaproof and what lies beside the caller are found."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if not sys.flags.safe_path:
        paths.append(str(Path.cwd()))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **changes}


def start(module: str, *arguments: str, changes: dict[str, str] | None = None, **options: Any) -> subprocess.Popen:
    """Starts `megaproof.<module>`. changes: of the environment; options: those of subprocess.Popen."""
    return subprocess.Popen(command(module, *arguments), env=environment(**(changes or {})), **options)
