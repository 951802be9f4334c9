"""Files are replaced whole or not at all, folders have one writer, and killed runs leave nothing for long."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from megaproof.toolchain import errors, files
from megaproof.toolchain.errors import EnvironmentMissing


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_file_is_replaced(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    files.replace(path, b"new", mode)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert [*tmp_path.iterdir()] == [path]


def test_what_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space is left")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        files.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


def died(work: Callable[[], object]) -> None:
    """Runs work in a forked child that is then gone, as if it was killed: nothing of it is cleaned."""
    if not (child := os.fork()):
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def test_what_a_killed_run_left_goes_and_what_lives_stays(tmp_path: Path) -> None:
    died(lambda: files._temporary(tmp_path))
    handle, living = files._temporary(tmp_path)
    notes = tmp_path / f"{files.PREFIX}notes-of-mine.txt"
    notes.write_text("not a name that we give")
    assert len(list(tmp_path.iterdir())) == 3
    files.replace(tmp_path / "file", b"new")
    assert set(tmp_path.iterdir()) == {living, notes, tmp_path / "file"}
    os.close(handle)
    files.sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {notes, tmp_path / "file"}


def test_a_scratch_folder_goes_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    make = files.scratch.__wrapped__
    died(lambda: (make() / "file").write_bytes(b"half"))
    (dead,) = tmp_path.iterdir()
    mine = make()
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == [mine] != [dead]
    files._remove_own(mine, os.getpid() + 1)
    assert mine.exists(), "a forked child leaves its parent's folder"
    files._remove_own(mine, os.getpid())
    assert not mine.exists()


def test_no_temporary_folder_is_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", "/proc")
    with pytest.raises(EnvironmentMissing, match="TMPDIR must name a folder that can be written"):
        files.scratch.__wrapped__()


def test_a_folder_has_one_writer_who_is_named(tmp_path: Path) -> None:
    ready, go = os.pipe(), os.pipe()
    if not (child := os.fork()):
        with files.locked(tmp_path):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)  # killed while it holds the lock
    os.read(ready[0], 1)
    with pytest.raises(files.Held, match=rf"is being written by process {child} on "), files.locked(tmp_path, 0):
        pass
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    assert (tmp_path / files.LOCK).exists()
    with files.locked(tmp_path, 0):
        pass
    assert not list(tmp_path.iterdir())
    for handle in (*ready, *go):
        os.close(handle)


def test_what_others_wrote_is_shown_on_one_line() -> None:
    assert errors.escaped("a\x1b[31m\nb\u202e\udc80") == r"a\x1b[31m\nb\u202e\udc80"
    assert errors.escaped("x" * 300) == "x" * 200 + "..."
