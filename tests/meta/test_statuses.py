"""The verdict of a run: exit statuses, options, skips and the line that reproduces a failure (conftest.py)."""

from __future__ import annotations

import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.meta.runs import environment, pytest_run, python

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
    from quant.recipe import Recipe

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
GPU = """
    import pytest

    @pytest.mark.gpu
    def test_device():
        raise AssertionError("runs on a GPU only")

    @pytest.mark.gpu
    @pytest.mark.skipif(True, reason="chip unmeasured")
    def test_chip():
        pass

    @pytest.mark.gpu
    @pytest.mark.xfail(reason="known")
    def test_known():
        raise AssertionError

    def test_cpu():
        pass
"""
SKIPS = """
    import pytest

    @pytest.mark.parametrize("n", range(3))
    def test_skipped(n):
        pytest.skip("no vectors")

    def test_other():
        pytest.importorskip("a_module_that_is_not_there")
"""


def _count(output: str, reason: str) -> int:
    """How often the summary says that tests were skipped for this reason."""
    return sum(
        int(line.split()[0])
        for line in output.splitlines()
        if line.strip().endswith(reason) and line[:5].strip().isdigit()
    )


def test_a_run_of_skips_alone_is_not_green(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, SKIPS)
    assert run.returncode == 5, run.stdout
    assert "nothing was compared" in run.stdout
    assert _count(run.stdout, "no vectors") == 3


def test_a_module_that_skips_itself_is_counted(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, "import pytest\npytest.skip('whole file', allow_module_level=True)\n")
    assert run.returncode == 5, run.stdout
    assert _count(run.stdout, "whole file (a whole file)") == 1


@pytest.mark.parametrize("arguments", [["-k", "no_such_test"], ["--ranks", "4", "-k", "test_case"]])
def test_a_selection_of_nothing_is_not_green(tmp_path: Path, arguments: list[str]) -> None:
    run = pytest_run(tmp_path, CASES, *arguments)
    assert run.returncode == 5, run.stdout
    assert "nothing was compared" in run.stdout


def test_listing_tests_is_no_failure(tmp_path: Path) -> None:
    assert pytest_run(tmp_path, CASES, "--collect-only").returncode == 0


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
    for option, bad in values.items():
        arguments = [f"{option}={value}" for value in bad]
        every = f"import pytest; print([int(pytest.main(['-p', 'conftest', a])) for a in {arguments!r}])"
        run = python(tmp_path, "-c", every)
        assert run.stdout.strip().endswith(str([int(pytest.ExitCode.USAGE_ERROR)] * len(bad))), run.stdout
        for value in bad:
            assert f"argument {option}: {value!r} is not a" in run.stderr
        assert run.stderr.count("it takes ") == len(bad)


def test_without_a_gpu_its_tests_are_skipped(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, GPU)
    assert run.returncode == 0, run.stdout
    assert "1 passed, 3 skipped" in run.stdout
    assert "needs a GPU" in run.stdout
    assert _count(run.stdout, "chip unmeasured") == 1


def test_require_gpu_turns_skips_into_failures(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, GPU, "--require-gpu")
    assert run.returncode == 1, run.stdout
    assert "skipped under --require-gpu: needs a GPU" in run.stdout
    assert "skipped under --require-gpu: chip unmeasured" in run.stdout
    assert "3 errors" in run.stdout
    assert "1 passed" in run.stdout


def test_require_gpu_fails_a_case_that_runs_without_one(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, CASES, "--require-gpu", "--ranks", "8")
    assert run.returncode == 1, run.stdout
    assert "a case without a GPU under --require-gpu: needs a GPU" in run.stdout


def test_recipe_replaces_that_of_every_case(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, TIERS, "--recipe", "precise", "-k", "r1", "-s")
    assert run.returncode == 0, run.stdout
    assert "recipe of r1 is precise" in run.stdout


