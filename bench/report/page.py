"""`python -m bench report`: docs/results.md, written from bench/results/<chip>/*.json and never by hand."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from megaproof import HOME
from megaproof.bench.report import plot
from megaproof.bench.report.results import ReportError, Results, chosen, read_all
from megaproof.bench.report.sections import PICTURE, render_all
from megaproof.toolchain import files
from megaproof.toolchain.errors import EnvironmentMissing

PAGE, RESULTS = HOME / "docs" / "results.md", HOME / "bench" / "results"
SOURCE = "bench/results/*/*.json"
START, END = "<!-- results -->", "<!-- /results -->"


def section(page: str) -> tuple[str, str, str]:
    """(up to the first marker, between the markers, from the second one on). Raises ReportError."""
    for marker in (START, END):
        if page.count(marker) != 1:
            times = page.count(marker)
            raise ReportError(f"docs/results.md must have the marker {marker} once and has it {times} times")
    before, _, rest = page.partition(START)
    between, found, after = rest.partition(END)
    if not found:
        raise ReportError(f"docs/results.md must have the marker {END} after {START}")
    return f"{before}{START}\n", between.strip("\n"), f"\n{END}{after}"


def stamp(results: Results) -> str:
    """The picture's last line: which rows it shows, so that a stale one is known without drawing it."""
    rows = json.dumps(results["sweep"]["rows"], sort_keys=True).encode()
    return f"<!-- rows of sweep.json, sha256 {hashlib.sha256(rows).hexdigest()} -->\n"


def drawn(results: Results, picture: Path) -> bool:
    """Whether the picture is of these results."""
    return picture.is_file() and picture.read_text().endswith(stamp(results))


def draw(results: Results, picture: Path) -> None:
    """Raises EnvironmentMissing without matplotlib."""
    plot.check(picture)
    plot.plot({**results["sweep"], "rows": chosen(results, "sweep")}, picture)
    lines = [line.rstrip() for line in picture.read_text().splitlines()]
    picture.write_text("\n".join(lines) + "\n" + stamp(results))


def report_command(
    check: Annotated[
        bool, typer.Option("--check", help="Writes nothing; status 1 if the page or its picture is stale.")
    ] = False,
) -> None:
    """Writes docs/results.md, and each picture that is stale, from bench/results/<chip>/*.json; needs no GPU.

    Exit status: 0 done, 1 stale (--check), a file or marker missing or damaged, 2 usage, 3 environment: no matplotlib
    for a picture that has to be drawn, and nothing is written.
    """
    try:
        if not PAGE.is_file():
            raise ReportError("docs/results.md is missing")
        found = read_all(RESULTS)
        before, between, after = section(PAGE.read_text())
        text = render_all(found)
        stale = [] if between == text else ["docs/results.md"]
        pictures = {chip: RESULTS / chip.folder / PICTURE for chip in found}
        undrawn = [chip for chip in found if not drawn(found[chip], pictures[chip])]
        stale += [f"bench/results/{chip.folder}/{PICTURE}" for chip in undrawn]
        if check and stale:
            raise ReportError(f"not of {SOURCE}: {', '.join(stale)}; python -m bench report renews them")
        for chip in undrawn:
            draw(found[chip], pictures[chip])
        if between != text:
            files.replace(PAGE, (before + text + after).encode())
    except ReportError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    except EnvironmentMissing as error:
        print(f"environment: {error}", file=sys.stderr)
        raise typer.Exit(3) from error
    print(f"written: {', '.join(stale)}" if stale else f"docs/results.md and its pictures are of {SOURCE}")
