"""Runs on several workers of pytest-xdist, and what they leave of GPU memory to each other (proof/plugin.py)."""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from megaproof.tests.support.runs import CASES, FAILS, SKIPS, pytest_run


@pytest.mark.skipif(not find_spec("xdist"), reason="pytest-xdist is not installed")
@pytest.mark.parametrize(("source", "status", "workers"), [(CASES, 0, 2), (SKIPS, 5, 1), (FAILS, 1, 1)])
def test_xdist_gives_the_same_verdict(tmp_path: Path, source: str, status: int, workers: int) -> None:
    """One worker is as far from the process that judges as two are, and cheaper."""
    run = pytest_run(tmp_path, source, "-n", str(workers))
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


@pytest.mark.skipif(not find_spec("xdist"), reason="pytest-xdist is not installed")
def test_a_file_that_makes_something_large_stays_on_one_worker(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    source = """
        import os
        import pathlib
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_it(number):
            with pathlib.Path(__file__).with_name("ran").open("a") as log:
                log.write(f"{os.getpid()}\\n")
    """
    run = pytest_run(tmp_path, source, "-n", "2", "-o", "one_worker=test_tiny.py")
    assert run.returncode == 0, run.stdout
    ran = (tmp_path / "ran").read_text().split()
    assert (len(ran), len(set(ran))) == (6, 1)
    assert all((pytestconfig.rootpath / file).is_file() for file in pytestconfig.getini("one_worker"))


GPU_MEMORY = """
    import dataclasses
    import weakref
    import pytest
    import torch
    from megaproof.proof import memory

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
