"""Other people's modules of our folders' names, before ours on the path or in the current folder, break nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megaproof.reference.stages import STAGES
from megaproof.tests.support import wheel
from megaproof.tests.support.house import ROOT, ROWS
from megaproof.tests.support.patience import PATIENCE_S

THEIRS = [name for name in ROWS if name != "megaproof"] + ["conftest", "setup"]
SAYS = 'raise RuntimeError(f"{__name__} of the user was run")\n'

COMMANDS = ("kernel", "golden", "reference", "bench", "proof")
IMPORTS = f"""
import runpy, sys
from megaproof.kernel import api
from megaproof.golden import store
from megaproof.proof import adapters, prove
from megaproof.bench import command
from megaproof.tests.support import tiny
theirs = set(sys.argv[1:])
for module in {COMMANDS}:
    sys.argv[1:] = ["--help"]
    try:
        runpy.run_module(f"megaproof.{{module}}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, ended
assert not theirs & set(sys.modules), sys.modules.keys()
"""


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder with a module or a package of each name, which must not be run."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for number, name in enumerate(THEIRS):
        if number % 2 or name in ("conftest", "setup"):
            (folder / f"{name}.py").write_text(SAYS)
        else:
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(SAYS)
    return folder


def run(theirs: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """This interpreter where their folder comes before the checkout."""
    variables = wheel.environment(theirs, theirs, ROOT)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd or theirs, env=variables, capture_output=True, text=True, timeout=PATIENCE_S)


def test_their_modules_are_run_by_a_bare_import(theirs: Path) -> None:
    """So that this folder is what the other tests take it for."""
    for name in THEIRS:
        assert f"{name} of the user was run" in run(theirs, "-S", "-c", f"import {name}").stderr


def test_imports_and_commands(theirs: Path) -> None:
    """One process imports everything once; each command prints its help there, as `-m` would run it."""
    done = run(theirs, "-c", IMPORTS, *THEIRS)
    assert done.returncode == 0, done.stderr
    for module in COMMANDS:
        assert f"python -m megaproof.{module}" in done.stdout


def test_children_of_a_command(theirs: Path) -> None:
    """Ranks as processes, started from the user's folder as a user starts them."""
    done = run(theirs, "-m", "megaproof.proof", "gloo", "smoke-r2-t7x4-clamp10-fast0-uniform")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"0 of {len(STAGES) + 1} stages differ" in done.stdout


def test_pytest_in_the_checkout(theirs: Path) -> None:
    """Test modules are loaded as tests.<folder>.test_<room>, whatever package `tests` comes first on the path."""
    files = ["tests/quant/test_recipe.py", "tests/cases/test_cases.py", "tests/kernel/host/test_sizes.py"]
    done = run(theirs, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_gate_from_their_folder(theirs: Path) -> None:
    """All but their conftest.py, which pytest itself runs: in that folder it is the right one."""
    (theirs / "conftest.py").unlink()
    options = ["-q", "-p", "no:cacheprovider", "-p", "megaproof.proof.plugin", "--pyargs", "megaproof.proof.gate"]
    done = run(theirs, "-m", "pytest", *options, "-k", "smoke-r1-t0-clampnone-fast1-uniform-mask100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout
