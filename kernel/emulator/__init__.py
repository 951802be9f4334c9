"""Runs the fused kernel's own sources on a CPU: they are compiled for the host, and every CUDA thread is a fiber.

machine.hpp schedules the fibers, cuda.hpp has what CUDA C++ has built in, and ptx.hpp takes the place of ptx.cuh. Every
other line of the kernel is what ships. A run is decided by its seed: which thread goes on, and when a copy lands.
Shapes have to be small, since every wait of a thread costs about a microsecond of the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
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
from megaproof.toolchain import build, files
from megaproof.toolchain.launch import TensorMap

FOLDER = Path(__file__).parent
LAUNCH_REGISTERS = 168
"""Registers of a thread at launch, as `kernel build` reports them. They make the pool that setmaxnreg shares out."""
MOST_STEPS = 50_000_000
"""Steps of the emulator's scheduler in which a launch has to end; small layers take about a million."""


class EmulationError(AssertionError):
    """A run that failed: a deadlock, other collectives than expected, a role that gave up, no compilation."""


def compiler() -> str | None:
    """The path of a C++ compiler of the host, or None."""
    return shutil.which("g++") or shutil.which("clang++")


def unchanged(text: str) -> str:
    """Returns the text as it is: the kernel that ships."""
    return text


def source(granularity: int = 64, change: Callable[[str], str] = unchanged, silu: str = "fast") -> str:
    """The C++ text of one kernel of moe_sm90.cu on the emulated machine.

    granularity: 64 or 128, the columns of L2 activations that share a scale. change: applied to the kernel's text.
    silu: 'fast' or 'precise', which of the two kernels runs.
    """
    program = moe(granularity).edited(change)
    macros = {**program.defines, "ENTRY": f"moe_{silu}"}
    kernel = program.text(without=[HOME / "kernel" / "ptx.cuh"])
    return "".join([*(f"#define {name} {value}\n" for name, value in macros.items()), kernel, _text("entry.hpp")])


def _text(name: str) -> str:
    """The text of a file of this folder, its includes in their places."""
    return build.joined([FOLDER / name])


FLAGS = ("-std=c++20", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-w")
"""_FORTIFY_SOURCE, which some systems set by default, would make longjmp from fiber to fiber abort."""
KERNEL_FLAGS, MACHINE_FLAGS = ("-O0",), ("-O3",)
"""A kernel is compiled often and the machine, which has what takes time in a run, once."""


@functools.cache
def library(text: str) -> ctypes.CDLL:
    """The compiled text, linked to the machine. It is cached beside the cubins under the digest of all that made it.

    Raises EmulationError if the text does not compile.
    """
    folder = _cache_folder()
    machine = _machine(folder)
    command = [str(compiler()), *FLAGS, *KERNEL_FLAGS]
    path = folder / f"emulated-{_digest(machine.name, *command, text)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made, source_path = Path(scratch) / "emulated.so", Path(scratch) / "emulated.cpp"
            source_path.write_text(text)
            parts: list[str | Path] = ["-include", machine / "machine.hpp", source_path, machine / "machine.o"]
            _compile([*command, "-shared", "-o", made, *parts], "the kernel")
            made.replace(path)
    found = ctypes.CDLL(str(path))
    found.emulate.restype = ctypes.c_char_p
    return found


@functools.cache
def _machine(folder: Path) -> Path:
    """A folder with machine.o and machine.hpp, which the compiler has read ahead (machine.hpp.gch or .pch)."""
    command = [str(compiler()), *FLAGS]
    texts = {"machine.hpp": _text("ptx.hpp"), "machine.cpp": _text("machine.cpp")}
    path = folder / f"machine-{_digest(*command, *KERNEL_FLAGS, *MACHINE_FLAGS, *texts.values())}"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "machine"
        made.mkdir()
        for name, text in texts.items():
            (made / name).write_text(text)
        suffix = "gch" if Path(command[0]).name == "g++" else "pch"
        ahead: list[str | Path] = ["-x", "c++-header", "-o", made / f"machine.hpp.{suffix}", made / "machine.hpp"]
        _compile([*command, *KERNEL_FLAGS, *ahead], "the machine")
        _compile([*command, *MACHINE_FLAGS, "-c", "-o", made / "machine.o", made / "machine.cpp"], "the machine")
        with contextlib.suppress(OSError):  # another process was first: what it made is the same
            made.rename(path)
    return path


def _cache_folder() -> Path:
    return build.cache_folder().folder or files.scratch()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compile(command: list[str | Path], what: str) -> None:
    """Raises EmulationError with what the compiler says."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise EmulationError(f"{what} does not compile for the host: {run.stderr[:2000]}")


def _map(matrix: Tensor, box_rows: int) -> TensorMap:
    """The tensor map that `tma_load_2d` of ptx.hpp reads."""
    rows, columns = matrix.shape
    return TensorMap((ctypes.c_uint64 * 16)(matrix.data_ptr(), rows, columns, matrix.stride(0), box_rows))


@dataclass
class Buffers:
    """The buffers of a virtual group in host memory: what `SymmBuffer` is on a GPU."""

    size: BufferSize
    storage: Tensor
    ranks: list[RankViews]
    status: Tensor

    def rank(self, r: int) -> RankViews:
        return self.ranks[r]

    def destroy(self) -> None:
        """Does nothing: the memory is torch's."""


def buffers(size: BufferSize) -> Buffers:
    """New buffers; all bytes are zero, as those of a new SymmBuffer."""
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
    """Thread blocks of a rank."""
    seed: int = 0
    """Decides the interleaving."""
    change: Callable[[str], str] = unchanged
    """What is done to the kernel's text before it is compiled."""
    timeout_steps: int = MOST_STEPS
    """How many steps of the scheduler a role waits before it gives up."""
    most_steps: int = MOST_STEPS
    """How many steps the launch may take."""
    early: bool = False
    """Whether waits for an mbarrier may return before its phase has ended, as on the chip; this hides deadlocks."""


def launch(
    own: Buffers,
    weights: Sequence[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
    ys: Sequence[Tensor],
    stats: Sequence[Tensor],
    recipe: Recipe,
    run: Run = Run(),
) -> None:
    """Runs one launch of the kernel; the buffers hold its inputs.

    weights: for each rank its transformed ((w1, scales), (w2, scales)). ys: bfloat16 [T_r, H], written. stats: int32
    [E_loc], added to. Raises EmulationError.
    """
    packed = params.of_buffer(own.size, own.ranks, run.blocks, own.status, _map)
    packed.swiglu, packed.barrier.timeout_ns = params.swiglu_of(recipe), 1000 * run.timeout_steps
    for mine, (l1, l2), y, counts in zip(packed.ranks, weights, ys, stats):  # noqa: B905  Params has room for more ranks
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