def test_gpu_cases_are_skipped_and_counted(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, TIERS)
    assert run.returncode == 0, run.stdout
    assert "2 cases, 1 of tier cpu and 1 of tier gpu" in run.stdout
    assert "1 passed, 1 skipped" in run.stdout
    assert "      1  needs a GPU" in f"  {run.stdout}".replace("\n", "\n  ")
    run = pytest_run(tmp_path, TIERS, "--require-gpu")
    assert run.returncode == 1, run.stdout
    assert "skipped under --require-gpu: needs a GPU" in run.stdout


def test_what_a_kernel_does_not_claim_is_no_missing_gpu(tmp_path: Path) -> None:
    source = """
        import pytest

        @pytest.mark.gpu
        @pytest.mark.skipif(True, reason="not claimed by tiny: recipe field silu")
        def test_kernel():
            pass

        def test_other():
            pass
    """
    run = pytest_run(tmp_path, source, "--require-gpu")
    assert run.returncode == 0, run.stdout
    assert _count(run.stdout, "not claimed by tiny: recipe field silu") == 1


def test_out_of_gpu_memory_is_no_wrong_kernel(tmp_path: Path) -> None:
    """In a test, in a fixture, and as the cause of another error; each fails with the note, and others without."""
    source = """
        import pytest
        import torch

        def test_call():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17.00 GiB")

        @pytest.fixture
        def large():
            raise torch.OutOfMemoryError("CUDA out of memory")

        def test_setup(large): pass

        def test_cause():
            try:
                test_call()
            except RuntimeError as error:
                raise AssertionError("no result") from error

        def test_other():
            raise RuntimeError("wrong kernel")
    """
    run = pytest_run(tmp_path, source)
    assert run.returncode == 1, run.stdout
    assert "3 failed, 1 error" in run.stdout
    note = "out of GPU memory, which says nothing about the kernel: fewer workers (-n), or a GPU that is free"
    assert sum(line.endswith(note) and line.startswith("E ") for line in run.stdout.splitlines()) == 3, run.stdout


GPU_MEMORY = """
    import dataclasses
    import weakref
    import pytest
    import torch
    from tests import memory

    @dataclasses.dataclass(frozen=True)
    class Case:
        ranks: int
        seed: int = 0

    class Tensors: pass

    held, freed = [], []
    torch.cuda.is_initialized = lambda: True
    torch.cuda.memory_reserved = lambda: 2 << 30
    torch.cuda.empty_cache = lambda: freed.append(sum(ref() is not None for ref in held))

    @pytest.fixture
    def tensors():
        made = Tensors()
        held.append(weakref.ref(made))
        yield made

    @pytest.mark.parametrize("case", [Case(1), Case(2)], ids=str)
    def test_case(case, tensors):
        assert case.ranks == 1

    def test_no_case(tensors): pass

    def test_what_was_freed():
        assert len(held) == 3
        assert freed == [0, 0], "after each case, when its fixtures and its frames were gone"
"""


def test_gpu_memory_is_given_back_after_a_test(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, GPU_MEMORY)
    assert "1 failed, 3 passed" in run.stdout, run.stdout
    run = pytest_run(tmp_path, GPU_MEMORY.replace("2 << 30", "1 << 20"), "-k", "freed or case")
    assert "assert [] == [0, 0]" in run.stdout, run.stdout


def test_a_kernel_of_which_nothing_was_proven_is_not_green(tmp_path: Path) -> None:
    kernel = "kernel.adapters.reference:ReferenceAdapter"
    run = pytest_run(tmp_path, CASES, "--kernel", kernel, header=True)
    assert run.returncode == 5, run.stdout
    assert f"No proof of --kernel {kernel} ran, so nothing is proven" in run.stdout
    assert f"kernel {kernel}" in run.stdout
    proven = "def test_kernel(record_property): record_property('kernel', 'tiny')\n"
    assert pytest_run(tmp_path, proven, "--kernel", kernel).returncode == 0


