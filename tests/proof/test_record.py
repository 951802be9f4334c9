"""The record of a run: complete however the run ends, the same with workers, and enough to make every view from."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from megaproof.proof import __main__ as cli
from megaproof.proof import record, report
from megaproof.proof.record import RecordError
from megaproof.tests.support.command_line import invoke
from megaproof.tests.support.runs import FAILS, ROOT, TIERS, pytest_run

MIXED = """
    import dataclasses
    import pytest

    @dataclasses.dataclass(frozen=True)
    class Case:
        ranks: int
        seed: int = 0

        @property
        def id(self):
            return f"tiny-r{self.ranks}"

    @pytest.mark.parametrize("case", [Case(1), Case(2)], ids=lambda case: case.id)
    def test_case(case, record_property):
        record_property("kernel", f"tiny on {case.ranks}")
        record_property("fp64_bound_used", 0.25)
        assert case.ranks < 2

    def test_skipped():
        pytest.skip("no vectors")

    @pytest.mark.xfail(reason="known")
    def test_known():
        raise AssertionError

    @pytest.fixture
    def broken():
        raise RuntimeError("in a fixture")

    def test_setup(broken):
        pass
"""


def recorded(folder: Path) -> record.Record:
    return record.read(folder / "reports" / record.NAME)


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_run_writes_all_of_it(tmp_path: Path, workers: list[str]) -> None:
    if workers and not find_spec("xdist"):
        pytest.skip("pytest-xdist is not installed")
    run = pytest_run(tmp_path, MIXED, "--seed", "3", *workers)
    assert run.returncode == 1, run.stdout
    assert f"record of this run: {tmp_path}/reports/run.json" in run.stdout
    found = recorded(tmp_path)
    assert found.exit_status == 1
    assert found.options["seed"] == 3
    assert found.versions["python"].startswith("3.")
    assert found.selected == {"tests": 5, "on_cases": 2, "need_gpu": 0, "cases_cpu": 2, "cases_gpu": 0}
    assert found.verdicts() == {"tiny-r1": {"test_case": "passed"}, "tiny-r2": {"test_case": "failed"}}
    outcomes = {test.check: test.outcome for test in found.tests.values() if test.case is None}
    assert outcomes == {"test_skipped": "skipped", "test_known": "xfailed", "test_setup": "error"}
    assert found.skips == {"no vectors": 1}
    assert (found.compared, found.on_cases) == (3, 2)
    first = found.tests["test_tiny.py::test_case[tiny-r1]"]
    assert (first.kernel, first.properties, first.reproduce) == ("tiny on 1", {"fp64_bound_used": 0.25}, [])
    second = found.tests["test_tiny.py::test_case[tiny-r2]"]
    assert len(second.reproduce) == 1
    assert "--ranks 2 --seed 3" in second.reproduce[0]
    assert sorted(found.reproduce) == sorted(line for test in found.tests.values() for line in test.reproduce)


def test_an_interrupted_run_is_recorded_as_far_as_it_came(tmp_path: Path) -> None:
    source = (
        "def test_first():\n    pass\n\ndef test_second():\n    raise KeyboardInterrupt\n\ndef test_third(): pass\n"
    )
    run = pytest_run(tmp_path, source)
    assert run.returncode == 2, run.stdout
    found = recorded(tmp_path)
    assert found.exit_status == 2
    assert found.tests["test_tiny.py::test_first"].outcome == "passed"
    assert "test_tiny.py::test_third" not in found.tests


def test_a_file_that_cannot_be_collected_is_recorded(tmp_path: Path) -> None:
    assert pytest_run(tmp_path, "import a_module_that_is_not_there\n").returncode == 2
    found = recorded(tmp_path)
    assert (found.exit_status, len(found.reproduce), found.unproven) == (2, 1, "No test passed or failed")


def test_a_listing_writes_nothing(tmp_path: Path) -> None:
    assert pytest_run(tmp_path, TIERS, "--collect-only").returncode == 0
    assert not (tmp_path / "reports").exists()


def test_a_folder_that_cannot_be_written_to_changes_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("a file is in the way")
    run = pytest_run(tmp_path, "def test_it(): pass\n")
    assert run.returncode == 0, run.stdout
    assert "record of this run: not written" in run.stdout


def test_the_header_is_in_the_record(tmp_path: Path) -> None:
    assert pytest_run(tmp_path, TIERS, header=True).returncode == 0
    described = recorded(tmp_path).described
    assert described.keys() == {"device", "arithmetic", "silicon", "cubins"}
    assert described["device"].startswith("device cpu (needs a GPU")


# --- where ------------------------------------------------------------------------------------------------------------


def test_reports_lie_in_the_checkout_or_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "tests")
    assert report.folder() == ROOT / "reports"
    monkeypatch.chdir(tmp_path)
    assert report.folder() == tmp_path / "reports"


@pytest.mark.parametrize("why", ["installed", "not writable"])
def test_reports_of_an_installed_package_lie_in_the_current_folder(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "tests")
    if why == "installed":
        monkeypatch.setattr(report, "HOME", ROOT / "megaproof")
    else:
        monkeypatch.setattr(report.os, "access", lambda path, mode: False)
    assert report.folder() == ROOT / "tests" / "reports"


# --- views ------------------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    pytest_run(tmp_path, MIXED)
    found = recorded(tmp_path)
    path = found.write(tmp_path / "again")
    assert record.read(path) == found
    assert json.loads(path.read_text())["verdicts"]["tiny-r2"] == {"test_case": "failed"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "can't be read: No such file"),
        ("{", "is no record of a run: JSONDecodeError"),
        ("[]", "is no record of a run"),
        ('{"record": 99}', "another version"),
        ('{"record": 1, "verdicts": {}, "tests": [], "more": 1}', "is no record of a run"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecordError, match=says) as caught:
        record.read(path)
    assert str(path) in str(caught.value)


def test_the_command_shows_a_run_again(tmp_path: Path) -> None:
    pytest_run(tmp_path, FAILS, "--seed", "3")
    run = str(tmp_path / "reports" / "run.json")
    page = tmp_path / "run.html"
    status, output = invoke(cli.app, "report", run, "--html", str(page))
    assert status == 0, output
    for line in ("ranks all, seed 3", "ended with status 1", "1 failed, 1 error", "--ranks 8 --seed 3"):
        assert line in output
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "it&#x27;s-r8" in text
    assert "<script" not in text
    assert "http" not in text, "one file, complete in itself"
    status, output = invoke(cli.app, "report", str(tmp_path / "nothing.json"))
    assert (status, "can't be read" in output) == (2, True)


def test_a_record_is_of_the_run_that_was_asked_for(tmp_path: Path) -> None:
    """Missing, of an earlier run, red, of nothing, or short of a test: each is red for make."""
    path = tmp_path / "reports" / record.NAME
    assert invoke(cli.app, "ended", "n1", str(path))[0] == 1
    run = pytest_run(tmp_path, TIERS, "--nonce", "n1")
    assert run.returncode == 0, run.stdout
    assert invoke(cli.app, "ended", "n1", str(path)) == (0, "")
    status, output = invoke(cli.app, "ended", "n2", str(path))
    assert status == 1
    assert "of another run" in output
    green = record.read(path)
    changes = {
        "exit_status": 1,
        "lost": ["a worker"],
        "disagree": ["a test"],
        "unproven": "nothing",
        "compared": 0,
        "selected": {"tests": 9},
        "tests": {},
    }
    for name, value in changes.items():
        assert record.missing(dataclasses.replace(green, **{name: value}), "n1"), name
