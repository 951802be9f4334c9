"""Caches of what was compiled. A cache saves time and decides nothing: whatever is odd about it is compiled again.

A folder is used only if nobody but its owner could have put anything there, and an entry only if its bytes have the
sha256 that was stored beside it. `python -m megaproof...` works the same without a cache: where `of` gives none, a
caller compiles once a process and keeps the result in memory, or in `files.scratch()` where it needs a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from megaproof.toolchain import files
from megaproof.toolchain.errors import escaped

LARGEST = 1 << 28
"""Bytes of the largest entry; anything larger was not written by us."""
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Cache:
    """The cache of one purpose."""

    folder: Path | None
    """A folder that only its owner can write; None: there is no cache."""
    reason: str = ""
    """Why there is none, in one phrase that fits into a sentence; '' where there is one."""

    def read(self, name: str) -> bytes | None:
        """An entry, or None if there is none that is whole. name: a file's name without a folder."""
        if self.folder is None:
            return None
        data, digest = _read(self.folder / name, LARGEST), _read(self.folder / f"{name}.sha256", 64)
        if data is None or digest is None or hashlib.sha256(data).hexdigest().encode() != digest:
            return None
        return data

    def path(self, name: str) -> Path | None:
        """The path of an entry that is whole, for what needs a path, such as dlopen; None if there is none."""
        return None if self.folder is None or self.read(name) is None else self.folder / name

    def write(self, name: str, data: bytes) -> Path | None:
        """Stores an entry and returns its path; None where it can't be stored, and then the caller does without.

        Each file is written beside and renamed, the digest last: a reader sees a whole entry or none.
        """
        if self.folder is None:
            return None
        path = self.folder / name
        try:
            files.replace(path, data, 0o600)
            files.replace(self.folder / f"{name}.sha256", hashlib.sha256(data).hexdigest().encode(), 0o600)
        except OSError:  # a full disk, a folder that can't be written, something odd in the entry's place
            return None
        return path


def of(purpose: str) -> Cache:
    """The cache of a purpose, such as 'cubin': megaproof/<purpose> in XDG_CACHE_HOME, or in ~/.cache.

    The folder is made if need be, readable by its owner alone. There is no cache where no home is known, the folder
    can't be made, it or megaproof/ is a link, or anybody else owns or can write it or a folder above it. A folder above
    may belong to root, and if it is sticky, as /tmp is, it may be written by all.
    """
    base = _base()
    if base is None:
        return Cache(None, "neither XDG_CACHE_HOME nor HOME is the absolute path of a folder")
    try:
        base = Path(os.path.realpath(base))
        folder = base / "megaproof" / purpose
        for path in (*reversed(folder.parents), folder):
            own = path in (folder, folder.parent)
            if reason := _distrust(path, own):
                return Cache(None, reason)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Cache(None, f"{escaped(base)} can't be used ({escaped(reason)})")
    return Cache(folder)


def _base() -> Path | None:
    """The folder of all caches of this user; relative paths are ignored, as the XDG specification wants it."""
    if os.path.isabs(xdg := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(xdg)
    home = os.environ.get("HOME", "")
    if not home:
        with contextlib.suppress(KeyError):  # a user without an entry, as in many containers
            home = pwd.getpwuid(os.geteuid()).pw_dir
    return Path(home) / ".cache" if os.path.isabs(home) and os.path.isdir(home) else None


def _distrust(path: Path, own: bool) -> str:
    """Why a folder can't be trusted, or ''. It is made if it is not there. own: it is ours and must not be a link."""
    with contextlib.suppress(FileExistsError):
        if not os.path.lexists(path):
            os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        return f"{escaped(path)} is no folder"
    if found.st_uid != os.geteuid() and (own or found.st_uid != 0):
        return f"{escaped(path)} belongs to another user"
    if found.st_mode & _OTHERS_WRITE and (own or not found.st_mode & stat.S_ISVTX):
        return f"{escaped(path)} can be written by others"
    return ""


def _read(path: Path, most: int) -> bytes | None:
    """A file of ours of at most so many bytes, or None for whatever else is there; a pipe does not block."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            ours = found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE
            if not (stat.S_ISREG(found.st_mode) and ours and found.st_size <= most):
                return None
            return file.read(most)
    except OSError:
        return None
