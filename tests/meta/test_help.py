"""`--help` of every command and subcommand prints what it does, starts nothing and ends with 0."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from megaproof.tests.support.command_line import invoke
from megaproof.tests.support.house import ROOT, ROWS, modules

MAIN = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
CHILDREN = {"tests/support/interpreted.py", "tests/support/whoami.py", "toolchain/template.py"}
"""Processes that our own code starts, with arguments of its own: nobody calls them by hand."""


def named(path: str) -> Any:
    """The module of a file."""
    return importlib.import_module("megaproof." + path.removesuffix(".py").replace("/", "."))


RUNNABLE = sorted(
    str(path.relative_to(ROOT))
    for path in modules(*ROWS)
    if MAIN.search(path.read_text(encoding="utf-8")) and not path.name.startswith("test_")
)
APPS = [name for name in RUNNABLE if re.search(r"^app(: .*)? = ", (ROOT / name).read_text(), re.MULTILINE)]


def subcommands(app: typer.Typer) -> Iterator[list[str]]:
    """The words that lead to the command itself and to each one below it."""
    yield []
    yield from ([name] for name in getattr(typer.main.get_command(app), "commands", {}))


def refuse_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that `--help` starts is an error. Imports may start some, so they come before."""

    def started(*arguments: object, **_: object) -> None:
        raise RuntimeError(f"--help starts {arguments}")

    monkeypatch.setattr(subprocess, "Popen", started)


@pytest.mark.parametrize("name", APPS)
def test_help_of_every_subcommand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = named(name).app
    refuse_processes(monkeypatch)
    for words in subcommands(app):
        status, text = invoke(app, *words, "--help")
        assert status == 0, (name, words, text)
        assert "Usage:" in text


@pytest.mark.parametrize("name", sorted({*RUNNABLE} - {*APPS} - CHILDREN))
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_help_of_a_module_that_is_run_by_hand(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named(name)
    refuse_processes(monkeypatch)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert ended.value.code in (None, 0)
    assert capsys.readouterr().out.lower().startswith("usage:")


def test_every_command_is_walked() -> None:
    assert {f"{row}/__main__.py" for row in ("kernel", "golden", "reference", "proof", "bench")} == {*APPS}
    assert {*RUNNABLE} >= CHILDREN
