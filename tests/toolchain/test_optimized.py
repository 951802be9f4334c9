"""Under `python -O` nothing is proven, and everything is computed as ever (toolchain/optimized.py)."""

from __future__ import annotations

import ast
from pathlib import Path

from megaproof.tests.support.house import ROOT, ROWS, modules, tree
from megaproof.tests.support.runs import python

COMPUTES = """
import importlib._bootstrap_external as loading

# Bytecode of torch without asserts need not exist, and takes seconds to make: it comes as it is, and ours is compiled.
place = loading.cache_from_source
loading.cache_from_source = lambda path: place(path, optimization=None if "site-packages" not in path else "")
import torch
from megaproof.cases import cases
from megaproof.cases.compare import Differs, hold, same
from megaproof.cases.run import run_case
from megaproof.golden import store
from megaproof.golden.__main__ import app as golden
from megaproof.kernel import api
from megaproof.proof.__main__ import app as proof
from typer.testing import CliRunner

found = run_case(cases.find("smoke-r1-t5-clamp10-fast1-zipf-mask30"))
print(store.check(found.case, store.read(found.case), found.sha256, found.trace) > 0, "golden holds")
for refuse in (
    lambda: hold(False, "a rule"),
    lambda: same("y", torch.zeros(1), torch.ones(1)),
    lambda: api.get_symm_buffer_for_mega_moe(None, 8, 0, 1, 128, 128),
):
    try:
        refuse()
    except (AssertionError, ValueError) as error:
        print("refused", type(error).__name__)
for app, arguments in ((golden, ["verify", "--only", "smoke-r1-t5"]), (proof, ["wrong"])):
    done = CliRunner().invoke(app, arguments)
    print(done.exit_code, done.output.count("leaves out asserts"), len(done.output.splitlines()))
"""


def test_pytest_refuses_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "test_tiny.py").write_text("def test_tiny():\n    assert False\n")
    plugin = ["-p", "megaproof.proof.plugin", "--rootdir", str(tmp_path)]
    run = python(tmp_path, "-O", "-m", "pytest", "--assert=plain", *plugin)
    assert run.returncode == 3, run.stdout + run.stderr
    assert (run.stdout + run.stderr).count("leaves out asserts") == 1
    assert "test_tiny" not in run.stdout


def test_the_layer_computes_and_the_proving_commands_refuse(tmp_path: Path) -> None:
    run = python(tmp_path, "-O", "-c", COMPUTES)
    assert run.stdout.splitlines() == [
        "True golden holds",
        "refused AssertionError",
        "refused Differs",
        "refused ConfigError",
        "3 1 1",
        "3 1 1",
    ], run.stdout + run.stderr


def test_only_tests_assert() -> None:
    """As ruff's S101, also where no ruff is: an assert of a helper is a check that -O takes away."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules(*ROWS, "conftest.py", "setup.py")
        if not path.name.startswith("test_")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assert)
    ]
    assert found == []
