"""What a run may be asked for, what its header says, and the line that reproduces a failure (proof/plugin.py)."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from megaproof.tests.support import warm
from megaproof.tests.support.runs import CASES, FAILS, TIERS, environment, pytest_run, python


def test_ranks_deselects_other_cases_only(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, CASES, "--ranks", "1,8", "-v")
    assert run.returncode == 0, run.stdout
    assert "3 passed, 1 deselected" in run.stdout
    assert "tiny-r2" not in run.stdout
    assert "3 tests selected, 2 of them on cases" in run.stdout


def test_seed_is_added_to_every_case(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, CASES, "--seed", "7", "-s")
    assert run.returncode == 0, run.stdout
    for ranks, seed in {1: 17, 2: 27, 8: 6}.items():  # the last one wraps at 2^64
        assert f"seed of r{ranks} is {seed}" in run.stdout


def test_a_bad_option_is_a_usage_error(tmp_path: Path) -> None:
    values = {
        "--ranks": ["", "8,", "0", "73", "-1", "1.5", "\u0661"],
        "--seed": ["", "-1", "x", "1e3", str(2**64)],
        "--recipe": ["", "Default", "no such"],
    }
    every = [f"{option}={value}" for option, bad in values.items() for value in bad]
    many = f"import pytest; print([int(pytest.main(['-p', 'megaproof.proof.plugin', a])) for a in {every!r}])"
    run = python(tmp_path, "-c", many)
    assert run.stdout.strip().endswith(str([int(pytest.ExitCode.USAGE_ERROR)] * len(every))), run.stdout
    for option, bad in values.items():
        for value in bad:
            assert f"argument {option}: {value!r} is not a" in run.stderr
    assert run.stderr.count("it takes ") == len(every)


def test_recipe_replaces_that_of_every_case(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, TIERS, "--recipe", "precise", "-k", "r1", "-s")
    assert run.returncode == 0, run.stdout
    assert "recipe of r1 is precise" in run.stdout


def test_processes_need_a_gpu_each(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, CASES, "--world", "processes", "--ranks", "4")
    assert run.returncode == 3, run.stdout
    assert "--world processes with 4 ranks needs 4 GPUs, found 0" in run.stdout + run.stderr


def test_the_line_names_every_option_that_steers_a_case(tmp_path: Path) -> None:
    options = [
        "--recipe",
        "precise",
        "--world",
        "gloo",
        "--kernel",
        "megaproof.proof.adapters.reference:ReferenceAdapter",
    ]
    run = pytest_run(tmp_path, TIERS.replace("print(", "raise AssertionError("), "-k", "r1", *options)
    assert run.returncode == 1, run.stdout
    (line,) = [line for line in run.stdout.splitlines() if " -m pytest " in line]
    assert shlex.split(line)[4:] == ["--ranks", "1", "--seed", "0", *options]


def test_a_failure_ends_with_a_line_that_reproduces_it(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, FAILS, "--seed", "3", "--ranks", "8")
    assert run.returncode == 1, run.stdout
    lines = [line for line in run.stdout.splitlines() if " -m pytest " in line]
    assert len(lines) == 2, run.stdout
    options = {shlex.split(line)[3]: shlex.split(line)[4:] for line in lines}
    assert options == {
        "test_tiny.py::test_case[it's-r8]": ["--ranks", "8", "--seed", "3"],
        "test_tiny.py::test_setup": [],
    }
    line = next(line for line in lines if "--seed" in line)
    interpreter, *module, test = shlex.split(line)[:4]
    assert (interpreter, module) == (sys.executable, ["-m", "pytest"])
    options = [test, *shlex.split(line)[4:], "-p", "megaproof.proof.plugin", "-p", "no:cacheprovider"]
    replay = warm.pytest_main(tmp_path, options, environment())
    assert "assert 4 < 0" in replay.stdout, replay.stdout
    assert replay.returncode == 1


@pytest.mark.parametrize("arguments", [["--tb=no"], ["--show-capture=no"], ["--tb=line"]])
def test_the_line_is_there_whatever_pytest_prints(tmp_path: Path, arguments: list[str]) -> None:
    run = pytest_run(tmp_path, FAILS, "--seed", "3", *arguments)
    assert run.stdout.count(" -m pytest ") == 2, run.stdout


def test_a_file_that_cannot_be_collected_is_reproduced_too(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, "import a_module_that_is_not_there\n")
    assert run.returncode == 2, run.stdout
    assert " -m pytest test_tiny.py" in run.stdout


def test_the_header_says_what_decides_the_result(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, CASES, "--ranks", "8,1", "--seed", "5", header=True)
    assert run.returncode == 0, run.stdout
    options = (
        "ranks 1,8, seed 5, recipe of each case, world virtual, kernel megaproof.proof.adapters:default, require-gpu no"
    )
    assert f"megaproof: {options}" in run.stdout
    for start in ("python 3.", "device cpu (needs a GPU", "arithmetic ", "silicon goldens of "):
        assert f"megaproof: {start}" in run.stdout, run.stdout


def test_examples_are_the_same_in_every_run(tmp_path: Path) -> None:
    source = """
        from hypothesis import given, settings, strategies

        @given(strategies.integers())
        @settings(max_examples=5)
        def test_it(number):
            print("example", number)
    """
    first, second = (pytest_run(tmp_path, source, "-s").stdout for _ in range(2))
    examples = [line for line in first.splitlines() if "example" in line]
    assert len(examples) >= 5
    assert examples == [line for line in second.splitlines() if "example" in line]
