"""`python -m kernel report`: the README's results, written from kernel/results/*.json and never by hand."""

from __future__ import annotations

import hashlib
import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from golden import atomic
from kernel import floor
from kernel.bench import plot
from kernel.bench.results import POINTS, ReportError, Results, chosen, read
from kernel.bench.rows import Row
from kernel.bench.targets import TARGETS, verdict
from kernel.build import FOLDER, EnvironmentMissing
from kernel.roofline import CHIPS
from quant.recipe import SHAPES

README, RESULTS = FOLDER.parent / "README.md", FOLDER / "results"
START, END = "<!-- results -->", "<!-- /results -->"
PICTURE = "sweep.svg"
TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192)
"""Columns of a table; the targets look at every T that was measured."""
OPEN = ("dsv4_flash", "dsv4_pro")
"""Presets whose table is not folded away."""
BINDS = {"share_read": (1, 512), "share_compute": (512, 8192)}
"""Column -> least and largest T at which it says something: the other one limits elsewhere."""
LINES = (
    ("us", "sweep", "us"),
    ("TFLOP/s", "sweep", "tflops"),
    ("GB/s", "sweep", "hbm_gb_s"),
    ("of the floor", "sweep", "share_floor"),
    ("of the plain read", "sweep", "share_read"),
    ("of our dense GEMMs", "sweep", "share_compute"),
    ("of the best", "sweep", "ratio_best"),
    ("distinct routing, us", "distinct", "us"),
    ("distinct routing, of the best", "distinct", "ratio_best"),
    ("sustained, us", "sustained", "us"),
    ("scales per 128, us", "granularity_128", "us"),
    ("scales per 128, of the best", "granularity_128", "ratio_best"),
)
"""(line of a preset's table, result, column)."""
UNMEASURED = "H20 by model, not measured: floor, us"
NOTHING = "No time of the kernel is quoted here: none was measured with the present sources."
LEGEND = """\
Routing is folded unless a line says distinct: top-K of all ranks' experts, modulo this rank's, which touches a few per
cent fewer experts than K distinct ones. Sustained: back to back, L2 not flushed. Shares are a time over ours, so that 1
is as fast: of the model's floor; of a plain read of as many bytes (shown up to T = 512) and of our dense GEMMs of M =
T*K rows, N and K of the layer (from 512), both in turn with the kernel. Of the best: our time over that of the faster
one of PR 323 and PR 383, below 1 is faster; their times, of other runs, and where they are from stand in
kernel/peers_h200.json (PR 383 accumulates in BF16 at most sizes). TFLOP/s count useful work, no padding. Blank: not
measured."""
DENSE = """\
The main loop alone (`python -m kernel dense`), TFLOP/s by CUDA events; ours with float32 output, cuBLASLt with one
scale a tensor and BF16 output:"""
MISSES = "Targets, at every T that was measured. Of misses: how many, the worst one, and each T."


def render(results: Results) -> str:
    """The section as Markdown, without its markers."""
    if not results:
        return NOTHING
    rows = {name: chosen(results, name) for name in POINTS}
    parts = [_paragraph(_provenance(results)), _paragraph(LEGEND)]
    for preset in dict.fromkeys(row["preset"] for row in rows["sweep"]):
        table = _preset(rows, preset)
        folded = f"<details>\n<summary>{preset}</summary>\n\n{table}\n\n</details>"
        parts.append(table if preset in OPEN else folded)
    parts.append(f"![Time and share of the floor against T, beside the public kernels](kernel/results/{PICTURE})")
    if "dense" in results:
        parts += [_paragraph(DENSE), _dense(results["dense"]["rows"])]
    return "\n\n".join([*parts, _paragraph(MISSES), _targets(rows)])


def _provenance(results: Results) -> str:
    sweep = results["sweep"]
    dates = " and ".join(sorted({result["date"] for result in results.values()}))
    what = sweep["what"].partition(", us_spread")[0]
    flushed = sweep["regime"].replace("l2", "L2")
    return f"**Time.** {sweep['device']}, driver {sweep['driver']}, {dates}: {what}; {sweep['method']}; {flushed}."


def _preset(rows: Mapping[str, list[Row]], preset: str) -> str:
    lines = []
    for label, name, column in LINES:
        first, last = BINDS.get(column, (1, max(TOKENS)))
        own = [row for row in rows[name] if row["preset"] == preset and first <= row["T"] <= last]
        points = {row["T"]: row[column] for row in own}
        cells = [_cell(column, points.get(tokens)) for tokens in TOKENS]
        lines += [[label, *cells]] if any(cells) else []
    lines += [[UNMEASURED, *_floors(preset)]] if preset in SHAPES else []
    return _table([f"{preset}, T", *map(str, TOKENS)], lines, "---:")


