"""The results of docs/results.md as Markdown: a table a preset, the main loop, the phases, the targets."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from megaproof.bench import peers
from megaproof.bench.measure.rows import CLOCK, Row
from megaproof.bench.model import floor
from megaproof.bench.model.chips import CHIPS, Chip
from megaproof.bench.report import derived, second
from megaproof.bench.report.results import POINTS, ReportError, Results, chip_of, chosen
from megaproof.bench.report.targets import TARGETS, TargetVerdict, verdict
from megaproof.quant.shapes import SHAPES

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
    ("of the grouped GEMMs alone", "sweep", "ratio_grouped"),
    ("distinct routing, us", "distinct", "us"),
    ("distinct routing, of the best", "distinct", "ratio_best"),
    ("sustained, us", "sustained", "us"),
    ("the unfused baseline, of our time", "baseline", "speedup"),
    ("scales per 128, us", "granularity_128", "us"),
    ("scales per 128, of the best", "granularity_128", "ratio_best"),
    ("scales per 128, of the grouped GEMMs alone", "granularity_128", "ratio_grouped"),
)
"""(line of a preset's table, result, column of rows.py or derived.py)."""
UNMEASURED = "{chip} by model, not measured: floor, us"
NOTHING = "No time of the kernel is quoted here: none was measured with the present sources."
LEGEND = """\
Routing is folded unless a line says distinct: top-K of all ranks' experts, modulo this rank's, which touches a few per
cent fewer experts than K distinct ones. Sustained: back to back, L2 not flushed. Shares are a time over ours, so that 1
is as fast: of the model's floor; of a plain read of as many bytes (shown up to T = 512) and of our dense GEMMs of M =
T*K rows, N and K of the layer (from 512), both in turn with the kernel. {yardstick}{others} TFLOP/s count useful work,
no padding. Blank: not measured. In the JSON clock_mhz is {clock}."""
OF_OTHERS = """\
 Of the best: our time over that of the faster one of PR 323 and PR 383, below 1 is faster; of the grouped GEMMs alone:
over that of DeepGEMM's two grouped GEMMs of the layer, scales per 128, without dispatch, activation and combine. Their
times, of other runs, and where they are from stand in bench/peers/{folder}.json (PR 383 accumulates in BF16 at most
sizes)."""
YARDSTICK = "Our dense GEMMs write float32{reach}."
REACH = " and reach {per_128} of a plain dense kernel's rate per 128, {per_64} per 64 (table of the main loop)"
BELOW = ": this yardstick itself is below the ceiling, so that a share of 1 is as fast as it is, not as a kernel can be"
DENSE = """\
The main loop alone (`python -m bench dense`), TFLOP/s by CUDA events; ours with float32 output, cuBLASLt in turn with
it, with one scale a tensor and BF16 output.{others}"""
DENSE_OF_OTHERS = """\
 Then our rate over others': DeepGEMM's dense kernel, cuBLASLt, and a plain dense kernel with no layer around it; what
kernels these are stands in bench/peers/{folder}.json, and their rates, except cuBLASLt's, are of other runs, L2 flushed
too."""
DENSE_COLUMNS = {
    "per 128": "tflops_128",
    "per 64": "tflops_64",
    "cuBLASLt": "cublaslt_tflops",
    "per 128 over DeepGEMM": "share_deepgemm",
    "over cuBLASLt": "share_cublaslt",
    "over plain": "share_plain_128",
    "per 64 over plain": "share_plain_64",
}
"""Head of the table -> column of derived.dense."""
PHASES = """\
Where the time goes (`python -m bench phases`: a build of its own with clocks, slower than the one that ships), us,
mean over the blocks: phases of math warpgroup 0, which add up to an SM's time, and operands, which the producer keeps
and which goes on beside them. What each one is stands in bench/measure/phases.py. The table cannot see the dispatch
warps and the scout, which keep no clock, nor launch and ramp, which are spread over the phases. SM clock: the most
cycles of an SM over the launch, so at least that."""
PHASE_LINES = ("prologue", "wait", "operands", "l1", "l1 epilogue", "l2", "l2 epilogue", "meet", "combine")
KEEPERS = ("math 0", "producer")
"""Roles whose phases are shown: of the first that keeps one."""
BASELINE = """\
The unfused baseline (kernel/baseline: GEMMs by {gemm}, Triton around them, one CUDA graph) was timed on the same card.
Of y of its exact back end and of the fused kernel {differing} elements differ, at {points} points."""
GRANULARITY = "Time with scales per 128 columns instead of 64 ({presets}): {parts}."
LARGE_FROM, SMALL_TO = 512, 128
"""T from which the multiplies decide, and up to which the bytes of the weights do."""
MISSES = "Targets, at every T that was measured; of a miss what was reached."
NO_YARDSTICKS = " Distinct routing was run without yardsticks: without the plain read and our dense GEMMs."


def render_all(found: Mapping[Chip, Results]) -> str:
    """The results of every chip as Markdown; with more than one, each below a heading of its own."""
    if not found:
        return NOTHING
    heads = {chip: f"## {chip.name}\n\n" if len(found) > 1 else "" for chip in found}
    return "\n\n".join(heads[chip] + render(results) for chip, results in found.items())


def render(results: Results) -> str:
    """The results of one chip as Markdown."""
    chip = chip_of(results)
    if chip is None:
        raise ReportError(f"{results['sweep']['device']} is no chip of bench/model/chips.py")
    rows = {name: chosen(results, name) for name in POINTS}
    rows["dense"] = derived.dense(results["dense"]["rows"], chip) if "dense" in results else []
    others = (OF_OTHERS, DENSE_OF_OTHERS) if chip.folder in peers.PEERS else ("", "")
    of_layers, of_gemms = (text.format(folder=chip.folder) for text in others)
    legend = LEGEND.format(yardstick=_yardstick(rows["dense"]), others=of_layers, clock=CLOCK)
    parts = [_paragraph(_provenance(results)), _paragraph(legend)]
    for preset in dict.fromkeys(row["preset"] for row in rows["sweep"]):
        table = _preset(rows, preset)
        folded = f"<details>\n<summary>{preset}</summary>\n\n{table}\n\n</details>"
        parts.append(table if preset in OPEN else folded)
    picture = f"../bench/results/{chip.folder}/{PICTURE}"
    parts.append(f"![Time and share of the floor against T, beside the public kernels]({picture})")
    if again := peers.of(chip).get("second_run"):
        parts += [_paragraph(second.words(again, chip.folder)), *_second(again)]
    parts += [_paragraph(said)] if (said := _granularity(rows)) else []
    parts += [_paragraph(said)] if (said := _baseline(results, rows["baseline"])) else []
    parts += [_paragraph(DENSE.format(others=of_gemms)), _dense(rows["dense"])] if rows["dense"] else []
    if "phases" in results:
        parts += [_paragraph(PHASES), *_phases(results["phases"]["rows"])]
    alone = "--no-yardsticks" in results.get("distinct", {}).get("command", "")
    return "\n\n".join([*parts, _paragraph(MISSES + NO_YARDSTICKS * alone), _targets(rows, chip)])


def _provenance(results: Results) -> str:
    sweep = results["sweep"]
    dates = " and ".join(sorted({result["date"] for result in results.values()}))
    what = sweep["what"].partition(", us_spread")[0]
    flushed = sweep["regime"].replace("l2", "L2")
    return f"**Time.** {sweep['device']}, driver {sweep['driver']}, {dates}: {what}; {sweep['method']}; {flushed}."


def _yardstick(dense: list[Row]) -> str:
    """What the dense GEMMs are worth that the kernel's share is of."""
    shares = [
        [row[column] for row in dense if row[column] is not None] for column in ("share_plain_128", "share_plain_64")
    ]
    if not all(shares):
        return YARDSTICK.format(reach="")
    per_128, per_64 = (_span(f"{value:.2f}" for value in (min(own), max(own))) for own in shares)
    below = BELOW if max(map(max, shares)) < 1 else ""
    return YARDSTICK.format(reach=REACH.format(per_128=per_128, per_64=per_64) + below)


def _span(ends: Iterable[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def _preset(rows: Mapping[str, list[Row]], preset: str) -> str:
    lines = []
    for label, name, column in LINES:
        first, last = BINDS.get(column, (1, max(TOKENS)))
        own = [row for row in rows[name] if row["preset"] == preset and first <= row["T"] <= last]
        points = {row["T"]: row[column] for row in own}
        cells = [_cell(column, points.get(tokens)) for tokens in TOKENS]
        lines += [[label, *cells]] if any(cells) else []
    modelled = [other for other in CHIPS.values() if not other.measured] if preset in SHAPES else []
    lines += [[UNMEASURED.format(chip=other.name), *_floors(preset, other)] for other in modelled]
    return _table([f"{preset}, T", *map(str, TOKENS)], lines, "---:")


def _floors(preset: str, chip: Chip) -> list[str]:
    """What nothing goes below on a chip, us."""
    rows = [floor.row(chip, SHAPES[preset], tokens, "folded", 0) for tokens in TOKENS]
    return [_cell("us", row["floor_us"]) for row in rows]


def _granularity(rows: Mapping[str, list[Row]]) -> str:
    """How much less time scales per 128 take than scales per 64, at the T that both were measured at."""
    usual = {(row["preset"], row["T"]): row["us"] for row in rows["sweep"]}
    both = [row for row in rows["granularity_128"] if (row["preset"], row["T"]) in usual]
    saved = [(row["T"], 100 * (1 - row["us"] / usual[row["preset"], row["T"]])) for row in both]
    large = [percent for tokens, percent in saved if tokens >= LARGE_FROM]
    small = [percent for tokens, percent in saved if tokens <= SMALL_TO]
    parts = [f"from T = {LARGE_FROM} up {_less(large)}"] if large else []
    parts += [f"at T <= {SMALL_TO} {_less(small)}"] if small else []
    presets = ", ".join(dict.fromkeys(row["preset"] for row in both))
    return GRANULARITY.format(presets=presets, parts=", ".join(parts)) if parts else ""


def _baseline(results: Results, rows: list[Row]) -> str:
    """Whose times the unfused baseline's are, and whether y was the same; nothing where y was not compared."""
    compared = [row["differing"] for row in rows if row["differing"] is not None]
    if not compared:
        return ""
    gemm = results["baseline"]["baseline"]
    return BASELINE.format(gemm=gemm, differing=f"{sum(compared):,}", points=len(compared))


def _less(percent: list[float]) -> str:
    """'3.9 to 6.1 % less', or 'between 0.5 % more and 0.8 % less'."""
    least, most = (round(value, 1) for value in (min(percent), max(percent)))
    if least < 0 < most:
        return f"between {-least} % more and {most} % less"
    word, ends = ("less", (least, most)) if least >= 0 else ("more", (-most, -least))
    return f"{_span(f'{abs(value)}' for value in ends)} % {word}"


def _second(again: Mapping[str, Any]) -> list[str]:
    """A table for each preset."""
    return [
        _table(
            [f"{preset}, another run, T", *tokens],
            [[label, *(_cell(label.replace("over", "ratio"), value) for value in line)] for label, line in lines],
            "---:",
        )
        for preset, (tokens, lines) in second.tables(again).items()
    ]


def _dense(rows: list[Row]) -> str:
    lines = [[row["size"], *(_cell(column, row.get(column)) for column in DENSE_COLUMNS.values())] for row in rows]
    return _table(["M x N x K", *DENSE_COLUMNS], lines, "---:")


def _phases(rows: list[Row]) -> list[str]:
    """A table for each preset and routing."""
    tables = []
    for preset, routing in dict.fromkeys((row["preset"], row["routing"]) for row in rows):
        own = [row for row in rows if (row["preset"], row["routing"]) == (preset, routing)]
        lines = [[name, *(_cell("us", _phase(row["roles"], name)) for row in own)] for name in PHASE_LINES]
        lines.append(["the launch, by events", *(_cell("us", row["us"]) for row in own)])
        lines.append(["SM clock, MHz", *(_cell("clock_mhz", row["clock_mhz"]) for row in own)])
        tables.append(_table([f"{preset}, {routing}, T", *(str(row["T"]) for row in own)], lines, "---:"))
    return tables


def _phase(roles: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    return next((roles[role][name]["mean"] for role in KEEPERS if name in roles[role]), None)


def _targets(rows: Mapping[str, list[Row]], chip: Chip) -> str:
    own = [target for target in TARGETS if target.chip in (None, chip.name)]
    lines = [_target(target.text, verdict(target, rows, chip)) for target in own]
    return _table(["target", "met at", "missed at", "not measured at"], lines, "---")


def _target(text: str, said: TargetVerdict) -> list[str]:
    if not said.points:
        return [text, "not measured", "", ""]
    return [text, f"{said.met} of {said.points} points", said.misses, said.unmeasured]


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
