"""A second opinion on the targets: what each is, who meets it and who was not measured, with nothing of bench."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megaproof.tests.support import results_again as again

Target = tuple[str, str, str, str, float, int, int, list[str] | None]
# fmt: off
TARGETS: tuple[Target, ...] = (
    ("of the best: at most 1", "sweep", "ratio_best", "<=", 1, 1, 8192, None),
    ("distinct routing, of the best: at most 1", "distinct", "ratio_best", "<=", 1, 1, 8192, None),
    ("of the best, T <= 512: at most 0.95", "sweep", "ratio_best", "<=", 0.95, 1, 512, None),
    ("distinct routing, of the best, T <= 512: at most 0.95", "distinct", "ratio_best", "<=", 0.95, 1, 512, None),
    ("of the best, T >= 2048: at most 1/1.3 = 0.769", "sweep", "ratio_best", "<=", 0.769, 2048, 8192, None),
    ("distinct routing, of the best, T >= 2048: at most 1/1.3 = 0.769",
     "distinct", "ratio_best", "<=", 0.769, 2048, 8192, None),
    ("of our dense GEMMs, T >= 2048: at least 0.90", "sweep", "share_compute", ">=", 0.9, 2048, 8192, None),
    ("distinct routing, of our dense GEMMs, T >= 2048: at least 0.90",
     "distinct", "share_compute", ">=", 0.9, 2048, 8192, None),
    ("scales per 128, of our dense GEMMs, T >= 2048: at least 0.90",
     "granularity_128", "share_compute", ">=", 0.9, 2048, 8192, None),
    ("scales per 128, of the grouped GEMMs alone, T >= 2048: at most 1.10",
     "granularity_128", "ratio_grouped", "<=", 1.1, 2048, 8192, None),
    ("stretch, dsv4_flash, T = 8192: at most 2,200 us", "sweep", "us", "<=", 2200, 8192, 8192, ["dsv4_flash"]),
    ("stretch, dsv4_pro, T = 8192: at most 5,300 us", "sweep", "us", "<=", 5300, 8192, 8192, ["dsv4_pro"]),
    ("stretch, of the flushed ceiling (bench/model/chips.py), T = 8192: at least 0.88",
     "sweep", "share_ceiling", ">=", 0.88, 8192, 8192, ["dsv4_flash", "dsv4_pro"]),
    ("of the plain read, T = 8 to 128: at least 0.92", "sweep", "share_read", ">=", 0.92, 8, 128, None),
    ("distinct routing, of the plain read, T = 8 to 128: at least 0.92",
     "distinct", "share_read", ">=", 0.92, 8, 128, None),
    ("of the plain read, T = 1: at least 0.70", "sweep", "share_read", ">=", 0.7, 1, 1, None),
    ("distinct routing, of the plain read, T = 1: at least 0.70", "distinct", "share_read", ">=", 0.7, 1, 1, None),
    ("no valley: TFLOP/s at least 0.97 of the best at a smaller T >= 512",
     "sweep", "share_before", ">=", 0.97, 1, 8192, None),
    ("distinct routing, no valley: TFLOP/s at least 0.97 of the best at a smaller T >= 512",
     "distinct", "share_before", ">=", 0.97, 1, 8192, None),
)
# fmt: on
"""(text, result, column, side, limit, first T, last T, presets or all), in the order of the page. The two of the main
loop are judged in `main_loop`."""


def by_place(values: Iterable[tuple[str, int, str]]) -> str:
    """'glm T = 1: 1.022, 2: 1.017; ...'; an empty value is left out."""
    parts: dict[str, list[str]] = {}
    for preset, tokens, value in values:
        parts.setdefault(preset, []).append(f"{tokens}: {value}" if value else str(tokens))
    return "; ".join(f"{preset} T = {', '.join(own)}" for preset, own in parts.items())


def judged(met: list[bool], missed: str, lacking: str) -> list[str]:
    return [f"{sum(met)} of {len(met)} points", missed, lacking] if met else ["not measured", "", ""]


def spoken(rows: list[again.Row], target: Target) -> list[again.Row]:
    """The rows that a target speaks of and that have its column."""
    _, _, column, _, _, first, last, presets = target
    own = [row for row in rows if first <= row["T"] <= last and (presets is None or row["preset"] in presets)]
    return [row for row in own if row[column] is not None]


def comparable(target: Target, sweep: list[again.Row], peers: dict[str, Any]) -> list[tuple[str, int]]:
    """Where a target can be judged: where others were timed, or where the sweep has the column."""
    _, name, column, _, _, first, last, _ = target
    if column not in ("ratio_best", "ratio_grouped"):
        return [(row["preset"], row["T"]) for row in spoken(sweep, target)]
    others = ("pr323", "pr383") if column == "ratio_best" else ("grouped_gemms",)
    table = peers["us_distinct" if name == "distinct" else "us"]
    places = [(preset, int(t)) for preset, us in table.items() for other in others for t in us.get(other, {})]
    return [place for place in dict.fromkeys(places) if first <= place[1] <= last]


def table(results: dict[str, dict[str, Any]], peers: dict[str, Any]) -> again.Tables:
    rows = {name: again.kept(results, name) for name in again.KINDS}
    lines = {"": ["met at", "missed at", "not measured at"]}
    for target in TARGETS:
        text, name, column, side, limit, *_ = target
        own = spoken(rows[name], target)
        met = [row[column] <= limit if side == "<=" else row[column] >= limit for row in own]
        digits = ",.0f" if column == "us" else ".3f"
        misses = [(r["preset"], r["T"], f"{r[column]:{digits}}") for r, ok in zip(own, met, strict=True) if not ok]
        have = [(row["preset"], row["T"]) for row in own]
        lacking = [place for place in comparable(target, rows["sweep"], peers) if place not in have]
        said = []
        for preset in dict.fromkeys(preset for preset, _ in lacking):
            partly = any(preset == other for other, _ in have)
            said.append(by_place((preset, t, "") for p, t in lacking if p == preset) if partly else preset)
        lines[text] = judged(met, by_place(misses), "; ".join(said))
    return {"target": lines | main_loop(results, peers)}


def main_loop(results: dict[str, dict[str, Any]], peers: dict[str, Any]) -> dict[str, list[str]]:
    """The two targets of the dense GEMMs: one of two shares per 128, the plain kernel's rate per 64."""
    own, theirs = again.sizes(results), peers["dense"]["tflops"]
    deepgemm = {size: again.over(rates["128"], theirs["deepgemm"].get(size)) for size, rates in own.items()}
    cublaslt = {size: rates["128"] / rates["cublaslt"] for size, rates in own.items()}
    met = [(deepgemm[size] or 0) >= 0.95 or cublaslt[size] >= 0.98 for size in own]
    both = [
        f"{size}: {'-' if deepgemm[size] is None else f'{deepgemm[size]:.3f}'} or {cublaslt[size]:.3f}" for size in own
    ]
    misses = [text for text, ok in zip(both, met, strict=True) if not ok]
    lacking = [size for size in theirs["deepgemm"] if size not in own]
    plain = {size: own[size]["64"] / rate for size, rate in theirs["plain_64"].items() if size in own}
    plain = {size: plain[size] for size in own if size in plain}
    slow = [f"{size}: {share:.3f}" for size, share in plain.items() if share < 1]
    without = [size for size in theirs["plain_64"] if size not in own]
    return {
        "main loop alone, per 128: at least 0.95 of DeepGEMM's or 0.98 of cuBLASLt's": judged(
            met, "; ".join(misses), "; ".join(lacking)
        ),
        "main loop alone, per 64: at least the plain kernel's": judged(
            [share >= 1 for share in plain.values()], "; ".join(slow), "; ".join(without)
        ),
    }
