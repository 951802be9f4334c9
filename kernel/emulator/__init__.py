"""The fused kernel's own sources on a CPU: compiled for the host, every CUDA thread a fiber of machine.hpp.

Every line of the kernel but ptx.cuh is what ships. A run is decided by its seed: who goes on, when a copy lands.
Shapes have to be small: a thread of the GPU costs a microsecond whenever it waits.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaproof import HOME
from megaproof.kernel.host import params
from megaproof.kernel.host.buffer import BufferSize, RankViews
from megaproof.kernel.host.sizes import ALIGNMENT, THREADS, shared_bytes
from megaproof.kernel.host.timeout import STATUS_WORDS, waited
from megaproof.kernel.programs.moe import moe
from megaproof.quant import tables
from megaproof.quant.recipe import Recipe
from megaproof.toolchain import build
from megaproof.toolchain.launch import TensorMap

FOLDER = Path(__file__).parent
LAUNCH_REGISTERS = 168
"""Of a thread, as `kernel build` reports them; the pool of a block is as many times its threads."""
MOST_STEPS = 50_000_000
"""Of the scheduler, in which a launch has to end; small layers take about a million."""


class EmulationError(AssertionError):
    """A run that did not end as it should: deadlock, collectives that do not match, a role that gave up."""


def compiler() -> str | None:
    """A C++ compiler of the host, if there is one."""
    return shutil.which("g++") or shutil.which("clang++")


def unchanged(text: str) -> str:
    """The kernel as it ships."""
    return text


def source(granularity: int = 64, change: Callable[[str], str] = unchanged, silu: str = "fast") -> str:
    """The translation unit: machine, scalar atoms of the twin, ptx for the machine, one kernel after `change`."""
    atoms, _, tensor_core = (HOME / "quant" / "twin.cu").read_text().partition("// ---- element by element")
    steps = tensor_core[tensor_core.index("constexpr short kNoTerm") :]
    steps = steps[: steps.index("extern")]
    steps = (
        steps[: steps.index("struct ChainParams")] + steps[steps.index("__device__ __forceinline__ void decode_term") :]
    )
    program = moe(granularity).edited(change)
    kernel = program.text(without=[HOME / "kernel" / "ptx.cuh"])
    kernel = re.sub(r"^#line .*$", "", kernel, flags=re.MULTILINE)
    kernel, others = re.subn(rf'^extern "C" .* moe_(?!{silu}\()\w+\(.*$', "", kernel, flags=re.MULTILINE)
    assert others == 1, "of the two kernels one is wanted"
    kernel, words = re.subn(
        r"__shared__ u32 ([\w, ]+);",
        lambda m: "".join(
            f"u32& {name} = emu::words(__LINE__, {m[1].count(',') + 1})[{i}]; "
            for i, name in enumerate(m[1].split(", "))
        ),
        kernel,
    )
    kernel, dynamic = re.subn(
        r"extern __shared__ .*? u8 shared\[\];", "u8* shared = emu::machine->current->block->shared.get();", kernel
    )
    assert (words, dynamic) == (2, 1), "shared variables of the kernel are not those that the emulator knows"
    return "\n".join(
        [
            *(f"#define {name} {value}" for name, value in program.defines.items()),
            (FOLDER / "machine.hpp").read_text(),
            "inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }",
            "inline float __fdiv_rn(float a, float b) { return a / b; }",
            "#include <cmath>",
            atoms,
            steps,
            (FOLDER / "ptx.hpp").read_text(),
            kernel,
            RUN.replace("ENTRY", f"moe_{silu}"),
        ]
    )


FLAGS = ("-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC")
"""Fortified, as some systems have it by default, longjmp from fiber to fiber would abort."""
RUN = """
extern "C" const char* emulate(const Params* p, unsigned grid, unsigned threads, unsigned shared,
                               unsigned registers, unsigned seed, unsigned long long steps,
                               unsigned early, const int* rcp, const int* ex2) {
    static std::string said;
    emu::tables = {rcp, ex2};
    const emu::Kernel entry = [](const void* q) { ENTRY(*static_cast<const Params*>(q)); };
    said = emu::run(entry, p, grid, threads, shared, registers, seed, steps, &p->status->flag, early);
    return said.c_str();
}
"""


@functools.cache
def library(text: str) -> ctypes.CDLL:
    """The compiled translation unit; kept in the cubin cache's folder by the digest of compiler, flags and text."""
    folder = build.cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [str(compiler()), *FLAGS]
    digest = hashlib.sha256("\n".join([*command, text]).encode()).hexdigest()
    path = folder / f"emulated-{digest[:32]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "emulated.so"
            (Path(scratch) / "emulated.cpp").write_text(text)
            run = subprocess.run(
                [*command, "-w", "-o", str(made), str(Path(scratch) / "emulated.cpp")], capture_output=True, text=True
            )
            if run.returncode:
                raise EmulationError(f"the kernel does not compile for the host: {run.stderr[:2000]}")
            made.replace(path)
    found = ctypes.CDLL(str(path))
    found.emulate.restype = ctypes.c_char_p
    return found


