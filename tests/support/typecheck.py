"""`python -m megaproof.tests.support.typecheck`: mypy over the rows of the product, as pyproject.toml configures it.

In a checkout the rows lie beside the package that they belong to, where mypy does not look. A folder of links in mypy's
cache has them as a wheel has them, inside `megaproof`. Exit status: mypy's own, 0 or 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from megaproof.tests.support.house import PRODUCT, ROOT

CACHE = ROOT / ".mypy_cache"


def laid_out(folder: Path) -> Path:
    """`folder`/megaproof, made anew, with links to what a wheel would hold."""
    package = folder / "megaproof"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        old.unlink()
    inside = [path for path in (ROOT / "megaproof").iterdir() if path.suffix == ".py"]
    for path in (*inside, *(ROOT / row for row in PRODUCT[1:])):
        (package / path.name).symlink_to(path)
    return package


def check() -> int:
    """Mypy's exit status; what it says, with the checkout's own paths, goes to standard output."""
    laid_out(CACHE / "house")
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(CACHE), "--no-error-summary"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "-p", "megaproof"],
        cwd=CACHE / "house",
        env={**os.environ, "MYPYPATH": str(CACHE / "house")},
        capture_output=True,
        text=True,
    )
    for line in (run.stdout + run.stderr).splitlines():
        inner = line.removeprefix("megaproof/")
        ours = (ROOT / inner.split(":")[0]).exists()
        print(inner if ours else line)
    return run.returncode


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m megaproof.tests.support.typecheck", description=__doc__).parse_args()
    sys.exit(check())
