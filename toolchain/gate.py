"""What a cubin has to pass before it may be launched: ptxas' report everywhere, its SASS where a disassembler is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaproof.toolchain import sass
from megaproof.toolchain.errors import BuildError

if TYPE_CHECKING:
    from megaproof.toolchain.build import Built, Entry
    from megaproof.toolchain.program import Program

REGISTER_FILE = 65536
"""Registers of an SM of Hopper."""
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a block may have on Hopper, static and dynamic together."""


def check_report(built: Built) -> None:
    """Raises BuildError naming every kernel with a spill or a stack frame, and every C75xx message."""
    faults = list(built.report.messages)
    for name, entry in built.report.entries.items():
        if entry.stack or entry.spill_stores or entry.spill_loads:
            spills = f"{entry.spill_stores} bytes of spill stores, {entry.spill_loads} of spill loads"
            faults.append(f"{name}: {entry.stack} bytes of stack, {spills}")
    if not built.report.entries:
        faults.append("the cubin holds no kernel")
    refuse(faults)


def refuse(faults: list[str]) -> None:
    """Raises BuildError that names the faults, if there is one."""
    if faults:
        raise BuildError("compile gate: " + "; ".join(faults))


def sass_faults(program: Program, name: str, entry: Entry, figures: sass.Figures) -> list[str]:
    """What the gate refuses in the kernel `name` of a program, as sentences. entry: what ptxas reports of it."""
    found = []
    gemm, roles = name.startswith(program.gemm), bool(program.roles)
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
        held = min(entry.registers * sum(program.roles.values()), REGISTER_FILE)
        by_role = figures.registers_by_role(program.roles)
        total = sum(by_role[role] * threads for role, threads in program.roles.items())
        if total > held:
            sums = " + ".join(f"{threads} x {by_role[role]}" for role, threads in program.roles.items())
            found.append(
                f"the roles ask for {sums} = {total} registers; a block is launched with {held} and would hang"
            )
    if program.static is not None and entry.shared != program.static:
        found.append(f"{entry.shared} bytes of static shared memory, {program.static} expected")
    if program.shared is not None and program.shared + entry.shared > SHARED_LIMIT:
        sizes = f"{program.shared} bytes of dynamic shared memory and {entry.shared} of static"
        found.append(f"{sizes}, {SHARED_LIMIT} at most")
    return [f"{name}: {fault}" for fault in found]
