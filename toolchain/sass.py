"""What ptxas does not report of a cubin, read from its SASS: tensor-core and local-memory instructions, setmaxnreg,
and loops through the lanes of a warp.

The disassembler comes from PyPI (nvidia-cuda-nvdisasm) and is no part of what the kernel needs to run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from megaproof.kernel.host.sizes import SHARED_LIMIT, THREADS
from megaproof.toolchain.build import BuildError, Entry, EnvironmentMissing

PACKAGE = "nvidia-cuda-nvdisasm"
THREADS_BY_ROLE = {"producer": 128, "math": THREADS - 128}
"""Of a kernel with roles: one warpgroup gives registers away, the others take them."""
REGISTER_FILE = 65536
"""Registers of an SM."""

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^\s,]+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?\w+\s+)?([A-Z]\w*)(\S*)([^;]*);", re.MULTILINE)


@dataclass(frozen=True)
class Figures:
    """One kernel with the functions it calls: QGMMA and local-memory instructions, and values of setmaxnreg.

    by_lane: loops that go through the lanes of a warp, which the compiler puts around an instruction of uniform
    operands, such as a bulk copy, where it does not see that one lane is alone.
    """

    qgmma: int
    local: int
    lowered: tuple[int, ...]
    raised: tuple[int, ...]
    by_lane: int = 0

    def registers_by_role(self) -> dict[str, int]:
        """Registers a thread of each role; empty for a kernel without setmaxnreg."""
        return dict(zip(THREADS_BY_ROLE, self.lowered[:1] + self.raised[-1:], strict=False))


@cache
def disassembler() -> tuple[Path, str]:
    """(nvdisasm's path, version), as its package installed it. Raises EnvironmentMissing."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise EnvironmentMissing(f"nvdisasm missing: install {PACKAGE}") from error
    for file in package.files or ():
        if file.name == "nvdisasm":
            return Path(package.locate_file(file)), package.version
    raise EnvironmentMissing(f"nvdisasm missing: {PACKAGE} {package.version} does not hold it")


def disassemble(cubin: bytes) -> dict[str, Figures]:
    """Figures of each kernel of a cubin. Raises EnvironmentMissing, BuildError."""
    program, _ = disassembler()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            run = subprocess.run([program, "-c", file.name], capture_output=True, text=True)
        except OSError as error:
            raise EnvironmentMissing(f"nvdisasm missing: it cannot be started ({error.strerror})") from error
    if run.returncode:
        raise BuildError(f"nvdisasm: {run.stderr.strip()[:200]}")
    return parse(run.stdout)


def parse(text: str) -> dict[str, Figures]:
    """nvdisasm's text -> figures of each kernel. A kernel without an instruction counts as a fault of the text."""
    figures = {}
    _, *parts = _SECTION.split(text)
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        code = [match.groups() for match in _INSTRUCTION.finditer(body)]
        if not code:
            raise BuildError(f"the SASS of {name} cannot be read")
        values: dict[bool, set[int]] = {False: set(), True: set()}
        for opcode, suffix, operands in code:
            if opcode == "USETMAXREG":
                values[".TRY_ALLOC" in suffix].add(int(operands.split(",")[-1], 0))
        count = [opcode for opcode, _, _ in code].count
        lowered, raised = (tuple(sorted(values[up])) for up in (False, True))
        by_lane = sum(suffix.endswith(".U.ANY") for opcode, suffix, _ in code if opcode == "BRA")
        figures[name] = Figures(count("QGMMA"), count("LDL") + count("STL"), lowered, raised, by_lane)
    return figures


def faults(
    name: str, entry: Entry, figures: Figures, gemm: bool, roles: bool, shared: int | None, static: int | None = None
) -> list[str]:
    """What the gate refuses in a kernel, as sentences.

    gemm: whether it multiplies on the tensor core, and must; roles: whether its warpgroups share out registers;
    shared: bytes of dynamic shared memory, None where the problem decides; static: of what stands beside it, None: any.
    """
    found = []
    if bool(figures.qgmma) != gemm:
        found.append(f"{figures.qgmma} QGMMA instructions, and {'some are' if gemm else 'none is'} expected")
    if figures.local:
        found.append(f"{figures.local} instructions on local memory")
    if figures.by_lane:
        found.append(f"{figures.by_lane} loops through the lanes of a warp: let ptx::elect_one choose who copies")
    # Behind its roles a kernel may give all threads back what it was launched with.
    if any(len(set(values) - {entry.registers}) != roles for values in (figures.lowered, figures.raised)):
        found.append(
            f"setmaxnreg to {[*figures.lowered, *figures.raised]}: {'two values' if roles else 'none'} expected"
        )
    elif roles:
        # A raise waits until the block's own registers suffice: those it was launched with, not those of the SM.
        held = min(entry.registers * THREADS, REGISTER_FILE)
        by_role = figures.registers_by_role()
        total = sum(by_role[role] * threads for role, threads in THREADS_BY_ROLE.items())
        if total > held:
            sums = " + ".join(f"{threads} x {by_role[role]}" for role, threads in THREADS_BY_ROLE.items())
            found.append(
                f"the roles ask for {sums} = {total} registers; a block is launched with {held} and would hang"
            )
    if static is not None and entry.shared != static:
        found.append(f"{entry.shared} bytes of static shared memory, {static} expected")
    if shared is not None and shared + entry.shared > SHARED_LIMIT:
        found.append(f"{shared} bytes of dynamic shared memory and {entry.shared} of static, {SHARED_LIMIT} at most")
    return [f"{name}: {fault}" for fault in found]
