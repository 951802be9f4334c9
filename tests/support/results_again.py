"""A second opinion on the page of results: every cell of its tables from the JSON files, with nothing of bench.

Ceilings and formulas are written again here, once, and hold for the committed results and for the sample; limits and
verdicts in targets_again.py.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Tables = dict[str, dict[str, list[str]]]
"""First cell of the head -> first cell of a line -> its other cells; the head itself is the line ''."""
TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192)
SHAPES = {
    "dsv4_flash": (4096, 2048, 32, 6),
    "dsv4_pro": (7168, 3072, 48, 6),
    "mimo_pro": (6144, 2048, 48, 8),
    "glm": (4096, 2048, 36, 8),
}
"""H, I, experts of the rank, K."""
CEILINGS = {"dsv4_flash": 1275, "dsv4_pro": 1320, "mimo_pro": 1275, "glm": 1275}
KINDS = {
    "sweep": ("folded", "l2 flushed", 64),
    "distinct": ("distinct", "l2 flushed", 64),
    "sustained": ("folded", "sustained", 64),
    "granularity_128": ("folded", "l2 flushed", 128),
    "baseline": ("folded", "l2 flushed", 64),
}
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


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder by name."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def shown(markdown: str) -> Tables:
    """The tables of a page."""
    found: Tables = {}
    for part in markdown.split("\n\n"):
        if part.startswith("| "):
            lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in part.splitlines()]
            found[lines[0][0]] = {"": lines[0][1:], **{line[0]: line[1:] for line in lines[2:]}}
    return found


def cell(column: str, value: float | None) -> str:
    """A number as a table shows it: two digits of a share or ratio, else one below 100 and none from there on."""
    if value is None:
        return ""
    return f"{value:.2f}" if column[:5] in ("share", "ratio") else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def kept(results: dict[str, dict[str, Any]], name: str) -> list[Row]:
    """The rows that are shown of a result, by T, with what follows from them beside."""
    rows = results.get(name, {"rows": []})["rows"]
    order = list(dict.fromkeys(row["preset"] for row in rows))
    rows = [row for row in rows if (row["routing"], row["regime"], row["granularity"]) == KINDS[name]]
    rows = sorted(rows, key=lambda row: (order.index(row["preset"]), row["T"]))
    for row in rows:
        smaller = [r["tflops"] for r in rows if r["preset"] == row["preset"] and 512 <= r["T"] < row["T"]]
        row["share_before"] = row["tflops"] / max(smaller) if smaller else None
        row["share_ceiling"] = row["tflops"] / CEILINGS[row["preset"]]
        row["ratio_grouped"] = row["us"] / row["grouped_gemms"] if row["grouped_gemms"] else None
    return rows


def bytes_of(preset: str, tokens: int, rows: int, touched: int, scale_columns: int = 64) -> int:
    """What must cross HBM: weights with their scales, then rows dispatched, activations twice, slots twice, y."""
    h, i, _, _ = SHAPES[preset]
    weights = touched * (3 * h * i + 12 * (h // 128) * (i // 128))
    rows_bytes = h + 4 * h // 128 + 2 * (i + 4 * i // scale_columns) + 4 * h
    return weights + rows * rows_bytes + 2 * tokens * h


@cache
def h20_floor(preset: str, tokens: int) -> float:
    """By model: 4.0 TB/s and 296 TFLOP/s at the shares that an H200 reaches of its 4.8 and 1979, 10 us of start."""
    h, i, experts, topk = SHAPES[preset]
    scores = torch.rand(tokens, 8 * experts, generator=torch.Generator().manual_seed(0))
    touched = len((scores.topk(topk).indices % experts).unique())
    read = 10 + bytes_of(preset, tokens, tokens * topk, touched) / (4.0e6 * 4535 / 4800)
    return max(read, 6e-6 * tokens * topk * h * i / (296 * CEILINGS[preset] / 1979))


def preset_tables(results: dict[str, dict[str, Any]]) -> Tables:
    rows = {name: kept(results, name) for name in KINDS}
    found: Tables = {}
    for preset in dict.fromkeys(row["preset"] for row in rows["sweep"]):
        lines = {"": [str(tokens) for tokens in TOKENS]}
        for label, name, column in LINES:
            own = {row["T"]: row[column] for row in rows[name] if row["preset"] == preset}
            said = {"share_read": range(1, 513), "share_compute": range(512, 8193)}.get(column, range(1, 8193))
            cells = [cell(column, own.get(tokens) if tokens in said else None) for tokens in TOKENS]
            if any(cells):
                lines[label] = cells
        lines["H20 by model, not measured: floor, us"] = [cell("us", h20_floor(preset, t)) for t in TOKENS]
        found[f"{preset}, T"] = lines
    return found


def sizes(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """M x N x K -> '128', '64' and 'cublaslt' -> TFLOP/s."""
    found: dict[str, dict[str, float]] = {}
    for row in results.get("dense", {"rows": []})["rows"]:
        own = found.setdefault(f"{row['m']} x {row['n']} x {row['k']}", {})
        own |= {str(row["group"]): row["tflops"], "cublaslt": row["cublaslt_tflops"]}
    return found


def over(value: float, other: float | None) -> float | None:
    return value / other if other else None


def dense_table(results: dict[str, dict[str, Any]], peers: dict[str, Any]) -> Tables:
    theirs = peers["dense"]["tflops"]
    lines = {"": ["per 128", "per 64", "cuBLASLt", "per 128 over DeepGEMM", "over cuBLASLt", "over plain",
                  "per 64 over plain"]}  # fmt: skip
    for size, own in sizes(results).items():
        shares = (
            over(own["128"], theirs["deepgemm"].get(size)),
            over(own["128"], own["cublaslt"]),
            over(own["128"], theirs["plain_128"].get(size)),
            over(own["64"], theirs["plain_64"].get(size)),
        )
        rates = [cell("tflops", own[name]) for name in ("128", "64", "cublaslt")]
        lines[size] = rates + [cell("share", share) for share in shares]
    return {"M x N x K": lines} if len(lines) > 1 else {}


def phase_tables(results: dict[str, dict[str, Any]]) -> Tables:
    """Phases of math warpgroup 0; operands of the producer."""
    found: Tables = {}
    names = ("prologue", "wait", "operands", "l1", "l1 epilogue", "l2", "l2 epilogue", "meet", "combine")
    for row in results.get("phases", {"rows": []})["rows"]:
        lines = found.setdefault(f"{row['preset']}, {row['routing']}, T", {})
        lines.setdefault("", []).append(str(row["T"]))
        for name in names:
            phase = row["roles"]["producer" if name == "operands" else "math 0"].get(name)
            lines.setdefault(name, []).append(cell("us", phase and phase["mean"]))
        lines.setdefault("the launch, by events", []).append(cell("us", row["us"]))
        lines.setdefault("SM clock, MHz", []).append(cell("clock_mhz", row["clock_mhz"]))
    return found


def second_tables(peers: dict[str, Any]) -> Tables:
    """Peers timed once more: our times, then ours over theirs, each beside the one that it took turns with."""
    found: Tables = {}
    for preset, us in peers.get("second_run", {"us": {}})["us"].items():
        points = list(us["ours_64"])
        lines = {"": points} | {f"{n}, us": [cell("us", us[n].get(t)) for t in points] for n in ("ours_64", "ours_128")}
        for name, theirs in us.items():
            if not name.startswith("ours"):
                own = us["ours_64_beside_flashinfer" if name.startswith("flashinfer") else "ours_64"]
                lines[f"over {name}"] = [cell("ratio", over(own[t], theirs.get(t))) for t in points]
        found[f"{preset}, another run, T"] = lines
    return found


def tables(results: dict[str, dict[str, Any]], peers: dict[str, Any]) -> Tables:
    """Every table of the page of one chip but the targets'."""
    return preset_tables(results) | second_tables(peers) | dense_table(results, peers) | phase_tables(results)


