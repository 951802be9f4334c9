"""The code digest: what leaves it the same, what changes it, and that no result is stale for a word. No GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megaproof import HOME
from megaproof.bench.report import page, results
from megaproof.kernel.programs import PINS, stream
from megaproof.toolchain import build, code, sass
from megaproof.toolchain.errors import EnvironmentMissing
from megaproof.toolchain.program import Program

KERNEL = HOME / "kernel"

PROGRAM = """
namespace words { constexpr int kFirst = 3, kSecond = 9; }
constexpr int kUnused = 5;
struct Pair { int first, second; };
__device__ __noinline__ void apart(int* p, int k) { if (k > words::kFirst) p[k] = k * words::kSecond; else p[1] = k; }
extern "C" __global__ void one(int* p, Pair pair) { apart(p, pair.first); apart(p + 1, pair.second); }
extern "C" __global__ void two(int* p) { p[threadIdx.x] += 1; }
"""
DATA = """
__constant__ int low[2] = {1, 2};
__device__ int high[2] = {10, 20}, most[2] = {30, 40}, plain[3];
extern "C" __global__ void constant(int* p) { p[0] = low[p[1]]; }
extern "C" __global__ void global(int* p) { p[0] = high[p[1]] - most[p[1]] + plain[p[2]]++; }
extern "C" __global__ void neither(int* p) { p[0] = 1; }
"""
POINTERS = """
__device__ __noinline__ int one(int x) { return x * x; }
__device__ __noinline__ int two(int x) { return x + 7; }
using Function = int (*)(int);
__device__ Function table[2] = {one, two};
extern "C" __global__ void calls(int* p) { p[0] = table[p[1] & 1](p[2]); }
"""
LOOP = """
extern "C" __global__ void LIMIT loop(float* p) {
    float v[48];
#pragma unroll
    for (int i = 0; i < 48; ++i) v[i] = p[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 48; ++i) p[(47 - i) * 1024 + threadIdx.x] = v[i] * v[(i + 1) % 48];
}
"""


def digests(text: str, *swaps: tuple[str, str]) -> dict[str, str]:
    for old, new in swaps:
        assert old in text
        text = text.replace(old, new)
    return build.build(text, cache=False).code()


@pytest.mark.parametrize(
    "swap",
    [
        ("constexpr int kUnused = 5;", "// a comment\n\nconstexpr int kUnused = 5;  // and another"),
        ("words", "a_namespace"),
        ("kSecond", "a_constant"),
        ("kUnused = 5", "kUnused = 6"),
        ("constexpr int kUnused = 5;", "constexpr int kUnused = 5, kMore = 7;"),
        ("Pair", "Couple"),
        ("apart", "zz_function"),
    ],
    ids=["comment", "namespace", "constant", "unused value", "new constant", "struct", "noinline function"],
)
def test_words_leave_the_code_the_same(swap: tuple[str, str]) -> None:
    assert digests(PROGRAM, swap) == digests(PROGRAM)


@pytest.mark.parametrize(
    "swap",
    [("kFirst = 3", "kFirst = 4"), ("p[k] = k *", "p[k] = k +"), ("pair.second);", "pair.second); p[3] = 1;")],
    ids=["constant", "instruction of a function", "instruction"],
)
def test_another_instruction_is_other_code_of_its_entry_alone(swap: tuple[str, str]) -> None:
    found, other = digests(PROGRAM), digests(PROGRAM, swap)
    assert found["one"] != other["one"]
    assert found["two"] == other["two"]


@pytest.mark.parametrize(
    ("swaps", "changed"),
    [
        ([("{1, 2}", "{1, 3}")], {"constant"}),
        ([("{10, 20}", "{10, 21}")], {"global"}),
        ([("{10, 20}", "{0}"), ("{30, 40}", "{10, 20}"), ("{0}", "{30, 40}")], {"global"}),
        ([("plain[3]", "plain[4]")], {"global"}),
    ],
    ids=["constant memory", "global memory", "two tables in turn", "size without a value"],
)
def test_data_counts_for_the_kernel_that_reads_it(swaps: list[tuple[str, str]], changed: set[str]) -> None:
    found, other = digests(DATA), digests(DATA, *swaps)
    differ = {name for name in found if found[name] != other[name]}
    assert changed <= differ <= {"constant", "global"}, "who reads none has none"


def test_functions_behind_pointers_count() -> None:
    found = digests(POINTERS)
    assert digests(POINTERS, ("x + 7", "x + 8")) != found
    assert digests(POINTERS, ("{one, two}", "{two, one}")) != found


def test_registers_count() -> None:
    """Another budget, and the report's figures by themselves."""
    free, tight = (digests(LOOP, ("LIMIT", limit)) for limit in ("", "__launch_bounds__(1024, 2)"))
    assert free != tight
    built = build.build(LOOP.replace("LIMIT", ""), cache=False)
    entry = built.report.entries["loop"]
    for figure in ("registers", "stack", "spill_stores", "spill_loads", "shared"):
        other = replace(entry, **{figure: getattr(entry, figure) + 8})
        assert code.code_digests(built.cubin, build.Report({"loop": other}, ())) != free, figure


