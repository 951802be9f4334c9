"""`python -m proof wrong | sanitize | emulate | delays | gloo | report | ended`: proofs run by hand, and runs shown."""

from __future__ import annotations

import typer

from megaproof.proof.emulated import emulate_command
from megaproof.proof.faults.adapters import wrong_command
from megaproof.proof.faults.delays import delays_command
from megaproof.proof.report.command import ended_command, report_command
from megaproof.proof.sanitize import sanitize_command
from megaproof.proof.worlds.command import gloo_command
from megaproof.toolchain import optimized, signals

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("wrong")(wrong_command)
app.command("sanitize")(sanitize_command)
app.command("emulate")(emulate_command)
app.command("delays")(delays_command)
app.command("gloo")(gloo_command)
app.command("report")(report_command)
app.command("ended")(ended_command)


@app.callback()
def commands() -> None:
    """Proofs that are run by hand. The gate itself is `pytest -k dsv4_flash --ranks 8`.

    Exit status: 0 proven, 1 differs, 2 usage, 3 environment, 5 nothing was compared.
    """
    optimized.refuse()


if __name__ == "__main__":
    signals.exit_on_sigterm()
    app()
