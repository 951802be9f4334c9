"""Folders of goldens while they are written: kills at every step, two writers, readers, and other people's files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megaproof.golden import __main__ as cli
from megaproof.golden import folders, silicon, store
from megaproof.golden.errors import GoldenError
from megaproof.tests.support.made_goldens import CASES, made
from megaproof.toolchain import files


def whole(folder: Path) -> str:
    """The reason of a set, all of whose entries can be read and belong together."""
    (reason,) = {store.read(case, folder).entry["reason"] for case in CASES}
    return reason


def unnamed(folder: Path) -> set[str]:
    """What lies in a folder beside the set itself."""
    named = {entry["file"] for entry in store.read_manifest(folder).values()} | {"manifest.json", "data"}
    return {path.name for path in folder.rglob("*")} - named


def killed_at(step: int, folder: Path, work: Callable[[], object]) -> bool:
    """Runs work in a forked child that is gone, uncleaned, at its step-th operation on files of the folder.

    Returns whether the child came that far.
    """
    if not (child := os.fork()):
        left = [step]

        def gone(event: str, arguments: tuple) -> None:
            if event.startswith(("open", "os.")) and any(str(folder) in str(argument) for argument in arguments):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(gone)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_at_any_step_a_writer_leaves_a_whole_set_and_the_next_one_cleans(tmp_path: Path) -> None:
    old, new, third = made("old"), made("new", 16), made("third", 32)
    store.write(old, folder=tmp_path)
    reasons, step = [], 0
    while killed_at(step, tmp_path, lambda: store.write(new, folder=tmp_path)):
        reasons.append(whole(tmp_path))
        store.write(third, folder=tmp_path)
        assert whole(tmp_path) == "third"
        assert not unnamed(tmp_path), f"after a kill at step {step}"
        step += 1
    assert step > 20
    assert {"new", "third", "old"} >= set(reasons) >= {"new", "third"}
    assert reasons == sorted(reasons, key=["old", "third", "new"].index), "first the old set, then the new one"


def test_an_error_while_writing_is_one_line_and_leaves_the_old_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(made("old"), folder=tmp_path)
    real = os.replace

    def full(source: str, target: Path) -> None:
        if target.name == "manifest.json":
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(GoldenError, match=r"can't be written \(No space left on device\)"):
        store.write(made("new", 16), folder=tmp_path)
    assert whole(tmp_path) == "old"
    monkeypatch.undo()
    store.write(made("new", 16), folder=tmp_path)
    assert not unnamed(tmp_path)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    """Each writes one case and keeps the other's, at the same time, ten times over."""
    store.write(made("old"), folder=tmp_path)
    ids, new = [case.id for case in CASES], made("new", 16)
    children = []
    for own, other in (ids, ids[::-1]):
        if not (child := os.fork()):
            try:
                for _ in range(10):
                    store.write({own: new[own]}, [other], tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert whole(tmp_path) == "new"
    assert not unnamed(tmp_path)


def test_who_writes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(made("old"), folder=tmp_path)
    real = files.locked
    monkeypatch.setattr(files, "locked", lambda folder: real(folder, 0))
    expected = rf"is being written by process {os.getpid()} on .*; nothing was written"
    with real(tmp_path), pytest.raises(GoldenError, match=expected):
        store.write(made("new", 16), folder=tmp_path)
    assert whole(tmp_path) == "old"


def test_a_reader_that_a_writer_overtakes_reads_the_new_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(made("old"), folder=tmp_path)
    real, calls = store.read_manifest, []

    def overtaken(folder: Path) -> dict:
        entries = real(folder)
        if not calls:
            calls.append(True)
            store.write(made("new", 16), folder=tmp_path)
        return entries

    monkeypatch.setattr(store, "read_manifest", overtaken)
    assert store.read(CASES[0], tmp_path).entry["reason"] == "new"


def _link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "manifest.json")


FOREIGN = [
    ("data/model-00001-of-00002.safetensors", lambda path: path.write_text("mine")),
    ("data/0123456789abcdef.safetensors", lambda path: path.write_text("mine")),
    ("data/0123456789ABCDEF.SafeTensors", lambda path: path.write_text("mine")),
    ("data/notes.txt", lambda path: path.write_text("mine")),
    ("data/0123456789abcdef.safetensors", _link),
    ("data/folder.safetensors", lambda path: path.mkdir()),
    ("data/pipe", os.mkfifo),
    ("model.safetensors", lambda path: path.write_text("mine")),
    ("Manifest.JSON", lambda path: path.write_text("mine")),
]


@pytest.mark.parametrize("name, make", FOREIGN, ids=[str(i) for i in range(len(FOREIGN))])
def test_a_folder_with_a_foreign_file_is_refused_and_the_file_named(
    tmp_path: Path,
    name: str,
    make: Callable[[Path], object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.write(made("old"), folder=tmp_path)
    make(tmp_path / name)
    with pytest.raises(GoldenError, match=rf"{Path(name).name} is no file of these goldens; nothing was written"):
        store.write(made("new", 16), folder=tmp_path)
    assert whole(tmp_path) == "old"
    assert os.path.lexists(tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["golden", "regenerate", "--only", CASES[0].id, "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_folder_that_is_no_golden_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "evil\x1b[31m").write_text("mine")
    with pytest.raises(GoldenError, match=r"evil\\x1b\[31m is no file of these goldens"):
        store.write(made("new"), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["evil\x1b[31m"]


def test_data_behind_a_link_is_not_ours(tmp_path: Path) -> None:
    store.write(made("old"), folder=tmp_path / "set")
    (tmp_path / "set" / "data").rename(tmp_path / "elsewhere")
    (tmp_path / "set" / "data").symlink_to(tmp_path / "elsewhere")
    before = set((tmp_path / "elsewhere").iterdir())
    with pytest.raises(GoldenError, match="data is no file of these goldens"):
        store.write(made("new", 16), folder=tmp_path / "set")
    assert set((tmp_path / "elsewhere").iterdir()) == before


def test_a_capture_refuses_foreign_files_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    section = silicon.entry(silicon.chips()[0])
    with pytest.raises(GoldenError, match=r"model\.safetensors is no file of these goldens"):
        silicon.publish(tmp_path, "H199", section, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_journal_names_no_other_folder(tmp_path: Path) -> None:
    store.write(made("old"), folder=tmp_path / "set")
    (tmp_path / "mine.safetensors").write_text("mine")
    (tmp_path / "set" / folders.JOURNAL).write_text('["../../mine.safetensors", 5, "data"]')
    store.write(made("new", 16), folder=tmp_path / "set")
    assert (tmp_path / "mine.safetensors").exists()
    assert not unnamed(tmp_path / "set")
