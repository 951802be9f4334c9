"""One name a module: nothing of ours is loaded twice, or under the bare name of its folder.

A module under two names is two modules: exceptions, registries and caches of the one are unknown to the other.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from megaproof import HOME

FOLDERS = ("toolchain", "quant", "reference", "kernel", "cases", "golden", "proof", "bench")
"""Folders of the product. A user's own module of such a name is no matter of ours."""


def problems(modules: Mapping[str, ModuleType] | None = None, command: list[str] | None = None) -> list[str]:
    """One sentence for each file of ours that is loaded under a wrong name, or under two; [] when all is well.

    modules: sys.modules by default; command: sys.orig_argv, since `python -m kernel` loads the bare package `kernel`.
    """
    modules, command = modules or sys.modules, command or sys.orig_argv
    names: dict[Path, dict[str, ModuleType]] = {}
    real = cache(os.path.realpath)  # of folders: there are some hundred, and thousands of files
    for name, module in list(modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or name == "__main__":
            continue
        folder, base = os.path.split(file)
        path = os.path.realpath(file) if os.path.islink(file) else os.path.join(real(folder), base)
        if path.startswith(f"{HOME}{os.sep}"):
            names.setdefault(Path(path), {})[name] = module
    found = []
    for path, known in names.items():
        bare = [name for name in known if name.partition(".")[0] in FOLDERS and _is_ours(path)]
        for name in bare:
            if not ("-m" in command and name in command):
                found.append(f"{path} is loaded as {name}; its one name is megaproof.{name}")
        if not bare and len(set(map(id, known.values()))) > 1 and _is_ours(path):
            found.append(f"{path} is loaded {len(known)} times, as {' and as '.join(sorted(known))}")
    return sorted(found)


def _is_ours(path: Path) -> bool:
    """Whether a file belongs to the product or its tests, and not to an environment inside the checkout.

    pytest loads test modules below the bare name `tests`, so the empty packages there have two names.
    """
    folder = path.relative_to(HOME).parts[0]
    return folder in (*FOLDERS, "megaproof") or (folder == "tests" and path.name != "__init__.py")
