"""Caches: which folders are trusted, which entries are read, and that nothing odd there ever raises."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from megaproof.toolchain import cache, files

NAME, DATA = "entry.so", b"\x7fELF " * 100


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "made"))
    return tmp_path / "made"


@pytest.fixture
def entry(home: Path) -> Path:
    path = cache.of("test").write(NAME, DATA)
    assert path
    return path


def test_an_entry_survives_and_only_its_owner_can_read_it(entry: Path) -> None:
    place = cache.of("test")
    assert place.read(NAME) == DATA
    assert place.path(NAME) == entry
    assert {path.name for path in entry.parent.iterdir()} == {NAME, f"{NAME}.sha256"}
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (entry, *entry.parents[:3])]
    assert modes == [0o600, 0o700, 0o700, 0o700]
    assert place.read("another") is None


def _other_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("suffix", ["", ".sha256"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, 20),
        lambda path: os.truncate(path, cache.LARGEST + 1),
        lambda path: path.chmod(0o666),
        lambda path: path.unlink(),
        _other_bytes,
        _pipe,
        _link,
        _folder,
    ],
    ids=["empty", "short", "huge", "open", "gone", "bytes", "pipe", "link", "folder"],
)
def test_an_odd_entry_is_none(entry: Path, damage: Callable[[Path], object], suffix: str) -> None:
    damage(entry.with_name(NAME + suffix))
    assert cache.of("test").read(NAME) is None
    assert cache.of("test").path(NAME) is None
    if not entry.with_name(NAME + suffix).is_dir():
        cache.of("test").write(NAME, DATA)
        assert cache.of("test").read(NAME) == DATA, "the next write mends it"


@pytest.mark.parametrize("level", [0, 1, 2], ids=["purpose", "megaproof", "base"])
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_can_write_is_none(entry: Path, level: int, mode: int) -> None:
    entry.parents[level].chmod(mode)
    place = cache.of("test")
    assert place.folder is None
    assert "can be written by others" in place.reason
    assert place.read(NAME) is place.path(NAME) is place.write(NAME, DATA) is None


@pytest.mark.parametrize("level", [0, 1, 2, 3], ids=["purpose", "megaproof", "base", "above"])
def test_a_folder_of_another_user_is_none(entry: Path, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, theirs = os.lstat, entry.parents[level]

    def lstat(path: Path) -> os.stat_result:
        found = list(real(path))
        return os.stat_result([*found[:4], 12345, *found[5:]]) if path == theirs else real(path)

    monkeypatch.setattr(cache.os, "lstat", lstat)
    assert "belongs to another user" in cache.of("test").reason


@pytest.mark.parametrize("level", [0, 1], ids=["purpose", "megaproof"])
def test_our_own_folders_are_no_links(entry: Path, level: int) -> None:
    folder = entry.parents[level]
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    assert "is no folder" in cache.of("test").reason


def test_a_sticky_folder_above_may_be_written_by_all(home: Path) -> None:
    home.mkdir()
    home.chmod(0o1777)
    assert cache.of("test").folder


def test_no_mask_opens_a_folder(home: Path) -> None:
    before = os.umask(0)
    try:
        assert cache.of("test").write(NAME, DATA)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.rglob("*")} == {0o700, 0o600}


@pytest.mark.parametrize("home", ["", "relative", "/nonexistent", "/proc/version"])
def test_without_a_home_there_is_none(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(cache.pwd, "getpwuid", unknown)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", home)
    place = cache.of("test")
    assert place.folder is None
    assert place.reason


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null/below", "/" + "x" * 300])
def test_a_place_that_cannot_be_made_is_none(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    assert cache.of("test").folder is None


def test_a_full_disk_leaves_no_half_entry(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    place = cache.of("test")
    assert place.write(NAME, DATA) is None
    assert place.folder
    assert not list(place.folder.iterdir())
