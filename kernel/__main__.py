"""`python -m kernel build`: compiles every CUDA target of the project on any machine, and gates it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from megaproof import moved
from megaproof.kernel.programs import PINS, PROGRAMS
from megaproof.toolchain import gate, sass, signals
from megaproof.toolchain.build import Built
from megaproof.toolchain.errors import BuildError, EnvironmentMissing
from megaproof.toolchain.program import Program

SMS = {"H200": 132, "H20": 78}
"""SMs of the chips that every configuration is for: nothing in it depends on the chip."""
UNCHECKED = "not checked"
"""How the word on SASS begins where there is no disassembler."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def commands() -> None:
    """The machine: CUDA sources, compiled and gated without a GPU.

    Exit status: 0 passed, 1 the gate fails, 2 usage, 3 environment.
    """


def examine(program: Program, built: Built) -> tuple[list[dict[str, Any]], list[str]]:
    """(the kernels of a compiled program as JSON, what the gate refuses in them); SASS where nvdisasm is."""
    try:
        figures = sass.disassemble(built.cubin)
    except EnvironmentMissing:
        figures = None
    rows, faults = [], []
    for entry, report in built.report.entries.items():
        row: dict[str, Any] = {"target": program.name, "entry": entry}
        row |= {**asdict(report), "shared_dynamic": program.shared}
        row |= {"registers_by_role": None, "threads_by_role": None, "qgmma": None}
        if figures is not None:
            found = figures[entry]
            if program.gated:
                faults += gate.sass_faults(program, entry, report, found)
            row |= {"registers_by_role": found.registers_by_role(program.roles) or None, "qgmma": found.qgmma}
            row["threads_by_role"] = dict(program.roles) or None
        rows.append(row | {"chips": SMS, "sha256": built.sha256, "nvrtc": built.nvrtc})
    return rows, faults


@app.command("build")
def build_command(
    targets: Annotated[list[str] | None, typer.Argument(help=f"Targets: {', '.join(PROGRAMS)}.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every target.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    pin: Annotated[bool, typer.Option("--pin", help="With --all: writes the digests to cubins.json.")] = False,
) -> None:
    """Compiles targets to sm_90a cubins and gates them.

    Refused: a spill, stack, a C75xx message, local memory, roles with more registers than a block has,
    other shared memory than the sources declare or more than there is, no QGMMA where a GEMM is. The build with marks,
    `phases`, is pinned and not gated: it is measured and never shipped.

    Exit status: 0 passed, 1 refused, 2 usage, 3 environment, also where SASS could not be checked.
    """
    names = list(PROGRAMS) if every else targets or []
    unknown = [name for name in names if name not in PROGRAMS]
    if unknown or not names:
        raise typer.BadParameter(f"{', '.join(unknown) or 'no target'}: name one of {', '.join(PROGRAMS)}, or --all")
    if pin and not every:
        raise typer.BadParameter("--pin goes with --all: all digests are of the same sources")
    try:
        checked = f"nvdisasm {sass.disassembler()[1]}"
    except EnvironmentMissing as error:
        if pin:
            print(f"environment: only what passed the whole gate is pinned; {error}", file=sys.stderr)
            raise typer.Exit(3) from error
        checked = f"{UNCHECKED}: {error}"
    pins: dict[str, dict[str, Any]] = {}
    configurations: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name in names:
        try:
            built = PROGRAMS[name].compile(cache=not pin)
            rows, faults = examine(PROGRAMS[name], built)
            configurations += rows
            gate.refuse(faults)
        except EnvironmentMissing as error:
            print(f"environment: {error}", file=sys.stderr)
            raise typer.Exit(3) from error
        except BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed[name] = str(error)
            continue
        pins[name] = built.pin()
        if not as_json:
            verdict = "gate passed" if PROGRAMS[name].gated else "not gated"
            print(f"{name}: cubin {built.sha256[:16]}, {len(built.cubin)} bytes, NVRTC {built.nvrtc}, {verdict}")
            for row in rows:
                print(_line(row))
    if pin and not failed:
        try:
            PINS.write(pins)
        except BuildError as error:
            failed["pin"] = str(error)
            print(f"pin: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"sass": checked, "configurations": configurations, "failed": failed}, indent=2))
    else:
        print(f"SASS: {checked}")
    raise typer.Exit(1 if failed else 3 if checked.startswith(UNCHECKED) else 0)


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['registers']:3} registers"]
    if roles := row["registers_by_role"]:
        parts[0] += f" ({', '.join(f'{role} {count}' for role, count in roles.items())})"
    parts += [f"{row['stack']} stack", f"{row['spill_stores'] + row['spill_loads']} spills"]
    parts += [f"{row['shared_dynamic']} bytes shared"] if row["shared_dynamic"] is not None else []
    parts += [f"{row['qgmma']} QGMMA"] if row["qgmma"] else []
    return f"  {row['entry']:20} {', '.join(parts)}"


if __name__ == "__main__":
    moved.refuse_old_command("kernel")
    signals.exit_on_sigterm()
    app()
