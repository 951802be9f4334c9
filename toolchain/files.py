"""Files that are never half written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes `data` beside `path` and renames it: a reader sees the old file or the new one, whole.

    mode: the permissions of the new file. Raises OSError, and then leaves no file beside it.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