def sentences(results: dict[str, dict[str, Any]], peers: dict[str, Any]) -> list[str]:
    """The figures that the page says in words."""
    found = []
    usual = {(row["preset"], row["T"]): row["us"] for row in kept(results, "sweep")}
    per_128 = [(row["preset"], row["T"], row["us"]) for row in kept(results, "granularity_128")]
    saved = [(t, 100 - 100 * us / usual[preset, t]) for preset, t, us in per_128 if (preset, t) in usual]
    for words, own in (
        ("from T = 512 up", [percent for tokens, percent in saved if tokens >= 512]),
        ("at T <= 128", [percent for tokens, percent in saved if tokens <= 128]),
    ):
        if own:
            low, high = min(own), max(own)
            between = f"between {-low:.1f} % more and {high:.1f} % less"
            ends = dict.fromkeys(f"{abs(end):.1f}" for end in ((low, high) if low >= 0 else (high, low)))
            one_way = f"{' to '.join(ends)} % {'less' if low >= 0 else 'more'}"
            found.append(f"{words} {between if low < 0 < high else one_way}")
    compared = [row["differing"] for row in kept(results, "baseline") if row["differing"] is not None]
    if compared:
        found.append(f"{sum(compared):,} elements differ, at {len(compared)} points.")
    spans = []
    for group in ("128", "64"):
        theirs = peers["dense"]["tflops"][f"plain_{group}"]
        shares = [rates[group] / theirs[size] for size, rates in sizes(results).items() if size in theirs]
        spans.append(" to ".join(dict.fromkeys(f"{end:.2f}" for end in (min(shares), max(shares)))) if shares else "")
    if all(spans):
        found.append(f"reach {spans[0]} of a plain dense kernel's rate per 128, {spans[1]} per 64")
    return found


