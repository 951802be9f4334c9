"""`python -m bench sweep | dense | phases | floor | report | twins`: how fast the kernel is, and beside what."""

from __future__ import annotations

import typer

from megaproof.bench.command import sweep_command
from megaproof.bench.measure.main_loop import dense_command
from megaproof.bench.measure.phases import phases_command
from megaproof.bench.measure.twins import twins_command
from megaproof.bench.model.floor import floor_command
from megaproof.bench.report.page import report_command
from megaproof.toolchain import signals

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("sweep")(sweep_command)
app.command("dense")(dense_command)
app.command("phases")(phases_command)
app.command("floor")(floor_command)
app.command("report")(report_command)
app.command("twins")(twins_command)


@app.callback()
def commands() -> None:
    """Kernel time of the fused layer, beside floors, plain kernels and other people's kernels.

    Exit status: 0 done, 1 slower than a comparison allows or a stale page, 2 usage, 3 environment.
    """


if __name__ == "__main__":
    signals.exit_on_sigterm()
    app()