def _floors(preset: str) -> list[str]:
    """What nothing goes below on an H20, us."""
    rows = [floor.row(CHIPS["H20"], SHAPES[preset], tokens, "folded", 0) for tokens in TOKENS]
    return [_cell("us", row["floor_us"]) for row in rows]


def _dense(rows: list[Row]) -> str:
    sizes: dict[tuple[int, int, int], dict[int | str, int]] = {}
    for row in rows:
        own = sizes.setdefault((row["m"], row["n"], row["k"]), {})
        own |= {row["group"]: row["tflops"], "cublaslt": row["cublaslt_tflops"]}
    lines = [
        [" x ".join(map(str, size)), *(_cell("tflops", own.get(name)) for name in (128, 64, "cublaslt"))]
        for size, own in sizes.items()
    ]
    return _table(["M x N x K", "per 128", "per 64", "cuBLASLt"], lines, "---:")


def _targets(rows: Mapping[str, list[Row]]) -> str:
    """A target without a point that was measured is left out."""
    found = [(target.text, *verdict(target, rows[target.result])) for target in TARGETS]
    lines = [[text, f"{met} of {points} points", misses] for text, met, points, misses in found if points]
    return _table(["target", "met at", "missed by"], lines, "---")


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    if column.startswith(("share", "ratio")):
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _table(head: list[str], lines: list[list[str]], rule: str) -> str:
    rules = f"|---|{'|'.join([rule] * (len(head) - 1))}|"
    first, *rest = [f"| {' | '.join(line)} |" for line in (head, *lines)]
    return "\n".join([first, rules, *rest])


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def section(readme: str) -> tuple[str, str, str]:
    """(up to the first marker, between the markers, from the second one on). Raises ReportError."""
    for marker in (START, END):
        if readme.count(marker) != 1:
            raise ReportError(f"README.md must have the marker {marker} once and has it {readme.count(marker)} times")
    before, _, rest = readme.partition(START)
    between, found, after = rest.partition(END)
    if not found:
        raise ReportError(f"README.md must have the marker {END} after {START}")
    return f"{before}{START}\n", between.strip("\n"), f"\n{END}{after}"


def stamp(results: Results) -> str:
    """The picture's last line: which rows it shows, so that a stale one is known without drawing it."""
    rows = json.dumps(results["sweep"]["rows"], sort_keys=True).encode()
    return f"<!-- rows of sweep.json, sha256 {hashlib.sha256(rows).hexdigest()} -->\n"


def drawn(results: Results, picture: Path) -> bool:
    """Whether the picture is of these results; without results none is needed."""
    return not results or (picture.is_file() and picture.read_text().endswith(stamp(results)))


def draw(results: Results, picture: Path) -> None:
    """Raises EnvironmentMissing without matplotlib."""
    plot.check(picture)
    plot.plot({**results["sweep"], "rows": chosen(results, "sweep")}, picture)
    lines = [line.rstrip() for line in picture.read_text().splitlines()]
    picture.write_text("\n".join(lines) + "\n" + stamp(results))


def report_command(
    check: Annotated[
        bool, typer.Option("--check", help="Writes nothing; status 1 if README or picture is stale.")
    ] = False,
) -> None:
    """Writes the README's results, and their picture if it is stale, from kernel/results/*.json; needs no GPU.

    Exit status: 0 done, 1 stale (--check), a file or marker missing or damaged, 2 usage, 3 environment: no matplotlib
    for a picture that has to be drawn, and nothing is written.
    """
    picture = RESULTS / PICTURE
    try:
        if not README.is_file():
            raise ReportError("README.md is missing")
        results = read(RESULTS)
        before, between, after = section(README.read_text())
        text = render(results)
        stale = [] if between == text else ["README.md"]
        stale += [] if drawn(results, picture) else [f"kernel/results/{PICTURE}"]
        if check and stale:
            raise ReportError(f"not of kernel/results/*.json: {', '.join(stale)}; python -m kernel report renews them")
        if not drawn(results, picture):
            draw(results, picture)
        if between != text:
            atomic.replace(README, (before + text + after).encode())
    except ReportError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    except EnvironmentMissing as error:
        print(f"environment: {error}", file=sys.stderr)
        raise typer.Exit(3) from error
    print(f"written: {', '.join(stale)}" if stale else "README.md and its picture are of kernel/results/*.json")
