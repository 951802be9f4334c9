"""pytest that is ended by SIGTERM tidies up as after an interrupt (proof/options.py)."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megaproof.tests.support import runs, warm
from megaproof.tests.support.patience import PATIENCE_S, wait_for
from megaproof.toolchain.signals import EXIT_TERMINATED

SOURCE = """
import pathlib, tempfile, time
import pytest

@pytest.fixture
def torn_down():
    yield
    pathlib.Path("torn_down").touch()

def test_it(torn_down):
    with tempfile.TemporaryDirectory(dir=".") as folder:
        pathlib.Path("at_work").write_text(folder)
        time.sleep(3600)

def test_after(): pass
"""


@pytest.mark.clock
def test_sigterm_ends_a_session_tidily(tmp_path: Path) -> None:
    (tmp_path / "test_tiny.py").write_text(SOURCE)
    options = ["-p", "megaproof.proof.plugin", "-p", "no:cacheprovider", "-c", str(runs.ROOT / "pyproject.toml")]
    arguments = [*options, "--no-header", "--rootdir", str(tmp_path), "test_tiny.py"]
    with (tmp_path / "printed").open("w") as output:
        run = warm.template().fork(
            "megaproof.tests.support.warm:be_pytest", arguments, output, folder=tmp_path, environ=runs.environment()
        )
    wait_for((tmp_path / "at_work").exists)
    run.send_signal(signal.SIGTERM)
    status, printed = run.wait(PATIENCE_S), (tmp_path / "printed").read_text()
    assert status == EXIT_TERMINATED, printed
    assert "Exit: SIGTERM" in printed
    assert (tmp_path / "torn_down").exists()
    assert not Path(tmp_path, (tmp_path / "at_work").read_text()).exists()
    assert "passed" not in printed
