"""Folders of goldens as they are written: one writer at a time, the old set or the new one, and nobody else's files.

A writer holds the folder's lock. It lists in a journal what it is about to add and to remove, writes the data files,
then the manifest, which decides, then removes what is no longer named. Killed at any point it leaves a whole set, and
the next writer finds in the journal which unnamed files are left over. Any other file is foreign: it is never removed,
and where there is one nothing is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from megaproof.golden import untrusted
from megaproof.golden.errors import GoldenError
from megaproof.toolchain import files
from megaproof.toolchain.errors import escaped

JOURNAL = ".megaproof-journal"
"""A file beside the manifest while a set is written: the names of data files that come or go."""
DATA_FILE = re.compile(r"([0-9a-f]{16}|[a-z0-9]{1,40}-[a-z0-9]{1,40})\.safetensors")
"""Names of data files: a part of the file's sha256, or what it holds and such a part."""


def is_data_file(name: object) -> bool:
    """Whether a manifest may name this file: no path, and nothing that a user would call his own."""
    return isinstance(name, str) and DATA_FILE.fullmatch(name) is not None


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Holds a folder, which is made if need be. Raises GoldenError that names another writer, or what can't be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(folder):
            yield
    except files.Held as error:
        raise GoldenError(f"{error}; nothing was written") from None
    except OSError as error:
        where = escaped(error.filename or folder)
        raise GoldenError(
            f"{where} can't be written ({error.strerror}); the set is whole, the old one or the new one"
        ) from error


def is_being_written(folder: Path) -> bool:
    """Whether a writer is at work in a folder, or was when it was killed."""
    return (folder / files.LOCK).exists()


def refuse_foreign(folder: Path, named: Collection[str], journal: Path) -> None:
    """Raises GoldenError that names the first thing in a folder that is neither a file of these names nor a leftover.

    Links and folders are foreign whatever they are called. journal: the folder with the journal.
    """
    if folder.is_symlink() and folder != journal:
        raise _foreign(folder)
    known = {*named, *_journal(journal), JOURNAL, files.LOCK}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            ours = entry.name in known or entry.name.startswith(files.PREFIX)
            if not ours or not entry.is_file(follow_symlinks=False):
                raise _foreign(Path(entry.path))


def refuse_other_folder(folder: Path, kept: Collection[str]) -> None:
    """Raises GoldenError where a folder without a manifest is not empty, and where data files lie beside a manifest.

    kept: names that belong beside a manifest.
    """
    has_manifest = (folder / "manifest.json").is_file() and not (folder / "manifest.json").is_symlink()
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            ours = entry.name in kept or entry.name.startswith(".megaproof-")
            known = ours and not entry.is_symlink()
            suspect = entry.name.casefold() in kept or entry.name.casefold().endswith(".safetensors")
            if not known and (suspect or not has_manifest):
                raise _foreign(Path(entry.path))


def write(
    folder: Path, data: Mapping[Path, bytes], lists: Mapping[Path, bytes], old: Collection[Path], named: Collection[str]
) -> None:
    """Writes a set under the lock of `folder`. Raises OSError, and then the old set is whole or the new one.

    data: new data files; lists: manifests in the order in which they are written, the one that decides last;
    old: data files that the manifest names now; named: names of those that the new one names.
    """
    places = {path.parent for path in (*data, *old)}
    left = {place / name for place in places for name in _journal(folder)}
    gone = {path for path in left.union(old) if path.name not in named}
    names = sorted({path.name for path in (*gone, *data)})
    files.replace(folder / JOURNAL, json.dumps(names).encode())
    for path, content in (*data.items(), *lists.items()):
        files.replace(path, content)
    for path in sorted(gone):
        path.unlink(missing_ok=True)
    (folder / JOURNAL).unlink()


def _journal(folder: Path) -> list[str]:
    """Names that a killed writer left. A journal that can't be read names nothing: then its files are foreign."""
    try:
        names = untrusted.parsed(untrusted.read(folder / JOURNAL, untrusted.MANIFEST_BYTES))
    except (GoldenError, ValueError):
        return []
    return [name for name in names if is_data_file(name)] if isinstance(names, list) else []


def _foreign(path: Path) -> GoldenError:
    return GoldenError(
        f"{escaped(path)} is no file of these goldens; nothing was written: move it away or name an empty folder"
    )
