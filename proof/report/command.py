"""`python -m proof report reports/run.json`: what a run came to, from its record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaproof.proof import record
from megaproof.proof.report import html, text


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
