"""Old names: docs/migration.md shows the table of megaproof/moved.py, and each old name gives one line with the new."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import typer.main

from megaproof import moved
from megaproof.proof import adapters
from megaproof.tests.support.patience import PATIENCE_S
from megaproof.tests.support.runs import ROOT, environment, pytest_run, python

PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")

WALK = """
import importlib, json, sys
said = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
        said[name] = None
    except ImportError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def table(heading: str) -> dict[str, str]:
    """The rows old -> new below this heading of the page."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", section, re.MULTILINE))


def test_the_page_shows_what_the_table_says() -> None:
    imports = table("Imports")
    assert {old: moved.new_name(old) for old in imports} == imports
    assert moved.IMPORTS.keys() - imports.keys() == set()
    assert table("Commands") == moved.COMMANDS
    assert table("Kernels") == moved.KERNELS
    tests = table("Files of tests")
    assert moved.TESTS.items() <= tests.items()
    assert [new for new in tests.values() if not (ROOT / new).is_file()] == []


def test_every_new_name_exists() -> None:
    """Modules are found, not run: what a test costs to import is no matter of this one."""
    names = {*moved.IMPORTS.values(), *table("Imports").values()}
    assert sorted(name for name in names if importlib.util.find_spec(name) is None) == []
    for place in moved.NAMES.values():
        module, _, name = place.rpartition(".")
        assert hasattr(importlib.import_module(module), name), place


def test_every_old_import_gives_one_line_that_names_the_new_one() -> None:
    """Of a package that still has its name the bare import works and holds nothing: `python -m` needs it."""
    names = sorted(table("Imports"))
    asked = [n for n in names if n != "tests.cases" and (n in moved.IMPORTS or not n.startswith("tests."))]
    command = [sys.executable, "-c", WALK, json.dumps(asked)]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 0, run.stderr
    for name, line in json.loads(run.stdout).items():
        if line is None:
            assert "." not in name, f"import {name} works beside megaproof.{name}"
            continue
        assert "\n" not in line
        above = [name[: end.start()] for end in re.finditer(r"\.|$", name)]
        assert any(f"{old} is {moved.new_name(old)} now" in line for old in above), (name, line)


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        ("import kernel.api", "kernel.api is megaproof.kernel.api now"),
        ("from kernel.config import BLOCK_M", "kernel.config is megaproof.kernel.host.sizes now"),
        ("from tests.cases import Case", "tests.cases is megaproof.cases.cases now"),
        ("from tests import cases, inputs", "tests.inputs is megaproof.cases.inputs now"),
        ("from quant.recipe import SHAPES", "quant.recipe.SHAPES is megaproof.quant.shapes.SHAPES"),
        ("import toolchain.build", "toolchain.build is megaproof.toolchain.build now"),
        ("import megaproof.megaproof", "megaproof.megaproof is megaproof itself: import megaproof"),
        ("import megaproof.conftest", "megaproof.conftest is pytest's file of a checkout"),
    ],
)
def test_an_import_that_is_refused_says_why_in_one_line(statement: str, line: str) -> None:
    run = python(ROOT, "-c", statement)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ImportError: ")
    assert line in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("module", ["tests.meta.wrong", "tests.sanitize", "reference.processes", "kernel.bench"])
def test_an_old_module_behind_m_gives_one_line(module: str) -> None:
    run = python(ROOT, "-m", module, "--help")
    line = moved.of_command(f"python -m {module}") or moved.of_import(module)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"{line}\n")


def test_an_old_command_of_the_kernel_gives_one_line() -> None:
    run = python(ROOT, "-m", "kernel", "bench", "--tokens", "8")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "python -m kernel bench is python -m bench sweep now\n"


@pytest.mark.parametrize("old", [old for old in moved.COMMANDS if old.count(" ") == 3])
def test_every_old_command_is_refused(
    old: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, module, command = old.split()
    monkeypatch.setattr(sys, "argv", [module, command, "--json"])
    with pytest.raises(SystemExit) as ended:
        moved.refuse_old_command(module)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{old} is {moved.COMMANDS[old]} now\n"


@pytest.mark.parametrize("new", sorted(set(moved.COMMANDS.values())))
def test_every_new_command_exists(new: str) -> None:
    *_, module, command = new.split()
    app = importlib.import_module(f"megaproof.{module}.__main__").app
    assert command in typer.main.get_command(app).commands


@pytest.mark.parametrize("old", moved.KERNELS)
def test_an_old_kernel_gives_one_line(old: str) -> None:
    with pytest.raises(adapters.AdapterError) as refused:
        adapters.load(old)
    assert str(refused.value) == f"--kernel {old} is --kernel {moved.KERNELS[old]} now"
    assert callable(adapters.load(moved.KERNELS[old]))
    assert old.partition(".")[0] not in set(sys.modules) - {"tests"}, "a refused import leaves a package behind"


def test_an_old_test_file_gives_one_line(tmp_path: pytest.TempPathFactory) -> None:
    run = pytest_run(tmp_path, "", "tests/test_config.py::test_x")
    assert run.returncode == 4
    assert "tests/test_config.py is tests/kernel/host/test_sizes.py now" in run.stderr
