"""When a run is green: exit statuses and skips (proof/plugin.py, proof/verdicts.py)."""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from megaproof.tests.support import runs, warm
from megaproof.tests.support.runs import CASES, ROOT, SKIPS, TIERS, pytest_run, python

ENVIRONMENT = runs.environment

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


def test_listing_tests_is_no_failure_and_no_verdict(tmp_path: Path) -> None:
    for quiet in ([], ["-q"]):
        run = pytest_run(tmp_path, CASES, "--collect-only", *quiet)
        assert run.returncode == 0
        assert "none was run: this is no verdict" in run.stdout


@pytest.mark.parametrize("option", ["--co", "--help", "--markers"])
def test_an_option_in_the_environment_is_no_way_to_green(
    tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be forgotten there, so that a run of nothing would be taken for a proof."""
    monkeypatch.setattr(runs, "environment", lambda: ENVIRONMENT() | {"PYTEST_ADDOPTS": option})
    assert pytest_run(tmp_path, CASES).returncode == 5


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--fixtures"], 5),
        (["--setup-plan"], 5),
        (["--setup-only"], 5),
        (["-o", "addopts=--co"], 5),
        (["--deselect", "test_tiny.py"], 5),
        (["-p", "no:megaproof-verdicts"], 4),
        (["--help"], 0),
        (["--markers"], 0),
    ],
)
def test_a_run_of_nothing_is_not_green(tmp_path: Path, arguments: list[str], status: int) -> None:
    run = pytest_run(tmp_path, CASES, *arguments)
    assert run.returncode == status, run.stdout


@pytest.mark.parametrize("arguments", [["-p", "no:megaproof.proof.plugin"], ["--noconftest"]])
def test_a_checkout_is_not_run_without_its_plugin(arguments: list[str]) -> None:
    run = warm.pytest_main(ROOT, [*arguments, "--co", "-q", "tests/proof/test_tally.py"], ENVIRONMENT())
    assert run.returncode == 4, run.stdout
    assert "megaproof_plugin" in run.stderr


RERUNS = """
    import pytest
    from _pytest.runner import runtestprotocol

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(item, nextitem):
        for attempt in range(3):
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
            again = any(report.failed for report in reports)
            for report in reports:
                if again and attempt < 2:
                    SHOWN
                item.ihook.pytest_runtest_logreport(report=report)
            if not again:
                break
        return True
"""
"""As plugins do that run a test again until it passes. SHOWN: what becomes of the attempts before."""
THIRD_TIME = """
    calls = []

    def test_right_the_third_time():
        calls.append(1)
        assert len(calls) > 2
"""


@pytest.mark.parametrize("shown", ["report.outcome = 'rerun' if report.failed else report.outcome", "continue"])
def test_running_again_until_it_passes_is_red(tmp_path: Path, shown: str) -> None:
    (tmp_path / "again.py").write_text(textwrap.dedent(RERUNS.replace("SHOWN", shown)))
    run = pytest_run(tmp_path, THIRD_TIME, "-p", "again")
    assert run.returncode == 1, run.stdout
    assert "its calls do not agree" in run.stdout


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
    """The skip is no failure; but where all proofs are skipped so, nothing is proven of the kernel."""
    source = """
        import pytest

        @pytest.mark.gpu
        @pytest.mark.skipif(True, reason="not claimed by tiny: recipe field silu")
        def test_kernel():
            pass

        def test_other():
            pass

        def test_proof(record_property):
            record_property("kernel", "tiny")
    """
    run = pytest_run(tmp_path, source, "--require-gpu")
    assert run.returncode == 0, run.stdout
    assert _count(run.stdout, "not claimed by tiny: recipe field silu") == 1
    run = pytest_run(tmp_path, source, "--require-gpu", "-k", "not proof")
    assert run.returncode == 5, run.stdout
    assert "No proof of the kernel ran: all 1 are of recipes that it does not claim" in run.stdout
    assert pytest_run(tmp_path, source, "-k", "not proof").returncode == 0, "a reviewer without a GPU proves no kernel"


def test_a_kernel_of_which_nothing_was_proven_is_not_green(tmp_path: Path) -> None:
    kernel = "megaproof.proof.adapters.reference:ReferenceAdapter"
    run = pytest_run(tmp_path, CASES, "--kernel", kernel, header=True)
    assert run.returncode == 5, run.stdout
    assert f"No proof of --kernel {kernel} ran, so nothing is proven" in run.stdout
    assert f"kernel {kernel}" in run.stdout
    proven = "def test_kernel(record_property): record_property('kernel', 'tiny')\n"
    assert pytest_run(tmp_path, proven, "--kernel", kernel).returncode == 0


def test_without_torch_one_sentence_and_status_3(tmp_path: Path) -> None:
    (tmp_path / "test_tiny.py").write_text("def test_it(): pass\n")
    hide = "import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main(['-p', 'conftest', '.']))"
    run = python(tmp_path, "-c", hide)
    assert run.returncode == 3, run.stdout
    assert "has no torch" in run.stderr
    assert "make setup" in run.stderr


def test_an_unknown_marker_is_an_error(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, "import pytest\n\n@pytest.mark.gpus\ndef test_it(): pass\n")
    assert run.returncode == 2, run.stdout
    assert "'gpus' not found in `markers`" in run.stdout


def test_a_fixed_expected_failure_is_a_failure(tmp_path: Path) -> None:
    run = pytest_run(tmp_path, "import pytest\n\n@pytest.mark.xfail\ndef test_it(): pass\n")
    assert run.returncode == 1, run.stdout


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_ranks_that_no_case_has_are_not_green(tmp_path: Path, workers: list[str]) -> None:
    """What passes beside the cases proves nothing of them."""
    if workers and not find_spec("xdist"):
        pytest.skip("pytest-xdist is not installed")
    run = pytest_run(tmp_path, CASES, "--ranks", "4,16", *workers)
    assert run.returncode == 5, run.stdout
    assert "No case of --ranks 4,16 ran, so nothing is proven" in run.stdout
    without = "def test_without_a_case(): pass"
    assert pytest_run(tmp_path, without, "--ranks", "4", *workers).returncode == 0, "there was none to leave out"
