"""What numba compiled, kept on disk, under a key that holds everything that entered it.

numba's own cache looks at the time and size of one file, so functions that use a constant or an inner loop of another
module stay as they were when that module changes. Here the key is a digest of the sources of quant, of the code and
constants that are loaded, and of the versions and the CPU. The cache saves time and decides nothing: what cannot be
read or kept is compiled in memory. NUMBA_CACHE_DIR is not used.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import njit
from numba.core import serialize
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult

from megaproof.toolchain import cache

PURPOSE = "numba"
ENTER = ("atoms", "formats", "lanes", "philox", "twin_cpu")
"""Modules of quant whose functions and constants are compiled into machine code."""
_PLAIN = (bool, int, float, str, bytes, tuple, type(None))


def compiled(function: Callable[..., Any]) -> Any:
    """The function, compiled on its first call or read from the cache: no fast math, the GIL released."""
    dispatcher = njit(nogil=True, error_model="numpy", fastmath=False)(function)
    dispatcher._cache = FunctionCache(function)
    return dispatcher


class FunctionCache(_Cache):  # type: ignore[misc]
    """The cache of one function, as a dispatcher of numba asks it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__qualname__

    @property
    def cache_path(self) -> str:
        """The folder; '' where there is no cache."""
        return str(_store().folder or "")

    def enable(self) -> None:
        """It is always on."""

    def disable(self) -> None:
        """It is always on."""

    def flush(self) -> None:
        """Nothing is stale here: another source is another key."""

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        """What was compiled for these types, or None."""
        data = _store().read(self._entry(sig, target_context))
        if data is None:
            return None
        try:
            target_context.refresh()
            # numba knows no other form. Nobody else can write there, and the digest beside it is the entry's.
            return CompileResult._rebuild(target_context, *pickle.loads(data))  # noqa: S301
        except Exception:  # of another numba in all but its version: it is compiled again
            return None

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        """Keeps what was compiled, where it can be."""
        try:
            content = serialize.dumps(data._reduce())
        except Exception:  # what cannot be kept is compiled in each process
            return
        _store().write(self._entry(sig, data.target_context), content)

    def _entry(self, sig: Any, target_context: Any) -> str:
        parts = [self.name, str(sig), repr(target_context.codegen().magic_tuple()), *versions(), *loaded(), *sources()]
        return f"{self.name.strip('_')}-{hashlib.sha256(repr(parts).encode()).hexdigest()}"


@functools.cache
def _store() -> cache.Cache:
    return cache.of(PURPOSE)


@functools.cache
def versions() -> list[str]:
    """Of whatever has a hand in the machine code, and numba's settings."""
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_")]
    return [numba.__version__, llvmlite.__version__, np.__version__, sys.version, platform.machine(), *settings]


@functools.cache
def sources() -> list[str]:
    """The sha256 of each source of quant, as it is on disk."""
    folder = Path(__file__).parent
    return [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(folder.glob("*.py"))]


def loaded() -> list[str]:
    """Code and constants of `ENTER` as they are in this process, whatever files they came from."""
    modules = [sys.modules[f"{__package__}.{name}"] for name in ENTER]
    return [line for module in modules for line in _of_module(module)]


def _of_module(module: ModuleType) -> Iterator[str]:
    for name, value in sorted(vars(module).items()):
        if name.startswith("__"):
            continue
        function = getattr(value, "py_func", getattr(value, "_defn", value))  # a dispatcher's, an intrinsic's
        if isinstance(function, FunctionType):
            yield f"{module.__name__}.{name} {_of_code(function.__code__)} {function.__defaults__!r}"
        elif isinstance(value, _PLAIN):
            yield f"{module.__name__}.{name} = {value!r}"


@functools.cache
def _of_code(code: CodeType) -> str:
    constants = [_of_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    names = (code.co_names, code.co_varnames, code.co_freevars)
    return hashlib.sha256(repr((code.co_code.hex(), names, constants)).encode()).hexdigest()
