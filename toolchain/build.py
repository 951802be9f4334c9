"""Sources to cubin through NVRTC, on any machine, with ptxas' report; and the gate that a cubin must pass.

No GPU, no CUDA toolkit and no include path are needed: sources include only files of this folder, and those are put
into the text before it goes to the compiler. The flags are fixed: sm_90a, C++20, contraction off (each fma is written).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaproof import HOME
from megaproof.toolchain.code import code_digests
from megaproof.toolchain.files import replace

FOLDER = HOME / "kernel"
ARCH = "sm_90a"
NVRTC_VERSION = "13.0.88"
"""The compiler that the pinned cubins come from (CUDA 13.0)."""
PINS = FOLDER / "programs" / "cubins.json"
"""Of every target the cubin's sha256, so that what was gated without a GPU is what runs, and the code digest of each
entry, which measured results name."""

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[ \t]*$', re.MULTILINE)
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_WARNING = re.compile(r"\(?(C75\d\d)\)?[^\n]*")


class EnvironmentMissing(RuntimeError):
    """A package, driver or device that is not there; one sentence saying what is needed (exit status 3)."""


class BuildError(RuntimeError):
    """A source that does not compile, or a cubin that does not pass the gate."""


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

    def code(self, *entries: str) -> dict[str, str]:
        """Code digests of these entries, or of all."""
        digests = code_digests(self.cubin, self.report)
        return {entry: digests[entry] for entry in entries or digests}

    def pin(self) -> dict[str, Any]:
        """What is pinned of it."""
        return {"cubin": self.sha256, "code": self.code()}


def build(
    sources: Iterable[str | Path],
    entries: Iterable[str] = (),
    options: Iterable[str] = (),
    defines: Mapping[str, str | int] | None = None,
    cache: bool = True,
) -> Built:
    """Compiles source files (names in kernel/, or paths), joined in order, into one cubin.

    `entries` are kernel names that must be in it; `options` go to ptxas beside -v; `defines` are macros.
    Raises BuildError with the compiler's log, EnvironmentMissing without NVRTC.
    """
    return build_text(joined(sources), entries, options, defines, cache)


def joined(sources: Iterable[str | Path], without: Iterable[str] = ()) -> str:
    """The text that is compiled: source files in order, included ones in their places but for those named `without`."""
    seen = {(FOLDER / name).resolve() for name in without}
    return "".join(_inlined(FOLDER / source, seen) for source in sources)


def build_text(
    text: str,
    entries: Iterable[str] = (),
    options: Iterable[str] = (),
    defines: Mapping[str, str | int] | None = None,
    cache: bool = True,
) -> Built:
    """As `build`, for source text; its includes are resolved in kernel/."""
    text = _with_includes(text, FOLDER, set())
    macros = sorted((name, str(value)) for name, value in (defines or {}).items())
    flags = ["-v", *options]
    version = nvrtc_version()
    key = hashlib.sha256(json.dumps([text, macros, flags, ARCH, version]).encode()).hexdigest()
    built = _from_cache(key) if cache else None
    if built is None:
        cubin, log = _compile(text, flags, macros)
        built = Built(cubin, hashlib.sha256(cubin).hexdigest(), parse_report(log), version, False)
        if cache:
            _to_cache(key, built)
    missing = sorted(set(entries) - set(built.report.entries))
    if missing:
        raise BuildError(f"kernels {', '.join(missing)} are not in the cubin; it has {', '.join(built.report.entries)}")
    return built


def gate(built: Built) -> None:
    """Raises BuildError naming every kernel with a spill or a stack frame, and every C75xx message."""
    faults = list(built.report.messages)
    for name, entry in built.report.entries.items():
        if entry.stack or entry.spill_stores or entry.spill_loads:
            spills = f"{entry.spill_stores} bytes of spill stores, {entry.spill_loads} of spill loads"
            faults.append(f"{name}: {entry.stack} bytes of stack, {spills}")
    if not built.report.entries:
        faults.append("the cubin holds no kernel")
    if faults:
        raise BuildError("compile gate: " + "; ".join(faults))


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


def pinned_code() -> dict[str, dict[str, str]]:
    """Target -> entry -> code digest, as they are pinned; needs no compiler."""
    return {name: pin["code"] for name, pin in json.loads(PINS.read_text())["targets"].items()}


def check_pins(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Target -> `Built.pin`. Raises BuildError naming those that differ from the pins, and what to do."""
    pins = json.loads(PINS.read_text())
    _check_version(pins["nvrtc"])
    names = sorted(pins["targets"].keys() | found.keys())
    if others := [name for name in names if pins["targets"].get(name) != found.get(name)]:
        renew = "after a change of the sources, renew them: python -m kernel build --all --pin"
        raise BuildError(f"cubins of {', '.join(others)} are not those of {PINS.name}; {renew}")


def write_pins(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Pins targets, as `check_pins` takes them. Raises BuildError unless the compiler is the one that pins are of."""
    _check_version(NVRTC_VERSION)
    replace(PINS, (json.dumps({"nvrtc": NVRTC_VERSION, "targets": dict(found)}, indent=2) + "\n").encode())


def _check_version(pinned: str) -> None:
    if (version := nvrtc_version()) != pinned:
        raise BuildError(
            f"NVRTC is {version} and the pinned cubins are of {pinned}: another compiler gives other cubins, "
            f"which were not gated; install nvidia-cuda-nvrtc=={pinned}"
        )


def cache_folder() -> Path:
    """Where cubins are kept, readable by their owner alone."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "megaproof" / "cubin"


def _from_cache(key: str) -> Built | None:
    """A cubin whose bytes still have the sha256 stored beside them; anything else is compiled again."""
    try:
        note = json.loads((cache_folder() / f"{key}.json").read_text())
        cubin = (cache_folder() / f"{key}.cubin").read_bytes()
        entries = {name: Entry(**entry) for name, entry in note["entries"].items()}
        if hashlib.sha256(cubin).hexdigest() != note["sha256"]:
            return None
        return Built(cubin, note["sha256"], Report(entries, tuple(note["messages"])), note["nvrtc"], True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _to_cache(key: str, built: Built) -> None:
    """Written beside and renamed, the note last. A cache that cannot be written is done without."""
    folder = cache_folder()
    entries = {name: asdict(entry) for name, entry in built.report.entries.items()}
    note = {"sha256": built.sha256, "nvrtc": built.nvrtc, "entries": entries, "messages": built.report.messages}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        for suffix, data in ((".cubin", built.cubin), (".json", json.dumps(note).encode())):
            handle, temporary = tempfile.mkstemp(dir=folder)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, folder / f"{key}{suffix}")
    except OSError:
        return
