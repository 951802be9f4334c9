"""SIGTERM leaves nothing behind, from every command of ours."""

from __future__ import annotations

import ast
import signal
from pathlib import Path

import pytest

from megaproof.tests.support.house import PRODUCT, ROOT
from megaproof.tests.support.patience import PATIENCE_S, wait_for
from megaproof.toolchain import child, files, signals

WORKS = """
import signal, tempfile, time
from megaproof.toolchain import files, signals
signals.exit_on_sigterm()
with tempfile.TemporaryDirectory(dir=files.scratch()) as folder:
    print(folder, flush=True)
    time.sleep(3600)
"""


@pytest.mark.clock
@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, 0), (signal.SIGKILL, 1)])
def test_what_is_left_of_a_run_that_is_ended(tmp_path: Path, number: int, left: int) -> None:
    """Of one that is killed its folder stays until the next run, which removes it."""
    template = child.Template("os:getpid")
    environ = child.environment(TMPDIR=str(tmp_path))
    printed = tmp_path / "printed"
    for status in (-number if left else signals.EXIT_TERMINATED, signals.EXIT_TERMINATED):
        with printed.open("w") as output:
            one = template.fork("builtins:exec", WORKS, output, environ=environ)
        wait_for(lambda: printed.read_text().endswith("\n"))
        folders = [path for path in tmp_path.iterdir() if path.name.startswith(files.PREFIX)]
        assert len(folders) == 1, "the one of this run alone"
        one.send_signal(-status if status < 0 else signal.SIGTERM)
        assert one.wait(PATIENCE_S) == status
        assert len([path for path in tmp_path.iterdir() if path.name.startswith(files.PREFIX)]) == (status < 0)
    template.close()


@pytest.mark.parametrize("row", [row for row in PRODUCT if (ROOT / row / "__main__.py").exists()])
def test_every_command_does_so(row: str) -> None:
    *_, last = ast.parse((ROOT / row / "__main__.py").read_text(encoding="utf-8")).body
    assert ast.unparse(last).startswith("if __name__ == '__main__':")
    assert "signals.exit_on_sigterm()" in ast.unparse(last)


def test_what_somebody_else_has_said_stays() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        signals.exit_on_sigterm()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
