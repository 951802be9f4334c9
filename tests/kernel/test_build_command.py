"""`python -m kernel build`, as a shell calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from megaproof.bench.model.chips import CHIPS
from megaproof.kernel import __main__ as cli
from megaproof.kernel.host.sizes import shared_bytes
from megaproof.kernel.programs import PROGRAMS, probe
from megaproof.tests.support.runs import ROOT
from megaproof.toolchain import sass
from megaproof.toolchain.errors import EnvironmentMissing


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "kernel", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_command_line() -> None:
    """Of small programs: that every one passes the gate is tests/kernel/programs/test_registry.py's."""
    built = run_cli("build", "twin", "probes", "--json")
    report = json.loads(built.stdout)
    assert built.returncode == (3 if report["sass"].startswith("not checked") else 0), built.stderr
    rows = report["configurations"]
    assert all(row["chips"] == {"H200": 132, "H20": 78} for row in rows), "SMs are a run-time value"
    assert {row["target"] for row in rows} == {"twin", "probes"}
    assert {row["entry"] for row in rows if row["target"] == "probes"} == set(probe.PROGRAM.entries)
    assert not report["failed"]
    for wrong in (["build"], ["build", "nonsense"], ["nonsense"], ["build", "twin", "--pin"]):
        assert run_cli(*wrong).returncode == 2, wrong


def test_all_is_every_program_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = {name: PROGRAMS[name].shared for name in ("moe", "moe_g128", "phases")}
    assert fused == dict.fromkeys(fused, shared_bytes())
    assert cli.PROGRAMS is PROGRAMS
    small = {name: PROGRAMS[name] for name in ("twin", "stream")}
    monkeypatch.setattr(cli, "PROGRAMS", small)
    run = CliRunner().invoke(cli.app, ["build", "--all", "--json"])
    assert {row["target"] for row in json.loads(run.stdout)["configurations"]} == set(small)


def test_missing_disassembler_is_said_and_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EnvironmentMissing("nvdisasm missing: install it")

    monkeypatch.setattr(sass, "disassembler", missing)
    run = CliRunner().invoke(cli.app, ["build", "twin", "--json"])
    assert run.exit_code == 3, "what was not checked is not passed"
    report = json.loads(run.stdout)
    assert report["sass"].startswith("not checked: nvdisasm missing")
    assert {row["qgmma"] for row in report["configurations"]} == {None}
    run = CliRunner().invoke(cli.app, ["build", "--all", "--pin"])
    assert run.exit_code == 3
    assert "only what passed the whole gate is pinned" in run.stderr


def test_the_chips_are_those_of_the_model() -> None:
    assert {name: chip.sms for name, chip in CHIPS.items()} == cli.SMS
