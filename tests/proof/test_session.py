"""A process that ends in a test is a failure, once and named, whatever status it gives itself (proof/session.py)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from megaproof.proof import record, session
from megaproof.tests.support.runs import pytest_run

CRASH = """
    import atexit, ctypes, os, signal, sys
    import pytest

    def ends(): WHAT

    @pytest.fixture
    def around():
        SETUP
        yield
        TEARDOWN

    @pytest.mark.parametrize("n", range(3))
    def test_before(n): pass

    def test_crash(around):
        CALL

    def test_after(): pass
"""
ENDS = {
    "exit 0": "os._exit(0)",
    "exit 3": "os._exit(3)",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "segv": "ctypes.string_at(0)",
}


def crash(what: str, place: str = "CALL") -> str:
    """The file in which `what` happens at one place."""
    source = CRASH.replace("WHAT", what).replace(place, "ends()")
    for other in ("SETUP", "CALL", "TEARDOWN"):
        source = source.replace(other, "pass")
    return source


@pytest.mark.parametrize(
    ("what", "place"),
    [(ENDS["exit 0"], "SETUP"), (ENDS["exit 0"], "TEARDOWN"), *((what, "CALL") for what in ENDS.values())],
)
def test_a_crash_is_a_failure(tmp_path: Path, what: str, place: str) -> None:
    run = pytest_run(tmp_path, crash(what, place), "-q")
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stderr.count("in test_tiny.py::test_crash: a failure") == 1, run.stderr
    found = record.read(tmp_path / "reports" / record.NAME)
    assert found.exit_status == 1
    assert [(test.id, test.outcome) for test in found.tests.values()] == [("test_tiny.py::test_crash", "failed")]


@pytest.mark.skipif(not find_spec("xdist"), reason="pytest-xdist is not installed")
@pytest.mark.parametrize(("place", "passed"), [("SETUP", 4), ("TEARDOWN", 5)])
def test_a_crashed_worker_is_a_failure_once(tmp_path: Path, place: str, passed: int) -> None:
    """The test is not run again in the worker that comes after, and the others are run; after a call it had passed."""
    run = pytest_run(tmp_path, crash("os._exit(0)", place), "-n", "1", "-q")
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"1 failed, {passed} passed" in run.stdout, run.stdout
    assert "worker 'gw0' crashed while running 'test_tiny.py::test_crash'" in run.stdout


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("pytest.exit('done', 0)", 2),
        ("pytest.exit('done', 5)", 2),
        ("pytest.exit('no driver', 3)", 3),
        ("sys.exit(0)", 1),
        ("atexit.register(os._exit, 0); raise AssertionError", 1),
    ],
)
def test_no_end_of_a_process_is_green(tmp_path: Path, what: str, status: int) -> None:
    run = pytest_run(tmp_path, crash(what), "-q")
    assert run.returncode == status, run.stdout + run.stderr


def test_a_session_is_its_parents_to_end(tmp_path: Path) -> None:
    """A signal to the process that the shell knows reaches the session: it is interrupted, and tears down."""
    source = """
        import os, signal, time
        import pytest

        @pytest.fixture
        def around():
            yield
            print("torn down")

        def test_signal(around):
            os.kill(os.getppid(), signal.SIGINT)
            while True:
                time.sleep(0.01)  # pause() would miss a signal that comes before it
    """
    run = pytest_run(tmp_path, source, "-s")
    assert run.returncode == 2, run.stdout + run.stderr
    assert "torn down" in run.stdout


def test_what_is_told_and_what_is_not() -> None:
    line = session.Wire()
    assert line.read(0) == session.End(0, None, "")
    assert line.read(0).exit_status == session.DIED, "a process that says nothing is not believed"
    line.running("test_a")
    assert line.read(-9).test == "test_a"
    assert line.read(-9).how == "SIGKILL"
    line.running("")
    line.ended(0)
    assert [line.read(code).exit_status for code in (0, 3, -11)] == [0, 3, 1]
    line.ended(5)
    assert line.read(0).exit_status == 5
    line.running("x" * 2 * session.SIZE)
    assert set(line.read(0).test) == {"x"}
