"""Source text to cubin through NVRTC, on any machine, with ptxas' report.

No GPU, no CUDA toolkit and no include path are needed: sources include only files beside them, by relative paths, and
those are put into the text before it goes to the compiler. The flags are fixed: sm_90a, C++20, contraction off (each
fma is written).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaproof.toolchain import cache
from megaproof.toolchain.code import code_digests
from megaproof.toolchain.errors import BuildError, EnvironmentMissing

ARCH = "sm_90a"
NVRTC_VERSION = "13.0.88"
"""The compiler that the pinned cubins come from (CUDA 13.0)."""

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[ \t]*$', re.MULTILINE)
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_WARNING = re.compile(r"\(?(C75\d\d)\)?[^\n]*")
_OWN: dict[str, Built] = {}
"""What this process has compiled, by the digest of all that went in."""


@dataclass(frozen=True)
class Entry:
    """What ptxas says about one kernel: registers a thread; stack, spills and static shared memory in bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Report:
    """ptxas' report of one cubin: kernels by name, and the C75xx messages (WGMMA serialised or patched up)."""

    entries: dict[str, Entry]
    messages: tuple[str, ...]


@dataclass(frozen=True)
class Built:
    """A cubin with its sha256, the report, and the compiler's version."""

    cubin: bytes
    sha256: str
    report: Report
    nvrtc: str
    cached: bool
    """Whether it was compiled by another process."""

    def code(self, *entries: str) -> dict[str, str]:
        """Code digests of these entries, or of all."""
        digests = code_digests(self.cubin, self.report)
        return {entry: digests[entry] for entry in entries or digests}

    def pin(self) -> dict[str, Any]:
        """What is pinned of it."""
        return {"cubin": self.sha256, "code": self.code()}


def build(
    text: str,
    entries: Iterable[str] = (),
    options: Iterable[str] = (),
    defines: Mapping[str, str | int] | None = None,
    cache: bool = True,
    takes: Callable[[Built], bool] = lambda built: True,
) -> Built:
    """Compiles source text, with its includes in place (see `joined`), into one cubin.

    `entries` are kernel names that must be in it; `options` go to ptxas beside -v; `defines` are macros. cache: whether
    one will do that was made before, by this process, or by another one if `takes` says so of what it left.
    Raises BuildError with the compiler's log, EnvironmentMissing without NVRTC.
    """
    macros = sorted((name, str(value)) for name, value in (defines or {}).items())
    flags = ["-v", *options]
    built = _kept(text, flags, macros, takes) if cache else _made(text, flags, macros)
    missing = sorted(set(entries) - set(built.report.entries))
    if missing:
        raise BuildError(f"kernels {', '.join(missing)} are not in the cubin; it has {', '.join(built.report.entries)}")
    return built


def _made(text: str, flags: list[str], macros: list[tuple[str, str]]) -> Built:
    version = nvrtc_version()
    cubin, log = _compile(text, flags, macros)
    return Built(cubin, hashlib.sha256(cubin).hexdigest(), parse_report(log), version, False)


def _kept(text: str, flags: list[str], macros: list[tuple[str, str]], takes: Callable[[Built], bool]) -> Built:
    key = hashlib.sha256(json.dumps([text, macros, flags, ARCH, nvrtc_version()]).encode()).hexdigest()
    place = cache_folder()
    built = _from_cache(place, key)
    if built is None or not takes(built):
        # Without a cache, and for what the cache may not give, each text is still compiled once a process.
        built = _OWN[key] = _OWN.get(key) or _made(text, flags, macros)
        if takes(built):
            _to_cache(place, key, built)
    return built


def cache_folder() -> cache.Cache:
    """Where cubins are kept."""
    return cache.of("cubin")


def joined(sources: Iterable[Path], without: Iterable[Path] = ()) -> str:
    """The text that is compiled: source files in order, included ones in their places but for the files `without`."""
    seen = {path.resolve() for path in without}
    return "".join(_inlined(path.resolve(), seen) for path in sources)


def with_includes(text: str, folder: Path) -> str:
    """A text that is in no file, with its includes in place; they are relative to `folder`."""
    return _with_includes(text, folder, set())