def test_a_cubin_that_lacks_an_entry_is_refused() -> None:
    built = build.build(PROGRAM, cache=False)
    entry = built.report.entries["two"]
    with pytest.raises(ValueError, match=r"no code of three"):
        code.code_digests(built.cubin, build.Report({"three": entry}, ()))
    with pytest.raises(ValueError, match="no little-endian ELF file"):
        code.code_digests(b"MZ", built.report)


def test_a_result_names_some_entries_or_all() -> None:
    built = build.build(PROGRAM, cache=False)
    assert set(built.code()) == {"one", "two"}
    assert built.code("two") == {"two": built.code()["two"]}
    assert built.pin() == {"cubin": built.sha256, "code": built.code()}


@pytest.fixture
def copied(tmp_path: Path) -> Program:
    """A program of the project, with a copy of all its files."""
    for path in (*KERNEL.rglob("*.cu"), *KERNEL.rglob("*.cuh")):
        copy = tmp_path / path.relative_to(KERNEL)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    sources = tuple(tmp_path / path.relative_to(KERNEL) for path in stream.PROGRAM.sources)
    return replace(stream.PROGRAM, sources=sources)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def reworded(folder: Path) -> None:
    for path in files(folder):
        path.write_text("// Another word.\n" + re.sub(r"(?m)^// (?=[A-Z])", "// Well: ", path.read_text()))


def new_file(folder: Path) -> None:
    (folder / "new.cu").write_text('extern "C" __global__ void fresh() {}\n')


def renamed_file(folder: Path) -> None:
    (folder / "ptx.cuh").rename(folder / "words.cuh")
    for path in files(folder):
        path.write_text(path.read_text().replace('ptx.cuh"', 'words.cuh"'))


def renamed(*names: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "programs" / "stream.cu"
        text = path.read_text()
        assert all(name in text for name in names)
        path.write_text(re.sub("|".join(names), lambda match: f"{match[0][0]}Zz{match[0][1:]}", text))

    return act


@pytest.mark.parametrize(
    "act",
    [reworded, new_file, renamed_file, renamed("StreamStorage", "StreamState"), renamed("kPieceBytes", "kNumThreads")],
    ids=["comments", "new file", "renamed file", "renamed structs", "renamed constants"],
)
def test_no_result_is_stale_for_a_word(act: Callable[[Path], None], copied: Program, tmp_path: Path) -> None:
    """A program of the project keeps the pinned code, so all results that name it stand."""
    before = copied.text()
    act(tmp_path)
    assert act is new_file or copied.text() != before
    assert copied.compile().code() == PINS.code()["stream"]
    results.read_all(page.RESULTS)


def test_a_changed_instruction_of_a_program_is_seen(copied: Program) -> None:
    (path,) = copied.sources
    text = path.read_text()
    assert "threadIdx.x == 32)" in text
    path.write_text(text.replace("threadIdx.x == 32)", "threadIdx.x == 33)"))
    assert copied.compile().code() != PINS.code()["stream"]


@pytest.mark.parametrize("text", [PROGRAM, DATA, POINTERS], ids=["program", "data", "pointers"])
def test_banks_are_those_of_the_disassembler(text: str) -> None:
    try:
        program, _ = sass.disassembler()
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    cubin = build.build(text, cache=False).cubin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=True).stdout
    wanted = {int(bank, 16) for bank in re.findall(r"\bc\[0x([0-9a-f]+)\]", shown)} & code.SHARED_BANKS
    assert set().union(*map(code.shared_banks, code.texts(cubin))) == wanted
