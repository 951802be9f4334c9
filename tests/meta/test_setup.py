"""Setting up on a fresh machine: the interpreter that make uses (.ci/python), the pins, and the two commands."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megaproof.tests.support.patience import PATIENCE_S
from megaproof.tests.support.runs import ROOT, environment

INSTALLED_FROM = ("constraints.txt", "requirements.txt", "requirements-suite.txt")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

# Plays Python: knows the modules that are said to be in the file beside it, makes a .venv, and "installs" into it.
FAKE_PYTHON = """#!/bin/bash
here=$(dirname "$0")
case "$*" in
    *"import_module"*) [[ -e $here/has-all ]] || { echo "does not import torch" >&2; exit 1; } ;;
    *"ensurepip"*) [[ ! -e $here/no-venv ]] ;;
    "--version") echo "Python 3.99" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip install"*)
        echo "$*" >>pip.log
        [[ ! -e offline ]] || { echo "no index"; exit 1; }
        touch "$here/has-all" ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what .ci/python reads, and a bare fake python3 in bin/."""
    for name in (".ci/python", *INSTALLED_FROM):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON)
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    return tmp_path / "checkout"


def interpreter(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs .ci/python where python3 is the fake one and no other python3.x is found."""
    tools = checkout.parent / "tools"
    if not tools.exists():
        tools.mkdir()
        for name in ("bash", "cat", "cksum", "cp", "dirname", "mkdir", "mv", "rm", "tail", "touch"):
            (tools / name).symlink_to(shutil.which(name))  # type: ignore[arg-type]
    path = os.pathsep.join([str(checkout.parent / "bin"), str(tools)])
    env = {"PATH": path, **variables}
    command = [str(tools / "bash"), ".ci/python"]
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=PATIENCE_S)


def installs(checkout: Path) -> list[str]:
    log = checkout / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_a_python_that_has_all_is_used_as_it_is(checkout: Path) -> None:
    (checkout.parent / "bin" / "has-all").touch()
    run = interpreter(checkout)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"{checkout.parent}/bin/python3\n"
    assert not (checkout / ".venv").exists()


def test_a_bare_python_sets_up_a_venv_once(checkout: Path) -> None:
    first = interpreter(checkout)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout}/.venv/bin/python\n"
    assert "python3 does not import torch; setting up .venv" in first.stderr
    assert len(installs(checkout)) == 1
    assert installs(checkout)[0].endswith("-c constraints.txt -r requirements.txt -r requirements-suite.txt")
    second = interpreter(checkout)
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert len(installs(checkout)) == 1


def test_an_interrupted_installation_is_done_again(checkout: Path) -> None:
    (checkout / "offline").touch()
    run = interpreter(checkout)
    assert run.returncode == 3
    assert run.stdout == ""
    assert "setting up .venv failed" in run.stderr
    (checkout / "offline").unlink()
    assert interpreter(checkout).returncode == 0
    assert len(installs(checkout)) == 2


@pytest.mark.parametrize("name", INSTALLED_FROM)
def test_other_pins_are_installed(checkout: Path, name: str) -> None:
    assert interpreter(checkout).returncode == 0
    with (checkout / name).open("a") as pins:
        pins.write("# another line\n")
    assert interpreter(checkout).returncode == 0
    assert len(installs(checkout)) == 2


def test_a_venv_of_somebody_else_is_left_alone(checkout: Path) -> None:
    theirs = checkout / ".venv" / "theirs"
    theirs.parent.mkdir()
    theirs.touch()
    run = interpreter(checkout)
    assert run.returncode == 3
    assert ".venv is not make's own" in run.stderr
    assert theirs.exists()
    assert installs(checkout) == []


def test_without_venv_one_sentence_says_what_is_needed(checkout: Path) -> None:
    (checkout.parent / "bin" / "no-venv").touch()
    run = interpreter(checkout)
    assert run.returncode == 3
    assert "3.11 or later with venv and ensurepip" in run.stderr


def test_PYTHON_comes_first_and_must_exist(checkout: Path) -> None:
    (checkout.parent / "bin" / "has-all").touch()
    mine = checkout.parent / "mine"
    shutil.copytree(checkout.parent / "bin", mine)
    assert interpreter(checkout, PYTHON=f"{mine}/python3").stdout == f"{mine}/python3\n"
    run = interpreter(checkout, PYTHON="/nowhere/python3")
    assert run.returncode == 3
    assert "PYTHON=/nowhere/python3 is not a command" in run.stderr


def test_this_interpreter_would_be_used(tmp_path: Path) -> None:
    """The list of needed modules is right: the interpreter that runs the suite has them all."""
    command = ["bash", str(ROOT / ".ci" / "python")]
    env = environment() | {"PYTHON": sys.executable}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (run.returncode, run.stdout.strip()) == (0, sys.executable), run.stderr


def requirements(name: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def pins(python: str) -> dict[str, str]:
    """Name -> version of every constraint that holds for this Python on Linux."""
    held: dict[str, str] = {}
    for pin in requirements("constraints.txt"):
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is not exact"
        assert "*" not in specifier.version, f"{pin} is not exact"
        if pin.marker is None or pin.marker.evaluate({"python_version": python, "sys_platform": "linux"}):
            assert pin.name.lower() not in held, f"{pin.name} is pinned twice for Python {python}"
            held[pin.name.lower()] = specifier.version
    return held


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_exactly(python: str) -> None:
    machine = {"python_version": python, "sys_platform": "linux"}
    every = [requirement for name in INSTALLED_FROM[1:] for requirement in requirements(name)]
    needed = {of.name.lower() for of in every if of.marker is None or of.marker.evaluate(machine)}
    assert not needed - set(pins(python))


def test_pins_that_results_depend_on() -> None:
    assert pins("3.11")["torch"] == "2.13.0"
    assert {python: pins(python)["nvidia-cuda-nvrtc"] for python in PYTHONS} == dict.fromkeys(PYTHONS, "13.0.88")


def recipe_of(target: str) -> str:
    match = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match, f"Makefile has no target {target}"
    return match[1]


def test_the_two_commands() -> None:
    """README's commands are the Makefile's, the gate is the gate, and CI runs the suite that README names."""
    readme = (ROOT / "README.md").read_text()
    for command in ("make gate", "make test"):
        assert command in readme, f"README.md does not show `{command}`"
    assert "-m pytest -k dsv4_flash --ranks 8" in recipe_of("gate")
    assert "$(check)" in recipe_of("test")
    assert re.search(r"-m pytest (\$\$workers )?\$\(PYTEST_ARGS\)$", recipe_of("test"), re.MULTILINE), (
        "make test selects tests"
    )
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()
