"""What the kernel is meant to reach, and where a sweep says that it does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kernel.bench.rows import Row

VALLEY_FROM = 512
"""No valley is wanted from this T on."""


@dataclass(frozen=True)
class Target:
    """A limit of a column in every row with T in [first, last]; either `most` or `least`."""

    text: str
    column: str
    """Of kernel/bench/rows.py, or share_before."""
    first: int = 1
    last: int = 8192
    most: float | None = None
    least: float | None = None
    result: str = "sweep"
    """Whose rows; a key of report.POINTS."""

    def measured(self, rows: Iterable[Row]) -> list[Row]:
        """The rows that it speaks of and that have the column."""
        return [row for row in rows if self.first <= row["T"] <= self.last and row.get(self.column) is not None]

    def met(self, row: Row) -> bool:
        value = row[self.column]
        return value <= self.most if self.most is not None else value >= self.least

    def worst(self, rows: list[Row]) -> Row:
        return (min if self.most is None else max)(rows, key=lambda row: row[self.column])


FASTER = round(1 / 1.3, 3)
"""1.3 times as fast."""
TARGETS = (
    Target("of the best: at most 1", "ratio_best", most=1),
    Target("distinct routing, of the best: at most 1", "ratio_best", most=1, result="distinct"),
    Target("of the best, T <= 512: at most 0.95", "ratio_best", last=512, most=0.95),
    Target("distinct routing, T <= 512: at most 0.95", "ratio_best", last=512, most=0.95, result="distinct"),
    Target(f"of the best, T >= 2048: at most 1/1.3 = {FASTER}", "ratio_best", first=2048, most=FASTER),
    Target(f"distinct routing, T >= 2048: at most {FASTER}", "ratio_best", first=2048, most=FASTER, result="distinct"),
    Target("of our dense GEMMs, T >= 2048: at least 0.90", "share_compute", first=2048, least=0.9),
    Target(
        "scales per 128, of our dense GEMMs, T >= 2048: at least 0.90",
        "share_compute",
        first=2048,
        least=0.9,
        result="granularity_128",
    ),
    Target("of the plain read, T = 8 to 128: at least 0.92", "share_read", first=8, last=128, least=0.92),
    Target("of the plain read, T = 1: at least 0.70", "share_read", last=1, least=0.7),
    Target("no valley: TFLOP/s at least 0.97 of the best at a smaller T >= 512", "share_before", least=0.97),
)


def with_share_before(rows: Iterable[Row]) -> list[Row]:
    """Rows by T within a preset, each with its TFLOP/s over the best at a smaller T of at least VALLEY_FROM."""
    best: dict[str, float] = {}
    found = []
    for row in rows:
        before = best.get(row["preset"])
        found.append(row | {"share_before": None if before is None else row["tflops"] / before})
        if row["T"] >= VALLEY_FROM:
            best[row["preset"]] = max(before or 0.0, row["tflops"])
    return found


def verdict(target: Target, rows: Iterable[Row]) -> tuple[int, int, str]:
    """(points that meet it, points, the others in words)."""
    measured = target.measured(rows)
    missed = [row for row in measured if not target.met(row)]
    presets = dict.fromkeys(row["preset"] for row in missed)
    return len(measured) - len(missed), len(measured), "; ".join(_misses(target, name, measured) for name in presets)


def _misses(target: Target, preset: str, measured: list[Row]) -> str:
    rows = [row for row in measured if row["preset"] == preset]
    missed = [row for row in rows if not target.met(row)]
    worst = target.worst(missed)
    said = f"{worst[target.column]:.3f} at T = {worst['T']}"
    if len(missed) == 1:
        return f"{preset} {said}"
    if len(missed) == len(rows):
        return f"{preset} all {len(rows)}, worst {said}"
    return f"{preset} {len(missed)}, worst {said} (T = {', '.join(str(row['T']) for row in missed)})"
