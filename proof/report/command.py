"""`python -m proof report reports/run.json`: what a run came to, from its record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaproof.proof import record, report
from megaproof.proof.report import html, text


def ended_command(
    nonce: Annotated[str, typer.Argument(help="what the run was given as --nonce")],
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN.JSON", help="default: the record where runs leave it")
    ] = None,
) -> None:
    """Says whether the run that was given this nonce has ended green, with every selected test in its record.

    Exit status: 0 it has, 1 it has not, or left no record.
    """
    path = run or report.folder() / record.NAME
    try:
        problem = record.missing(record.read(path), nonce)
    except record.RecordError as error:
        problem = str(error)
    if problem:
        print(f"not green: {path}: {problem}")
        raise typer.Exit(1)


def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN.JSON", help="the record that a run of pytest left")],
    page: Annotated[Path | None, typer.Option("--html", help="Write one page of HTML here as well.")] = None,
) -> None:
    """Shows a run again: what it was, its verdicts, skips by reason, what was compared, how to repeat its failures.

    Exit status: 0 shown, 2 the file is no record.
    """
    try:
        found = record.read(run)
    except record.RecordError as error:
        raise typer.BadParameter(str(error), param_hint="RUN.JSON") from None
    for title, lines in text.whole(found):
        print(f"--- {title}")
        print("\n".join(lines))
    if page:
        page.write_text(html.page(found), encoding="utf-8")
        print(f"--- page\n{page}")
