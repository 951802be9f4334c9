"""What a checkout holds: its files, the rows of the house, and who imports whom."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("megaproof", "toolchain", "quant", "reference", "kernel", "cases", "golden", "proof", "bench", "tests")
"""Top to bottom: a row imports the rows above it. Whatever else is imported comes from outside."""
PRODUCT = ROWS[:-1]
"""The rows that a wheel holds."""
TAG = re.compile(r"Eq\. \((\d+[a-z]?)\)")


@cache
def files() -> tuple[Path, ...]:
    """Every file of the checkout that is tracked, or would be if it were added now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive: no git to ask what is ignored
        folders = [ROOT / name for name in (*ROWS, "docs", ".ci", ".github")]
        found = [*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]
        listing = [str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts]
    return tuple(ROOT / name for name in listing if name and (ROOT / name).is_file())


def modules(*rows: str) -> list[Path]:
    """The Python files of these rows."""
    return sorted(p for p in files() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in rows)


def text(path: Path) -> str | None:
    """The text of a file, or None of a binary one."""
    data = path.read_bytes()
    return None if b"\0" in data else data.decode("utf-8", errors="replace")


def tags(paths: list[Path]) -> set[str]:
    """The equations that these files name."""
    return {tag for path in paths for tag in TAG.findall(path.read_text(encoding="utf-8"))}


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports, of `from a import b` both a and a.b."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = ["megaproof", *package][: len(package) + 2 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
