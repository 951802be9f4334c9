"""What ptxas does not report of a cubin, read from its SASS: tensor-core and local-memory instructions, setmaxnreg,
and loops through the lanes of a warp.

The disassembler comes from PyPI (nvidia-cuda-nvdisasm) and is no part of what the kernel needs to run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from megaproof.toolchain.errors import BuildError, EnvironmentMissing

PACKAGE = "nvidia-cuda-nvdisasm"

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

    def registers_by_role(self, roles: Iterable[str]) -> dict[str, int]:
        """Registers a thread of each of `roles`, see `Program.roles`; empty for a kernel without setmaxnreg."""
        return dict(zip(roles, self.lowered[:1] + self.raised[-1:], strict=False))


@cache
def disassembler() -> tuple[Path, str]:
    """(nvdisasm's path, version), as its package installed it. Raises EnvironmentMissing."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise EnvironmentMissing(f"nvdisasm missing: install {PACKAGE}") from error
    for file in package.files or ():
        if file.name == "nvdisasm":
            return Path(str(package.locate_file(file))), package.version
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
