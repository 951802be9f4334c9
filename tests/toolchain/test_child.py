"""Processes of our own find this very megaproof from anywhere, and what lies beside the caller if he would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megaproof import HOME
from megaproof.tests.support.patience import PATIENCE_S
from megaproof.toolchain import child

CALLER = """
import json, subprocess
from megaproof.tests.support.patience import PATIENCE_S
from megaproof.toolchain import child
with child.start("tests.support.whoami", "a b", changes={"CHANGED": "1"}, stdout=subprocess.PIPE, text=True) as process:
    print(process.communicate()[0])
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where files have the names of ours and of Python's own modules."""
    for name in ("quant", "golden", "random", "megaproof/__init__", "megaproof/quant/recipe"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('this is not the one')\n")
    (tmp_path / "an_adapter_beside_the_caller.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return tmp_path


def assert_ours(found: dict, cwd: Path, beside: bool) -> None:
    assert found == {
        "megaproof": str(child.ROOT / "megaproof" / "__init__.py"),
        "quant": str(HOME / "quant" / "recipe.py"),
        "cwd": str(cwd),
        "arguments": ["a b"],
        "beside": beside,
        "changed": "1",
    }


def whoami() -> dict:
    changes = {"CHANGED": "1"}
    with child.start("tests.support.whoami", "a b", changes=changes, stdout=subprocess.PIPE, text=True) as process:
        return json.loads(process.communicate()[0])


@pytest.mark.skipif(sys.flags.safe_path, reason="this process runs without its working directory")
@pytest.mark.parametrize("home", [None, ""], ids=["an empty folder", "an empty word"])
def test_what_lies_beside_the_caller_takes_no_place_of_ours(
    elsewhere: Path, home: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")) if home is None else home)
    assert_ours(whoami(), elsewhere, beside=True)


@pytest.mark.parametrize(("flags", "variables"), [(["-P"], {}), ([], {"PYTHONSAFEPATH": "1"})], ids=["-P", "variable"])
def test_a_caller_without_his_directory_has_children_without_it(
    elsewhere: Path, flags: list[str], variables: dict[str, str]
) -> None:
    environment = child.environment(PYTHONPATH=str(child.ROOT), **variables)
    run = subprocess.run(
        [sys.executable, *flags, "-c", CALLER], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert run.returncode == 0, run.stderr
    assert_ours(json.loads(run.stdout), elsewhere, beside=False)


def test_the_callers_own_paths_stay_behind_ours(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":/his/own::/another")
    first, *others = child.environment()["PYTHONPATH"].split(":")
    assert first == str(child.ROOT)
    assert others[:2] == ["/his/own", "/another"]
    assert child.environment(A="1")["A"] == "1"
