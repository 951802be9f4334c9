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
import os
import shutil
import subprocess
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
from megaproof.toolchain import build, cache, files
from megaproof.toolchain.errors import EnvironmentMissing
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
    """The compiled text, linked to the machine; kept in the cache 'emulator' under the digest of all that made it.

    Without a usable cache it is compiled once a process. Raises EmulationError if the text does not compile,
    EnvironmentMissing where nothing can be compiled.
    """
    machine = {name: _text(name) for name in ("ptx.hpp", "machine.cpp")}
    command = [_require_compiler(), *FLAGS, *KERNEL_FLAGS]
    name = f"emulated-{_digest(compiler_version(), *command, *MACHINE_FLAGS, *machine.values(), text)}.so"

    def make(target: Path) -> None:
        header, machine_object = _machine()
        source_path = target.with_suffix(".cpp")
        source_path.write_text(text)
        try:
            parts: list[str | Path] = ["-include", header, source_path, machine_object]
            _compile([*command, "-shared", "-o", target, *parts], "the kernel")
        finally:
            source_path.unlink(missing_ok=True)

    found = ctypes.CDLL(str(_kept(name, make)))
    found.emulate.restype = ctypes.c_char_p
    return found


@functools.cache
def _machine() -> tuple[Path, Path]:
    """(the machine's header, which the compiler has read ahead in the file beside it: .gch or .pch; its object file).

    The parts are remembered here and in the cache: a process that compiles kernels reads the header once.
    """
    command = [_require_compiler(), *FLAGS]
    header, code = _text("ptx.hpp"), _text("machine.cpp")
    name = f"machine-{_digest(compiler_version(), *command, *KERNEL_FLAGS, *MACHINE_FLAGS, header, code)}"
    ahead = "gch" if Path(command[0]).name == "g++" else "pch"

    def read_ahead(target: Path) -> None:
        # A compiler compares the header that it has read ahead with the text of that name.
        _compile(
            [*command, *KERNEL_FLAGS, "-x", "c++-header", "-o", target, _beside(f"{name}.hpp", header)], "the machine"
        )

    def compiled(target: Path) -> None:
        _compile([*command, *MACHINE_FLAGS, "-c", "-o", target, _beside(f"{name}.cpp", code)], "the machine")

    made = _kept(f"{name}.hpp.{ahead}", read_ahead)
    here = _beside(f"{name}.hpp", header)
    if made.parent != here.parent:
        _link(made, here.with_name(made.name))
    return here, _kept(f"{name}.o", compiled)


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """A file from the cache, or made in this process' own folder and put into the cache for the next one."""
    place = cache.of("emulator")
    if found := place.path(name):
        return found
    path = files.scratch() / name
    if not path.exists():
        unfinished = path.with_name(f"{os.getpid()}-{name}")  # a forked process has the same folder
        try:
            make(unfinished)
            unfinished.replace(path)
            place.write(name, path.read_bytes())
        except OSError as error:
            raise EnvironmentMissing(f"the emulator cannot compile in {path.parent}: {error.strerror}") from error
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def _beside(name: str, text: str) -> Path:
    """A text as a file of this process' own folder."""
    path = files.scratch() / name
    if not path.exists():
        files.replace(path, text.encode())
    return path


def _link(target: Path, path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.symlink_to(target)


@functools.cache
def compiler_version() -> str:
    """What the compiler says of itself: another one reads no headers that this one has read ahead."""
    return subprocess.run([_require_compiler(), "--version"], capture_output=True, text=True).stdout


def _require_compiler() -> str:
    """Raises EnvironmentMissing."""
    if (found := compiler()) is None:
        raise EnvironmentMissing("no C++ compiler is on PATH: the emulator needs g++ or clang++")
    return found


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compile(command: list[str | Path], what: str) -> None:
    """Raises EmulationError with what the compiler says, EnvironmentMissing where it has no room to write."""
    run = subprocess.run(command, capture_output=True, text=True)
    if "No space left on device" in run.stderr:
        raise EnvironmentMissing(f"{what} cannot be compiled: no space is left in {files.scratch()}")
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
