"""No verdict of the suite hangs on how busy the machine is: where real time comes in, the test is marked `clock`."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from megaproof.tests.support import busy, warm
from megaproof.tests.support.runs import ROOT

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def reads_a_clock(tree: ast.Module) -> bool:
    """Whether a module imports `time`, or takes the time of launches on a GPU."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name == "time" for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            return True
        if isinstance(node, ast.keyword) and node.arg == "enable_timing":
            return True
    return False


@pytest.mark.parametrize("file", TESTS, ids=lambda file: str(file.relative_to(ROOT / "tests")))
def test_who_reads_a_clock_is_marked(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    if reads_a_clock(tree):
        assert "@pytest.mark.clock" in text, f"{file.name} reads a clock, and no test of it is marked clock"
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("timeout", "deadline"):
            assert not isinstance(node.value, ast.Constant), (
                f"{file.name}:{node.lineno}: a limit in seconds; a test waits for events, for PATIENCE_S at most"
            )


def test_the_rule_sees_what_it_is_for() -> None:
    assert reads_a_clock(ast.parse("import time"))
    assert reads_a_clock(ast.parse("from time import sleep"))
    assert reads_a_clock(ast.parse("torch.cuda.Event(enable_timing=True)"))
    assert not reads_a_clock(ast.parse("from megaproof.bench.measure import timer"))


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are forked from the template of other tests, which has none of ranks."""
    monkeypatch.setattr(busy, "PREPARE", warm.PREPARE)


@pytest.mark.usefixtures("cheap")
def test_the_busy_machine_counts_failures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A test that fails in every other run; what it printed is shown."""
    source = """
from pathlib import Path

def test_it():
    runs = Path(__file__).with_suffix(".runs")
    runs.write_text(runs.read_text() + "." if runs.exists() else ".")
    assert len(runs.read_text()) % 2, "an even run"
"""
    file = tmp_path / "test_tiny.py"
    file.write_text(source)
    assert busy.main(["--times", "2", "--burn", "1", str(file)]) == 1
    output = capfd.readouterr().out
    assert "run 1 of 2: status 0" in output
    assert "run 2 of 2: status 1" in output
    assert "an even run" in output
    assert re.search(r"^2 runs beside 1 busy processes, .* s a run: 1 failed\n$", output, re.MULTILINE)


@pytest.mark.usefixtures("cheap")
def test_a_run_of_nothing_is_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test_nothing.py"
    file.write_text("")
    assert busy.main(["--times", "1", "--burn", "0", str(file)]) == 1
    assert capfd.readouterr().out.endswith(": 1 failed\n")


def test_a_machine_that_was_not_busy_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "BURNER", "")
    with pytest.raises(RuntimeError, match="the runs prove nothing"), busy.burners(1):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # until it has ended


@pytest.mark.parametrize("words", [["--times", "0"], ["--times", "-1"], ["--burn", "-1"]])
def test_no_run_is_refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        busy.main(words)
    assert caught.value.code == 2
    assert "at least one run, and no negative number" in capfd.readouterr().err