def columns(row: Row, peers: dict[str, Any]) -> Row:
    """What follows of a row from its point, its times, rows and touched experts; of a flushed H200."""
    h, i, _, topk = SHAPES[row["preset"]]
    tokens, us = row["T"], row["us"]
    flops = 6 * tokens * topk * h * i
    moved = bytes_of(row["preset"], tokens, row["rows"], row["touched"], row["granularity"])
    curve = [(gb * 1e9, gb * 1e6 / rate) for gb, rate in
             ((0.15, 3230), (0.4, 3990), (0.8, 4300), (2.0, 4490), (3.0, 4535))]  # fmt: skip
    after = next((n for n in range(1, 5) if moved <= curve[n][0]), 4)
    (b0, t0), (b1, t1) = curve[after - 1 : after + 1]
    modelled = t0 + (moved - b0) * (t1 - t0) / (b1 - b0)
    read = modelled if row["read_us"] is None else row["read_us"]
    summed = read * 2 * h * (tokens * topk + tokens) / moved
    gemms = [us for us in (row["dense_128_us"], row["dense_64_us"]) if us is not None]
    table = peers["us" if row["routing"] == "folded" else "us_distinct"].get(row["preset"], {})
    flushed = row["regime"] == "l2 flushed"
    theirs = {n: table.get(n, {}).get(str(tokens)) if flushed else None for n in ("pr323", "pr383", "grouped_gemms")}
    layers = [theirs[name] for name in ("pr323", "pr383") if theirs[name]]
    return theirs | {
        "rows": tokens * topk,
        "tflops": flops / us / 1e6,
        "tflops_adjusted": flops / (us - summed) / 1e6 if us > summed else None,
        "hbm_gb_s": moved / us / 1e3,
        "nvlink_bytes": 7 * tokens * topk * (3 * h + h // 32) // 8,
        "reduction_us": summed,
        "share_floor": max(modelled, flops / CEILINGS[row["preset"]] / 1e6) / us if row["granularity"] == 64 else None,
        "share_read": row["read_us"] and row["read_us"] / us,
        "share_compute": sum(gemms) / us if gemms else None,
        "ratio_pr323": theirs["pr323"] and us / theirs["pr323"],
        "ratio_pr383": theirs["pr383"] and us / theirs["pr383"],
        "ratio_best": us / min(layers) if layers else None,
        "speedup": row["baseline_us"] and row["baseline_us"] / us,
    }