def _map(matrix: Tensor, box_rows: int) -> TensorMap:
    """What `tma_load_2d` of the emulator reads."""
    rows, columns = matrix.shape
    return TensorMap((ctypes.c_uint64 * 16)(matrix.data_ptr(), rows, columns, matrix.stride(0), box_rows))


@dataclass
class Buffers:
    """A virtual group in host memory, as `SymmBuffer` has it on a GPU."""

    size: BufferSize
    storage: Tensor
    ranks: list[RankViews]
    status: Tensor

    def rank(self, r: int) -> RankViews:
        return self.ranks[r]

    def destroy(self) -> None:
        """Nothing to give back."""


def buffers(size: BufferSize) -> Buffers:
    """All zero, as a new SymmBuffer."""
    _, each = size.offsets()
    raw = torch.zeros(size.ranks * each + ALIGNMENT, dtype=torch.uint8)
    skip = -raw.data_ptr() % ALIGNMENT
    storage = raw[skip : skip + size.ranks * each].view(size.ranks, each)
    status = torch.zeros(STATUS_WORDS, dtype=torch.int32)
    return Buffers(size, storage, [RankViews(size, part) for part in storage], status)


@dataclass(frozen=True)
class Run:
    """How a launch runs."""

    blocks: int = 2
    """Of a rank."""
    seed: int = 0
    change: Callable[[str], str] = unchanged
    """Of the kernel's text before it is compiled."""
    timeout_steps: int = MOST_STEPS
    """How long a role waits, in steps of the scheduler."""
    most_steps: int = MOST_STEPS
    """In which the launch has to end."""
    early: bool = False
    """Whether a wait for an mbarrier may return before its phase ends, as on the chip; no deadlock is seen then."""


def launch(
    own: Buffers,
    weights: Sequence[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
    ys: Sequence[Tensor],
    stats: Sequence[Tensor],
    recipe: Recipe,
    run: Run = Run(),
) -> None:
    """One launch; inputs stand in the buffers. A rank: its (w1, scales) and (w2, scales), transformed; y; statistics.

    Raises EmulationError.
    """
    packed = params.of_buffer(own.size, own.ranks, run.blocks, own.status, _map)
    packed.swiglu, packed.timeout_ns = params.swiglu_of(recipe), 1000 * run.timeout_steps
    for mine, (l1, l2), y, counts in zip(packed.rank, weights, ys, stats):  # noqa: B905  Params has room for more ranks
        params.set_weights(mine, l1, l2)
        params.set_outputs(mine, y, counts)
    rcp, ex2 = (np.ascontiguousarray(tables.load(name).numpy()) for name in tables.NAMES)
    said = library(source(recipe.activation_granularity, run.change, recipe.silu)).emulate(
        ctypes.byref(packed),
        *map(ctypes.c_uint, (run.blocks * own.size.ranks, THREADS, shared_bytes(), LAUNCH_REGISTERS, run.seed)),
        ctypes.c_ulonglong(run.most_steps),
        ctypes.c_uint(run.early),
        *(table.ctypes.data_as(ctypes.c_void_p) for table in (rcp, ex2)),
    )
    if said:
        raise EmulationError(f"seed {run.seed}: {said.decode()}")
    if in_vain := waited(own.status):
        raise EmulationError(f"seed {run.seed}: {in_vain}")
