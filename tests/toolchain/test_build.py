"""The compiler, without a GPU: one text gives one cubin, errors say where, and the cubin cache."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from megaproof import HOME
from megaproof.tests.support.runs import python
from megaproof.tests.support.texts import PLAIN
from megaproof.toolchain import build
from megaproof.toolchain.errors import BuildError, EnvironmentMissing

KERNEL = HOME / "kernel"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_OWN", {})
    folder = build.cache_folder().folder
    assert folder
    return folder


def test_same_source_gives_the_same_cubin_in_another_process(tmp_path: Path) -> None:
    """What a CPU-only machine gates is, byte for byte, what runs on the chip."""
    path = tmp_path / "plain.cu"
    path.write_text(PLAIN)
    code = (
        "import sys; from pathlib import Path; from megaproof.toolchain import build; "
        "print(build.build(build.joined([Path(sys.argv[1])]), cache=False).sha256)"
    )
    other = python(tmp_path, "-c", code, str(path))
    assert other.returncode == 0, other.stderr
    assert other.stdout.strip() == build.build(build.joined([path]), cache=False).sha256


def test_a_second_compilation_is_reported_like_the_first() -> None:
    """Beside a driver NVRTC may have kept the cubin; the gate rests on the report that comes with compiling it."""
    first, second = (build.build(PLAIN, cache=False) for _ in range(2))
    assert first.report.entries
    assert first == second


def test_contraction_is_off() -> None:
    """a * b + c stays two roundings; the written fma is another cubin."""
    fused = PLAIN.replace("p[threadIdx.x] * 3.0f + 1.0f", "__fmaf_rn(p[threadIdx.x], 3.0f, 1.0f)")
    assert fused != PLAIN
    assert build.build(PLAIN, cache=False).cubin != build.build(fused, cache=False).cubin


def test_defines_options_and_includes_reach_the_compiler() -> None:
    source = '#include "ptx.cuh"\n#include "ptx.cuh"\nextern "C" __global__ void NAME(u32* p) { *p = VALUE; }'
    source = build.with_includes(source, KERNEL)
    one = build.build(source, ["first"], defines={"NAME": "first", "VALUE": 1}, cache=False)
    two = build.build(source, ["first"], defines={"NAME": "first", "VALUE": 2}, cache=False)
    assert one.cubin != two.cubin
    with pytest.raises(BuildError, match="maxrregcount"):
        build.build(PLAIN, options=["--maxrregcount=what"], cache=False)


def test_errors_name_file_and_line() -> None:
    with pytest.raises(BuildError, match=r"text\(3\).*undefined_thing"):
        build.build(build.with_includes('#include "ptx.cuh"\n\nint value = undefined_thing;', KERNEL), cache=False)
    with pytest.raises(BuildError, match=r"absent\.cuh is missing"):
        build.with_includes('#include "absent.cuh"', KERNEL)
    with pytest.raises(BuildError, match="not_there"):
        build.build(PLAIN, ["not_there"], cache=False)


def test_report_that_cannot_be_read_is_an_error() -> None:
    log = "ptxas info    : Compiling entry function 'k' for 'sm_90a'\nptxas info    : Used 10 registers\n"
    with pytest.raises(BuildError, match="cannot be read"):
        build.parse_report(log)


def test_a_called_function_counts() -> None:
    log = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1024 bytes smem
ptxas info    : Function properties for called
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
"""
    assert build.parse_report(log).entries["k"] == build.Entry(168, 16, 8, 12, 1024)


def test_cache_round_trip(cache: Path) -> None:
    first = build.build(PLAIN)
    second = build.build(PLAIN)
    assert not first.cached
    assert second.cached
    assert (second.cubin, second.report, second.nvrtc) == (first.cubin, first.report, first.nvrtc)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert {path.suffix for path in cache.iterdir()} == {".cubin", ".json", ".sha256"}, "no temporary file is left"
    assert not build.build(PLAIN + "\n// another key").cached


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"\x7fELF but not this one"], ids=["empty", "braces", "other"])
def test_damaged_cache_is_compiled_again(cache: Path, suffix: str, damage: bytes) -> None:
    good = build.build(PLAIN)
    (path,) = cache.glob(f"*{suffix}")
    path.write_bytes(damage)
    again = build.build(PLAIN)
    assert not again.cached
    assert again.cubin == good.cubin
    assert build.build(PLAIN).cached, "the damaged entry was replaced"


def test_without_a_cache_each_text_is_compiled_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    text = PLAIN + "\n// without a cache"
    first = build.build(text)
    assert not first.cached
    monkeypatch.setattr(build, "_compile", None)
    assert build.build(text) is first


def test_a_cubin_that_is_not_taken_is_compiled_here(cache: Path) -> None:
    """What another process left is no proof that it was gated."""
    text = PLAIN + "\n// of another process"
    build.build(text)
    build._OWN.clear()
    assert build.build(text).cached
    assert not build.build(text, takes=lambda built: False).cached


def test_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(EnvironmentMissing, match=r"install cuda-core 1\.2 and nvidia-cuda-nvrtc 13\.0\.88"):
        build.build(PLAIN, cache=False)