def test_processes_need_a_gpu_each(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, CASES, "--world", "processes", "--ranks", "4")
    assert run.returncode == 3, run.stdout
    assert "--world processes with 4 ranks needs 4 GPUs, found 0" in run.stdout + run.stderr


def test_the_line_names_every_option_that_steers_a_case(tmp_path: Path) -> None:
    options = ["--recipe", "precise", "--world", "gloo", "--kernel", "kernel.adapters.reference:ReferenceAdapter"]
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
    command = [*shlex.split(line), "-p", "conftest"]
    replay = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
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


def test_without_torch_one_sentence_and_status_3(tmp_path: Path) -> None:
    (tmp_path / "test_tiny.py").write_text("def test_it(): pass\n")
    hide = "import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main(['-p', 'conftest', '.']))"
    run = python(tmp_path, "-c", hide)
    assert run.returncode == 3, run.stdout
    assert "has no torch" in run.stderr
    assert "make setup" in run.stderr


def test_the_header_says_what_decides_the_result(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, CASES, "--ranks", "8,1", "--seed", "5", header=True)
    assert run.returncode == 0, run.stdout
    options = "ranks 1,8, seed 5, recipe of each case, world virtual, kernel kernel.adapters:default, require-gpu no"
    assert f"megaproof: {options}" in run.stdout
    for start in ("python 3.", "device cpu (needs a GPU", "arithmetic ", "silicon goldens of "):
        assert f"megaproof: {start}" in run.stdout, run.stdout


@pytest.mark.skipif(not find_spec("xdist"), reason="pytest-xdist is not installed")
@pytest.mark.parametrize(("source", "status"), [(CASES, 0), (SKIPS, 5), (FAILS, 1)])
def test_xdist_gives_the_same_verdict(tmp_path: Path, source: str, status: int) -> None:
    run = pytest_run(tmp_path, source, "-n", "2")
    assert run.returncode == status, run.stdout
    assert run.stdout.count(" -m pytest ") == (2 if status == 1 else 0)


@pytest.mark.skipif(not find_spec("xdist"), reason="pytest-xdist is not installed")
def test_xdist_computes_each_case_once(tmp_path: Path) -> None:
    """All proofs of a case run on one worker, and the line that reproduces a failure names the test as pytest does."""
    source = """
        import os
        import pathlib
        import dataclasses
        import pytest

        @dataclasses.dataclass(frozen=True)
        class Case:
            ranks: int
            seed: int = 0
            tier: str = "cpu"

            @property
            def id(self):
                return f"tiny-r{self.ranks}"

        @pytest.fixture(scope="module")
        def run(case):
            with pathlib.Path(__file__).with_name("computed").open("a") as log:
                log.write(f"{case.id} {os.getpid()}\\n")

        @pytest.mark.parametrize("case", [Case(n) for n in range(1, 7)], ids=lambda case: case.id, scope="module")
        class TestCase:
            def test_one(self, run): pass
            def test_two(self, run): pass
            def test_three(self, run, case): assert case.ranks < 6
    """
    run = pytest_run(tmp_path, source, "-n", "2")
    assert run.returncode == 1, run.stdout
    assert "1 failed, 17 passed" in run.stdout
    computed = [line.split() for line in (tmp_path / "computed").read_text().splitlines()]
    assert sorted(case for case, _ in computed) == [f"tiny-r{n}" for n in range(1, 7)]
    assert len({worker for _, worker in computed}) == 2
    (line,) = [line for line in run.stdout.splitlines() if " -m pytest " in line]
    assert shlex.split(line)[3] == "test_tiny.py::TestCase::test_three[tiny-r6]"


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


def test_an_unknown_marker_is_an_error(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, "import pytest\n\n@pytest.mark.gpus\ndef test_it(): pass\n")
    assert run.returncode == 2, run.stdout
    assert "'gpus' not found in `markers`" in run.stdout


def test_a_fixed_expected_failure_is_a_failure(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, "import pytest\n\n@pytest.mark.xfail\ndef test_it(): pass\n")
    assert run.returncode == 1, run.stdout