def parse_report(log: str) -> Report:
    """ptxas -v's text -> Report. A figure that is missing counts as a fault of the log: BuildError."""
    entries = {}
    for block in re.split(r"(?=Compiling entry function ')", log)[1:]:
        name, stack, used = _ENTRY.search(block), _STACK.findall(block), _USED.search(block)
        if not (name and stack and used):
            raise BuildError(f"ptxas' report cannot be read: {block.strip()[:200]}")
        shared = _SHARED.search(block)
        # Functions that a kernel calls follow it, each with a line of its own: the worst one counts.
        worst = (max(map(int, figures)) for figures in zip(*stack, strict=True))
        numbers = (int(used[1]), *worst, int(shared[1]) if shared else 0)
        entries[name[1]] = Entry(*numbers)
    messages = tuple(sorted({match[0].strip() for match in _WARNING.finditer(log)}))
    return Report(dict(sorted(entries.items())), messages)


@functools.cache
def nvrtc_version() -> str:
    """The compiler's full version, such as '13.0.88', as it signs its cubins. Raises EnvironmentMissing."""
    cubin, _ = _compile('extern "C" __global__ void version() {}', [], [])
    match = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", cubin)
    if match is None:
        raise EnvironmentMissing("NVRTC does not sign its cubins with a version; nvidia-cuda-nvrtc 13.0 is needed")
    return match[1].decode()


def _compile(text: str, flags: list[str], macros: list[tuple[str, str]]) -> tuple[bytes, str]:
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise EnvironmentMissing(
            f"cuda.core cannot be imported ({error}); install cuda-core 1.2 and nvidia-cuda-nvrtc {NVRTC_VERSION}"
        ) from error
    try:
        options = ProgramOptions(
            arch=ARCH,
            std="c++20",
            fma=False,
            ptxas_options=flags or None,
            define_macro=macros or None,
            no_cache=True,  # beside a driver NVRTC keeps cubins of its own, which come back without ptxas' report
        )
        log = io.StringIO()
        code = Program(text, "c++", options).compile("cubin", logs=log)
    except Exception as error:
        if type(error).__name__ == "NVRTCError":
            raise BuildError(str(error).replace("\0", "").strip()) from error
        raise EnvironmentMissing(
            f"NVRTC cannot be used ({error}); install nvidia-cuda-nvrtc {NVRTC_VERSION}"
        ) from error
    return bytes(code.code), log.getvalue()


def _inlined(path: Path, seen: set[Path]) -> str:
    if path in seen:
        return "\n"
    seen.add(path)
    if not path.is_file():
        raise BuildError(f"source {path.name} is missing: no such file in {path.parent.name}/")
    return f'#line 1 "{path.name}"\n' + _with_includes(path.read_text(), path.parent, seen, path.name)


def _with_includes(text: str, folder: Path, seen: set[Path], name: str = "text") -> str:
    """Puts each included file in place of its first include line, with #line marks so that errors name the file."""

    def replace(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 2
        return f'{_inlined((folder / match[1]).resolve(), seen)}\n#line {line} "{name}"'

    return _INCLUDE.sub(replace, text.replace("#pragma once", ""))


def _from_cache(place: cache.Cache, key: str) -> Built | None:
    """A cubin with its report, or None: anything odd is compiled again."""
    cubin, stored = place.read(f"{key}.cubin"), place.read(f"{key}.json")
    if cubin is None or stored is None:
        return None
    try:
        note = json.loads(stored)
        entries = {name: Entry(**entry) for name, entry in note["entries"].items()}
        if hashlib.sha256(cubin).hexdigest() != note["sha256"]:
            return None
        return Built(cubin, note["sha256"], Report(entries, tuple(note["messages"])), note["nvrtc"], True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _to_cache(place: cache.Cache, key: str, built: Built) -> None:
    """The note last: it names the cubin."""
    entries = {name: asdict(entry) for name, entry in built.report.entries.items()}
    note = {"sha256": built.sha256, "nvrtc": built.nvrtc, "entries": entries, "messages": built.report.messages}
    place.write(f"{key}.cubin", built.cubin)
    place.write(f"{key}.json", json.dumps(note).encode())
