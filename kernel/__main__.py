"""`python -m kernel build`: compiles every CUDA target of the project on any machine, and gates it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer

from kernel import api, dense, grouped, probe
from kernel.build import BuildError, Built, EnvironmentMissing
from quant import twin_gpu

TARGETS: dict[str, Callable[[], Built]] = {
    "probes": probe.compile_probes,
    "twin": twin_gpu.compile_twin,
    "dense": dense.compile_dense,
    "grouped": grouped.compile_grouped,
    "moe": api.compile_moe,
}

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def commands() -> None:
    """The machine: CUDA sources, compiled and gated without a GPU.

    Exit status: 0 passed, 1 the gate fails, 2 usage, 3 environment.
    """


@app.command("build")
def build_command(
    targets: Annotated[list[str] | None, typer.Argument(help=f"Targets: {', '.join(TARGETS)}.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every target.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Compiles targets to sm_90a cubins and gates them: no spill, no stack, no C75xx message."""
    names = list(TARGETS) if every else targets or []
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise typer.BadParameter(f"{', '.join(unknown) or 'no target'}: name one of {', '.join(TARGETS)}, or --all")
    results, status = {}, 0
    for name in names:
        try:
            built = TARGETS[name]()
        except EnvironmentMissing as error:
            print(f"environment: {error}", file=sys.stderr)
            raise typer.Exit(3) from error
        except BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            results[name], status = {"error": str(error)}, 1
            continue
        entries = {entry: asdict(figures) for entry, figures in built.report.entries.items()}
        results[name] = {"sha256": built.sha256, "nvrtc": built.nvrtc, "entries": entries}
        if not as_json:
            print(f"{name}: cubin {built.sha256[:16]}, {len(built.cubin)} bytes, NVRTC {built.nvrtc}, gate passed")
            for entry, figures in built.report.entries.items():
                spills = figures.spill_stores + figures.spill_loads
                print(f"  {entry:20} {figures.registers:3} registers, {figures.stack} stack, {spills} spills")
    if as_json:
        print(json.dumps(results, indent=2))
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
