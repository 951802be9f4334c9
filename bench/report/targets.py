"""What the kernel is meant to reach, and where the results say that it does not, or were not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaproof.bench import peers
from megaproof.bench.measure.rows import Row
from megaproof.bench.model.chips import H200, Chip
from megaproof.bench.report import derived
from megaproof.bench.report.results import POINTS

Place = tuple[str, int | None]
"""Where a figure stands: preset and T, or a dense size and None."""


@dataclass(frozen=True)
class Target:
    """A limit of a column in every row with T in [first, last]; either `most` or `least`."""

    text: str
    column: str
    """Of bench/measure/rows.py or derived.py."""
    first: int = 1
    last: int = 8192
    most: float | None = None
    least: float | None = None
    result: str = "sweep"
    """Whose rows; a key of results.POINTS, or dense, whose rows have no T."""
    presets: tuple[str, ...] = ()
    """Of these alone; empty: of all."""
    alternative: tuple[str, float] | None = None
    """(column, least): a row that has this much meets the target too."""
    chip: str | None = None
    """The name of the chip whose results are judged by it; None: those of any."""

    def speaks_of(self, preset: str, tokens: int) -> bool:
        return self.first <= tokens <= self.last and (not self.presets or preset in self.presets)

    def measured(self, rows: list[Row]) -> list[Row]:
        """The rows that it speaks of and that have one of its columns."""
        own = rows if self.result == "dense" else [row for row in rows if self.speaks_of(row["preset"], row["T"])]
        return [row for row in own if any(row.get(column) is not None for column in self._columns())]

    def met(self, row: Row) -> bool:
        if self.alternative is not None:
            column, least = self.alternative
            if (row.get(column) or 0.0) >= least:
                return True
        value = row.get(self.column)
        if value is None:
            return False
        return value <= self.most if self.most is not None else value >= self.least

    def value(self, row: Row) -> str:
        """What the row has: of two columns both."""
        return " or ".join(_figure(column, row.get(column)) for column in self._columns())

    def wanted(self, rows: Mapping[str, list[Row]], chip: Chip | None) -> list[Place]:
        """Where it can be judged: where there is somebody's figure to compare with, or where the sweep has one."""
        if self.result == "dense":
            rates = peers.of(chip)["dense"]["tflops"]
            return [(size, None) for size in rates.get(derived.REFERENCES[self.column][1], {})]
        if self.column in OTHERS:
            table = peers.table(chip, POINTS[self.result][0])
            places = [
                (preset, int(tokens))
                for preset, columns in table.items()
                for tokens in dict.fromkeys(t for name in OTHERS[self.column] for t in columns.get(name, {}))
            ]
            return [place for place in places if self.speaks_of(*place)]
        return [_place(row) for row in self.measured(rows.get("sweep", []))]

    def _columns(self) -> tuple[str, ...]:
        return (self.column, self.alternative[0]) if self.alternative else (self.column,)


@dataclass(frozen=True)
class TargetVerdict:
    """How many points meet a target, of how many; the others and those that were not measured, in words."""

    met: int
    points: int
    misses: str
    unmeasured: str


OTHERS = {"ratio_best": peers.FUSED, "ratio_grouped": ("grouped_gemms",)}
"""A ratio to times of others -> theirs, in bench/peers: it can be had where they were measured."""
FASTER = round(1 / 1.3, 3)
"""1.3 times as fast."""
STRETCH_US = {"dsv4_flash": 2200, "dsv4_pro": 5300}
"""What is aimed at beyond the targets on an H200, at T = 8192."""


def _of_both_routings(text: str, column: str, **limits: Any) -> tuple[Target, Target]:
    folded = Target(text, column, **limits)
    return folded, Target(f"distinct routing, {text}", column, **limits, result="distinct")


TARGETS = (
    *_of_both_routings("of the best: at most 1", "ratio_best", most=1),
    *_of_both_routings("of the best, T <= 512: at most 0.95", "ratio_best", last=512, most=0.95),
    *_of_both_routings(f"of the best, T >= 2048: at most 1/1.3 = {FASTER}", "ratio_best", first=2048, most=FASTER),
    *_of_both_routings("of our dense GEMMs, T >= 2048: at least 0.90", "share_compute", first=2048, least=0.9),
    Target(
        "scales per 128, of our dense GEMMs, T >= 2048: at least 0.90",
        "share_compute",
        first=2048,
        least=0.9,
        result="granularity_128",
    ),
    Target(
        "scales per 128, of the grouped GEMMs alone, T >= 2048: at most 1.10",
        "ratio_grouped",
        first=2048,
        most=1.1,
        result="granularity_128",
    ),
    *(
        Target(
            f"stretch, {preset}, T = 8192: at most {us:,} us",
            "us",
            first=8192,
            most=us,
            presets=(preset,),
            chip=H200.name,
        )
        for preset, us in STRETCH_US.items()
    ),
    Target(
        "stretch, of the flushed ceiling (bench/model/chips.py), T = 8192: at least 0.88",
        "share_ceiling",
        first=8192,
        least=0.88,
        presets=tuple(STRETCH_US),
        chip=H200.name,
    ),
    *_of_both_routings("of the plain read, T = 8 to 128: at least 0.92", "share_read", first=8, last=128, least=0.92),
    *_of_both_routings("of the plain read, T = 1: at least 0.70", "share_read", last=1, least=0.7),
    *_of_both_routings(
        f"no valley: TFLOP/s at least 0.97 of the best at a smaller T >= {derived.VALLEY_FROM}",
        "share_before",
        least=0.97,
    ),
    Target(
        "main loop alone, per 128: at least 0.95 of DeepGEMM's or 0.98 of cuBLASLt's",
        "share_deepgemm",
        least=0.95,
        result="dense",
        alternative=("share_cublaslt", 0.98),
    ),
    Target("main loop alone, per 64: at least the plain kernel's", "share_plain_64", least=1, result="dense"),
)


def verdict(target: Target, rows: Mapping[str, list[Row]], chip: Chip | None) -> TargetVerdict:
    """rows: by name of the result, with what derived.py adds; a result that is missing was not measured. chip: theirs,
    whose peers they are put beside."""
    measured = target.measured(rows.get(target.result, []))
    misses = {_place(row): target.value(row) for row in measured if not target.met(row)}
    have = {_place(row) for row in measured}
    partly = {name for name, _ in have}
    lacking = [(name, tokens) for name, tokens in target.wanted(rows, chip) if (name, tokens) not in have]
    unmeasured = {(name, tokens if name in partly else None): "" for name, tokens in lacking}
    return TargetVerdict(len(measured) - len(misses), len(measured), _said(misses), _said(unmeasured))


def _said(values: Mapping[Place, str]) -> str:
    """'dsv4_flash T = 1: 1.022, 2: 1.017; glm T = 1: 1.101'; what has no T, or no value, is said without it."""
    parts: dict[str, list[str]] = {}
    for (name, tokens), value in values.items():
        head = f"{name} T = " if tokens else f"{name}: " if value else name
        parts.setdefault(head, []).append(": ".join(str(part) for part in (tokens, value) if part))
    return "; ".join(head + ", ".join(own) for head, own in parts.items())


def _place(row: Row) -> Place:
    return (row["size"], None) if "size" in row else (row["preset"], row["T"])


def _figure(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if column == "us" else f"{value:.3f}"
