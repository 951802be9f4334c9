"""The compiler and its gate, without a GPU: what must pass, what must be caught, and the cubin cache."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaproof.kernel import api
from megaproof.kernel.__main__ import TARGETS
from megaproof.kernel.host.params import Params
from megaproof.kernel.host.sizes import shared_bytes
from megaproof.kernel.programs import probe
from megaproof.toolchain import build, launch

ROOT = Path(__file__).resolve().parents[2]
PLAIN = 'extern "C" __global__ void plain(float* p) { p[threadIdx.x] = p[threadIdx.x] * 3.0f + 1.0f; }'
STACK = """
extern "C" __global__ void stack(const int* index, float* out) {
    float table[64];
    for (int i = 0; i < 64; ++i) table[index[i] & 63] = out[i];
    out[threadIdx.x] = table[index[threadIdx.x] & 63];
}
"""
SPILL = """
extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* p) {
    float v[96];
#pragma unroll
    for (int i = 0; i < 96; ++i) v[i] = p[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; ++i) p[(95 - i) * 1024 + threadIdx.x] = v[i] * v[(i + 1) % 96];
}
"""
SERIALISED = """
#include "ptx.cuh"
extern "C" __global__ void __launch_bounds__(128, 1) serialised(const float* c, float* out, u64 desc_a, u64 desc_b) {
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = c[4 * threadIdx.x + i];
    ptx::wgmma_fence();
    ptx::wgmma_ss<8>(d, desc_a, desc_b, true);
    if (d[0] > 1.0f) __trap();
    ptx::wgmma_ss<8>(d, desc_a, desc_b, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = d[i];
}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return build.cache_folder()


def test_probes_compile_and_pass_the_gate() -> None:
    built = probe.compile_probes()
    assert set(built.report.entries) == set(probe.ENTRIES)
    assert built.cubin.startswith(b"\x7fELF")
    widest = built.report.entries["wgmma_ss_n256"]
    assert 128 < widest.registers <= 255, "128 accumulators a thread live in registers"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (STACK, "256 bytes of stack"),
        (SPILL, "of spill loads"),
        (SERIALISED, "C75"),
        ("__device__ int nothing;", "no kernel"),
    ],
    ids=["stack", "spill", "serialised", "empty"],
)
def test_gate_catches(source: str, message: str) -> None:
    built = build.build_text(source, cache=False)
    with pytest.raises(build.BuildError, match=message):
        build.gate(built)


def test_gate_passes_what_is_clean() -> None:
    build.gate(build.build_text(PLAIN, ["plain"], cache=False))


def test_same_source_gives_the_same_cubin_in_another_process() -> None:
    """What a CPU-only machine gates is, byte for byte, what runs on the chip."""
    code = "from kernel import build; print(build.build(['probe.cu'], cache=False).sha256)"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == build.build(["probe.cu"], cache=False).sha256


def test_a_second_compilation_is_reported_like_the_first() -> None:
    """Beside a driver NVRTC may have kept the cubin; the gate rests on the report that comes with compiling it."""
    first, second = (build.build_text(PLAIN, cache=False) for _ in range(2))
    assert first.report.entries
    assert first == second


def test_contraction_is_off() -> None:
    """a * b + c stays two roundings; the written fma is another cubin."""
    fused = PLAIN.replace("p[threadIdx.x] * 3.0f + 1.0f", "__fmaf_rn(p[threadIdx.x], 3.0f, 1.0f)")
    assert fused != PLAIN
    assert build.build_text(PLAIN, cache=False).cubin != build.build_text(fused, cache=False).cubin


def test_defines_options_and_includes_reach_the_compiler() -> None:
    source = '#include "ptx.cuh"\n#include "ptx.cuh"\nextern "C" __global__ void NAME(u32* p) { *p = VALUE; }'
    one = build.build_text(source, ["first"], defines={"NAME": "first", "VALUE": 1}, cache=False)
    two = build.build_text(source, ["first"], defines={"NAME": "first", "VALUE": 2}, cache=False)
    assert one.cubin != two.cubin
    with pytest.raises(build.BuildError, match="maxrregcount"):
        build.build_text(PLAIN, options=["--maxrregcount=what"], cache=False)


def test_errors_name_file_and_line() -> None:
    with pytest.raises(build.BuildError, match=r"text\(3\).*undefined_thing"):
        build.build_text('#include "ptx.cuh"\n\nint value = undefined_thing;', cache=False)
    with pytest.raises(build.BuildError, match=r"absent\.cuh is missing"):
        build.build_text('#include "absent.cuh"', cache=False)
    with pytest.raises(build.BuildError, match="not_there"):
        build.build_text(PLAIN, ["not_there"], cache=False)


