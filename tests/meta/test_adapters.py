"""`--kernel module:factory`: what is no adapter is refused in one sentence that says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaproof.proof import adapters, options
from megaproof.proof.adapters.megaproof import MegaproofAdapter
from megaproof.proof.adapters.reference import ReferenceAdapter
from megaproof.tests.support import warm
from megaproof.tests.support.runs import ROOT, environment

BAD = {
    "": "not of the form module:factory",
    "a.module": "not of the form module:factory",
    ":make": "not of the form module:factory",
    "a.module:": "not of the form module:factory",
    "no_such_module:make": "module no_such_module can't be imported: No module named 'no_such_module'",
    "megaproof.proof.adapters.reference:no_such": "module megaproof.proof.adapters.reference has no no_such",
    "megaproof.proof.adapters:WORLDS": "WORLDS is a tuple, not a function",
    "megaproof.tests.support.half_adapters:half": "returned a Half without prepare, launch, stages, y, stats, close",
    "megaproof.tests.support.half_adapters:nameless": "returned a Nameless without name (a str)",
}


@pytest.mark.parametrize("spec", BAD)
def test_what_is_no_adapter_is_named(spec: str) -> None:
    with pytest.raises(adapters.AdapterError) as caught:
        adapters.make(spec)
    assert BAD[spec] in str(caught.value)
    assert repr(spec) in str(caught.value)


def test_a_module_that_fails_shows_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an import error is about --kernel; anything else is the module's own and keeps its traceback."""
    (tmp_path / "failing_adapter.py").write_text("raise RuntimeError('no driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="no driver"):
        adapters.make("failing_adapter:make")


def test_the_default_is_an_adapter() -> None:
    adapter = adapters.make(adapters.DEFAULT)
    assert isinstance(adapter, MegaproofAdapter if torch.cuda.is_available() else ReferenceAdapter)
    assert set(adapter.worlds) <= set(adapters.WORLDS)
    adapter.close()


def test_the_options_know_the_same_default_and_worlds() -> None:
    """They can't import them: torch is slow to start."""
    assert options.DEFAULT_KERNEL == adapters.DEFAULT
    assert options.WORLDS == adapters.WORLDS


REFUSED = ["--no-header", "-p", "no:cacheprovider", "tests/proof/test_tally.py"]


def test_pytest_refuses_it_at_the_start() -> None:
    run = warm.pytest_main(ROOT, [*REFUSED, "--kernel", "no_such_module:make"], environment())
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "module no_such_module can't be imported" in run.stderr
    assert "Traceback" not in run.stderr


def test_one_that_fails_at_the_start_is_a_wrong_option(tmp_path: Path) -> None:
    """With its own traceback, and not as an error inside pytest."""
    (tmp_path / "failing_adapter.py").write_text("raise RuntimeError('no driver')\n")
    variables = environment() | {"PYTHONPATH": str(tmp_path)}
    run = warm.pytest_main(ROOT, [*REFUSED, "--kernel", "failing_adapter:make"], variables)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--kernel failing_adapter:make raises RuntimeError: no driver" in run.stderr
    assert "failing_adapter.py" in run.stderr
    assert "INTERNALERROR" not in run.stderr + run.stdout
