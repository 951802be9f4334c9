"""Results as files: written whole or not at all, so that a run that is killed leaves what it had measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaproof.bench.measure.points import UsageError
from megaproof.toolchain import files

STDOUT = "-"


def check_json(path: str | None) -> None:
    """Raises UsageError for a place where no file can be, and for what is there and is no file."""
    if path in (None, STDOUT):
        return
    if not Path(path).parent.is_dir():
        raise UsageError(f"--json {path} must lie in a folder that exists")
    if Path(path).exists() and not Path(path).is_file():
        raise UsageError(f"--json {path} must be a file; {STDOUT} is stdout")


def write_json(result: dict[str, Any], path: str) -> None:
    """Replaces the file; a link stays one."""
    files.replace(Path(path).resolve(), (json.dumps(result, indent=1) + "\n").encode())
