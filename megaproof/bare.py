"""The folders under their bare names: `python -m kernel` works in a checkout, `import kernel.api` is refused.

Python imports the package `kernel` before it runs `kernel.__main__`, so the bare package cannot refuse to exist. It
refuses its modules instead. Otherwise one module could be loaded under two names, `kernel.api` and
`megaproof.kernel.api`, and exceptions, registries and caches of the one would be unknown to the other.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from megaproof import HOME, moved


def refuse(name: str) -> None:
    """What the __init__ of a folder calls with its `__name__`: lets nothing be imported below the bare name.

    Below `tests` only old names are refused: pytest loads test modules as `tests.<folder>.test_<room>`.
    """
    if name.partition(".")[0] == "megaproof":
        return
    folder = Path(str(sys.modules[name].__file__)).resolve().parent
    if folder.parent != HOME:
        _end(f"{name} is in {folder.parent}, but megaproof is in {HOME}: use python -m megaproof.{name}", name)
    sys.meta_path.insert(0, _Refusal(name, everything=name != "tests"))


def old_names(name: str) -> Callable[[str], Any]:
    """A `__getattr__` for a package whose bare name is that of an old module: what the module held is refused."""

    def get(attribute: str) -> Any:
        new, line = moved.new_name(name), moved.of_import(name)
        if new and not attribute.startswith("_") and hasattr(importlib.import_module(new), attribute):
            raise ImportError(line)
        raise AttributeError(f"module {name!r} has no attribute {attribute!r}")

    return get


class _Refusal:
    """A finder that knows no module; what is below `name` ends in one line that says the new name."""

    def __init__(self, name: str, everything: bool) -> None:
        self.name, self.everything = name, everything

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self.name}.") or fullname == f"{self.name}.__main__":
            return None
        if not self.everything and (fullname not in moved.IMPORTS or fullname == "tests.cases"):
            return None
        self._leave()
        _end(moved.of_import(fullname) or f"{fullname} is megaproof.{fullname} now", fullname)
        return None

    def _leave(self) -> None:
        """Takes the bare package away again, which Python loaded on the way: a refused import leaves nothing behind."""
        if self.everything:
            sys.modules.pop(self.name, None)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]


def _end(line: str, name: str) -> None:
    """Raises ImportError with this line; ends the process with status 2 if the module is what `python -m` was given."""
    if sys.argv[:1] == ["-m"] and (name in sys.orig_argv):  # Python's sign that it is looking for the module to run
        print(moved.of_command(f"python -m {name}") or line, file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(line, name=name)