def test_report_that_cannot_be_read_is_an_error() -> None:
    log = "ptxas info    : Compiling entry function 'k' for 'sm_90a'\nptxas info    : Used 10 registers\n"
    with pytest.raises(build.BuildError, match="cannot be read"):
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
    first = build.build_text(PLAIN)
    second = build.build_text(PLAIN)
    assert not first.cached
    assert second.cached
    assert (second.cubin, second.report, second.nvrtc) == (first.cubin, first.report, first.nvrtc)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert {path.suffix for path in cache.iterdir()} == {".cubin", ".json"}, "no temporary file is left"
    assert not build.build_text(PLAIN + "\n// another key").cached


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"\x7fELF but not this one"], ids=["empty", "braces", "other"])
def test_damaged_cache_is_compiled_again(cache: Path, suffix: str, damage: bytes) -> None:
    good = build.build_text(PLAIN)
    (path,) = cache.glob(f"*{suffix}")
    path.write_bytes(damage)
    again = build.build_text(PLAIN)
    assert not again.cached
    assert again.cubin == good.cubin
    assert build.build_text(PLAIN).cached, "the damaged entry was replaced"


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert not build.build_text(PLAIN).cached


def test_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(build.EnvironmentMissing, match=r"install cuda-core 1\.2 and nvidia-cuda-nvrtc 13\.0\.88"):
        build.build_text(PLAIN, cache=False)


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H20-3e", "H20"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
    ],
)
def test_chip_name(name: str, chip: str) -> None:
    assert launch.chip_name(name) == chip


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "kernel", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_command_line() -> None:
    built = run_cli("build", "--all", "--json")
    report = json.loads(built.stdout)
    assert built.returncode == (3 if report["sass"].startswith("not checked") else 0), built.stderr
    rows = report["configurations"]
    assert all(row["chips"] == {"H200": 132, "H20": 78} for row in rows), "SMs are a run-time value"
    assert {row["target"] for row in rows} == set(TARGETS)
    assert {row["entry"] for row in rows if row["target"] == "probes"} == set(probe.ENTRIES)
    fused = {row["target"]: row["shared_dynamic"] for row in rows if row["entry"] == "moe_fast"}
    assert fused == dict.fromkeys(("moe", "moe_g128", "phases"), shared_bytes())
    assert not report["failed"]
    for wrong in (["build"], ["build", "nonsense"], ["nonsense"], ["build", "twin", "--pin"]):
        assert run_cli(*wrong).returncode == 2, wrong


def test_another_size_of_shared_memory_does_not_compile() -> None:
    """The host's number is sizeof(SharedStorage), or there is no cubin."""
    for macro, size in (("SHARED_BYTES", shared_bytes() + 128), ("PARAMS_BYTES", ctypes.sizeof(Params) - 8)):
        with pytest.raises(build.BuildError, match="static assertion failed"):
            build.build(api.SOURCES, api.ENTRIES, defines=api.defines(64) | {macro: size}, cache=False)


def pins() -> dict[str, dict[str, Any]]:
    return {name: target.compile().pin() for name, target in TARGETS.items()}


def test_cubins_are_the_pinned_ones() -> None:
    """And the code digest of each entry, which a result names."""
    found = pins()
    build.check_pins(found)
    assert build.pinned_code() == {name: pin["code"] for name, pin in found.items()}


@pytest.mark.gpu
def test_the_dsv4_flash_gate_runs_the_pinned_cubins() -> None:
    """The GPU machine's NVRTC gives, byte for byte, what was gated without a GPU. The name is for `-k dsv4_flash`."""
    launch.require_device()
    build.check_pins(pins())


def test_pins_catch_and_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PINS", tmp_path / "cubins.json")
    one, two, three = ({"cubin": name, "code": {"entry": name}} for name in "abc")
    pinned = {"one": one, "two": two}
    build.write_pins(pinned)
    build.check_pins(pinned)
    assert build.pinned_code() == {"one": {"entry": "a"}, "two": {"entry": "b"}}
    assert [path.name for path in tmp_path.iterdir()] == ["cubins.json"], "no temporary file is left"
    other_cubin, other_code = two | {"cubin": "c"}, two | {"code": three["code"]}
    for other in (pinned | {"two": other_cubin}, pinned | {"two": other_code}, {"one": one}, pinned | {"three": three}):
        with pytest.raises(build.BuildError, match=r"cubins of t\w+ are not .*python -m kernel build --all --pin"):
            build.check_pins(other)
    monkeypatch.setattr(build, "nvrtc_version", lambda: "13.0.1")
    for act in (build.check_pins, build.write_pins):
        with pytest.raises(build.BuildError, match=r"NVRTC is 13\.0\.1 .*install nvidia-cuda-nvrtc==13\.0\.88"):
            act(pinned)
