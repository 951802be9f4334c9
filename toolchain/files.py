"""Files that are never half written, folders with one writer at a time, and what killed runs leave behind.

Everything unfinished has a name that begins with PREFIX and is locked by whoever makes it. The kernel of the system
drops a lock with its process, so what is not locked is dead, however young, and the next run removes it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megaproof.toolchain.errors import EnvironmentMissing, escaped

PREFIX = ".megaproof-unfinished-"
"""How the name of everything temporary begins; .gitignore and `make clean` know it."""
LOCK = ".megaproof-lock"
"""The file in a folder that its one writer holds, and in which it says who it is."""
_TEMPORARY = re.compile(re.escape(PREFIX) + "[a-z0-9_]{8}")
"""The names that tempfile gives; a user's own file that begins alike is not ours to remove."""


class Held(RuntimeError):
    """A folder that another process writes; the message says which."""


def replace(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes `data` beside `path` and renames it: a reader sees the old file or the new one, whole.

    mode: the permissions of the new file. Raises OSError, and then leaves no file beside it.
    """
    sweep(path.parent)
    handle, temporary = _temporary(path.parent)
    # The file stays open, and so locked, until it has its name: no sweep takes it for dead.
    with os.fdopen(handle, "wb") as file:
        try:
            file.write(data)
            file.flush()
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sweep(folder: Path) -> None:
    """Removes what killed runs left unfinished in a folder. What can't be removed stays; no error is raised."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                _remove_if_dead(Path(entry.path))


@functools.cache
def scratch() -> Path:
    """A folder for this process and those that it forks, the same at every call, readable by this user alone.

    It is removed when the process ends, and if that is killed by the next process that calls this. Raises
    EnvironmentMissing where there is no place for temporary files.
    """
    try:
        parent = Path(tempfile.gettempdir())
        sweep(parent)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _locks(handle) and _is(folder, handle):
                break
            os.close(handle)
    except OSError as error:
        raise EnvironmentMissing(
            f"no temporary folder can be made ({error.strerror}); TMPDIR must name a folder that can be written"
        ) from error
    atexit.register(_remove_own, folder, os.getpid())
    return folder


@contextlib.contextmanager
def locked(folder: Path, wait_s: float = 10.0) -> Iterator[None]:
    """Holds a folder as its one writer. A lock is dropped with its process, so a killed writer keeps nobody out.

    wait_s: seconds to wait for another writer. Raises Held, which names who writes; OSError where no file can be made.
    """
    path, end = folder / LOCK, time.monotonic() + wait_s
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        if _locks(handle) and _is(path, handle):
            break
        holder = os.read(handle, 300).decode("utf-8", "replace")
        os.close(handle)
        if time.monotonic() >= end:
            raise Held(f"{escaped(folder.name)}/ is being written by {escaped(holder) or 'a process without a name'}")
        time.sleep(0.02)
    try:
        who = f"process {os.getpid()} on {platform.node()} ({' '.join(sys.argv)[:150]})"
        os.ftruncate(handle, 0)
        os.write(handle, who.encode("utf-8", "replace"))
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for this very file then makes another
        os.close(handle)


def _temporary(folder: Path) -> tuple[int, Path]:
    """(handle, path) of a new file that is locked. A sweep may come between its making and its lock: then another."""
    while True:
        handle, name = tempfile.mkstemp(dir=folder, prefix=PREFIX)
        if _locks(handle) and _is(Path(name), handle):
            return handle, Path(name)
        os.close(handle)


def _locks(handle: int) -> bool:
    """Locks a file or folder; False if another process has it. Where a file system has no locks nothing is dead."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is(path: Path, handle: int) -> bool:
    """Whether a path still leads to what is open."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove_if_dead(path: Path) -> None:
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        if found.st_uid != os.geteuid() or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held or without locks: an OSError, and it stays
            if stat.S_ISDIR(found.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(handle)


def _remove_own(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a forked child, which goes on in its parent's folder
        shutil.rmtree(folder, ignore_errors=True)
