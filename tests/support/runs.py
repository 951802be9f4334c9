"""Tiny pytest runs with this repository's proof/plugin.py and configuration, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from megaproof.tests.support import warm
from megaproof.tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]

CASES = """
    import dataclasses
    import pytest

    @dataclasses.dataclass(frozen=True)
    class Case:
        ranks: int
        seed: int

    CASES = [Case(1, 10), Case(2, 20), Case(8, 2**64 - 1)]

    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"tiny-r{case.ranks}")
    def test_case(case):
        print(f"seed of r{case.ranks} is {case.seed}")

    def test_without_a_case():
        pass
"""
FAILS = """
    import dataclasses
    import pytest

    @dataclasses.dataclass(frozen=True)
    class Case:
        ranks: int
        seed: int

    @pytest.mark.parametrize("case", [Case(8, 1)], ids=["it's-r8"])
    def test_case(case):
        assert case.seed < 0

    @pytest.fixture
    def broken():
        raise RuntimeError("in a fixture")

    def test_setup(broken):
        pass
"""
TIERS = """
    import dataclasses
    import pytest
    from megaproof.quant.recipe import Recipe

    @dataclasses.dataclass(frozen=True)
    class Case:
        ranks: int
        seed: int = 0
        tier: str = "cpu"
        recipe: Recipe = Recipe()

        @property
        def id(self):
            return f"tiny-r{self.ranks}"

    @pytest.mark.parametrize("case", [Case(1), Case(2, tier="gpu")], ids=lambda case: case.id)
    def test_case(case):
        print(f"recipe of r{case.ranks} is {case.recipe.silu}")
"""
SKIPS = """
    import pytest

    @pytest.mark.parametrize("n", range(3))
    def test_skipped(n):
        pytest.skip("no vectors")

    def test_other():
        pytest.importorskip("a_module_that_is_not_there")
"""


def environment() -> dict[str, str]:
    """This process's environment without what steers pytest, with the checkout importable and no GPU visible."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter in `folder`; text of both streams is captured."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S)


def pytest_run(folder: Path, source: str, *arguments: str, header: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs pytest on one test file of this text. The header imports torch, so it is left out unless asked for."""
    (folder / "test_tiny.py").write_text(textwrap.dedent(source))
    options = [
        "-p",
        "megaproof.proof.plugin",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(folder),
    ]
    options += [] if header else ["--no-header"]
    return warm.pytest_main(folder, [*options, *arguments, "test_tiny.py"], environment())
