"""A template forks children that are as good as new processes, and nothing is left when whoever asked for them ends.

The children execute text (builtins:exec), and the template has imported nothing beforehand, so each test is cheap.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaproof.tests.support.patience import PATIENCE_S, wait_for
from megaproof.toolchain import child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


@pytest.fixture(scope="module")
def template() -> Iterator[child.Template]:
    made = child.Template("os:getpid")
    yield made
    made.close()


def execute(template: child.Template, text: str, scratch: Path, **options: object) -> tuple[int, str]:
    """(status, output) of a child that executes the text."""
    with (scratch / "printed").open("w+") as output:
        status = template.fork("builtins:exec", text, output, **options).wait(PATIENCE_S)
        output.seek(0)
        return status, output.read()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_child_is_as_good_as_a_new_process(template: child.Template, tmp_path: Path) -> None:
    """Its folder, environment, imports, streams and session are its own, and it holds nothing of the template."""
    (tmp_path / "beside.py").write_text("VALUE = 3\n")
    text = """
import beside, json, os, sys
own = [os.getcwd(), os.environ["A"], "HOME" in os.environ, beside.VALUE, os.getsid(0) == os.getpid(), sys.path[0]]
held = [number for number in range(3, 99) if os.path.exists(f"/proc/self/fd/{number}")]
print(json.dumps([*own, held]))
"""
    environ = {"A": "\udcff é", "PYTHONPATH": f"{tmp_path}:{child.ROOT}"}
    status, output = execute(template, text, tmp_path, folder=tmp_path, environ=environ)
    assert status == 0, output
    assert json.loads(output) == [str(tmp_path), "\udcff é", False, 3, True, str(tmp_path), []]


@pytest.mark.parametrize(
    ("text", "status", "printed"),
    [
        ("print('as ever')", 0, "as ever\n"),
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('in words')", 1, "in words\n"),
        ("import os; os.write(1, b'at once'); os._exit(5)", 5, "at once"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_how_a_child_ends(template: child.Template, tmp_path: Path, text: str, status: int, printed: str) -> None:
    assert execute(template, text, tmp_path) == (status, printed)


def test_each_stream_may_have_a_file(template: child.Template, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as output, (tmp_path / "err").open("w") as errors:
        text = "import os, sys; print('said'); print('warned', file=sys.stderr); os.system('echo by a child >&2')"
        assert template.fork("builtins:exec", text, output, errors).wait(PATIENCE_S) == 0
    assert (tmp_path / "out").read_text() == "said\n"
    assert (tmp_path / "err").read_text() == "warned\nby a child\n"


def test_an_exception_is_status_1_and_a_traceback(template: child.Template, tmp_path: Path) -> None:
    status, output = execute(template, "1 / 0", tmp_path)
    assert status == 1
    assert "ZeroDivisionError: division by zero" in output


@pytest.mark.clock
def test_children_run_side_by_side_and_leave_nothing_open(tmp_path: Path) -> None:
    template = child.Template("os:getpid")  # one that has forked nothing yet
    files = Path(f"/proc/{template.pid}/fd")
    before = len(list(files.iterdir()))
    with (tmp_path / "printed").open("w") as output:
        children = [template.fork("time:sleep", number % 2 * 3600, output) for number in range(12)]
    assert [one.wait(PATIENCE_S) for one in children[::2]] == [0] * 6
    assert [one.poll() for one in children[1::2]] == [None] * 6
    for one in children:
        one.close()
    assert [one.poll() for one in children[1::2]] == [-signal.SIGKILL] * 6
    wait_for(lambda: len(list(files.iterdir())) == before)
    template.close()


@pytest.mark.clock
def test_what_a_child_has_started_ends_with_it(template: child.Template, tmp_path: Path) -> None:
    """Closed, or of itself: its process group goes with it."""
    text = "import os, subprocess, time; print(subprocess.Popen(['sleep', '3600']).pid, flush=True)"
    status, output = execute(template, text, tmp_path)
    assert status == 0
    wait_for(lambda: not runs(int(output)))

    with (tmp_path / "printed").open("w+") as printed:
        one = template.fork("builtins:exec", f"{text}; time.sleep(3600)", printed)
        wait_for(lambda: Path(printed.name).read_text().endswith("\n"))
        one.close()
    wait_for(lambda: not runs(int((tmp_path / "printed").read_text())))


@pytest.mark.clock
def test_a_child_that_is_forgotten_ends(template: child.Template, tmp_path: Path) -> None:
    with (tmp_path / "printed").open("w") as output:
        pid = template.fork("time:sleep", 3600, output).pid
    wait_for(lambda: not runs(pid))


CALLER = """
import os, sys, time
from megaproof.toolchain import child
template = child.Template("os:getpid")
with open(os.devnull, "w") as output:
    one = template.fork("time:sleep", 3600, output)
copy = os.fork() if sys.argv[1:] else 0
if copy or not sys.argv[1:]:
    print(template.pid, one.pid, copy, flush=True)
time.sleep(3600)
"""


@pytest.mark.clock
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, []), (signal.SIGTERM, []), (signal.SIGKILL, ["and a copy that lives on"])]
)
def test_nothing_is_left_when_the_caller_ends(number: int, words: list[str]) -> None:
    """The child goes at once; the template with the last process that could use it."""
    command = [sys.executable, "-P", "-c", CALLER, *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=child.environment(), text=True, **streams) as caller:
        template, one, copy = map(int, caller.stdout.readline().split())
        caller.send_signal(number)
    wait_for(lambda: not runs(one))
    if copy:
        assert runs(template)
        os.kill(copy, signal.SIGKILL)
    wait_for(lambda: not runs(template))


@pytest.mark.clock
def test_a_template_that_is_killed_takes_its_children_along(tmp_path: Path) -> None:
    template = child.Template("os:getpid")
    with (tmp_path / "printed").open("w") as output:
        one = template.fork("time:sleep", 3600, output)
        assert not one.lost
        os.kill(template.pid, signal.SIGKILL)
        wait_for(lambda: not runs(one.pid))
        wait_for(lambda: one.lost and template.lost)
        assert one.poll() is None
        with pytest.raises(child.TemplateLost):
            one.wait()
        with pytest.raises(child.TemplateLost):
            template.fork("time:sleep", 0, output)
    one.close()
    template.close()


def test_a_template_that_cannot_start_says_why() -> None:
    with pytest.raises(child.TemplateLost, match=r"could not start with no_such:function") as caught:
        child.Template("no_such:function")
    assert "No module named 'no_such'" in str(caught.value)


@pytest.mark.clock
def test_a_wait_ends_in_time(template: child.Template, tmp_path: Path) -> None:
    with (tmp_path / "printed").open("w") as output:
        one = template.fork("time:sleep", 3600, output)
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(0.01)
    one.close()
    one.close()
    assert one.wait() == -signal.SIGKILL


def test_a_child_hears_what_a_job_in_the_background_ignores(tmp_path: Path) -> None:
    """A shell starts such jobs with SIGINT ignored, and Python then raises no KeyboardInterrupt."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    made = child.Template("os:getpid")
    try:
        text = "import signal; print(signal.getsignal(signal.SIGINT).__name__, int(signal.getsignal(signal.SIGHUP)))"
        assert execute(made, text, tmp_path) == (0, "default_int_handler 0\n")
    finally:
        made.close()
        for number, handler in before.items():
            signal.signal(number, handler)
