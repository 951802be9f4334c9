"""Two results of the benchmark side by side, and the verdict that a regression gate needs. No GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from megaproof.bench.measure.points import CLAMP, UsageError
from megaproof.bench.measure.rows import Row
from megaproof.bench.measure.timer import REGIMES
from megaproof.kernel.host.sizes import GROUP

Key = tuple[str, int, str, str, float | None, str, str]


@dataclass(frozen=True)
class Pair:
    """One point of both results; times in us."""

    key: Key
    new: float
    old: float

    @property
    def percent(self) -> float:
        """How much slower the new one is; negative where it is faster."""
        return 100 * (self.new / self.old - 1)

    def __str__(self) -> str:
        """The point, what is not the default of it, and both times."""
        preset, tokens, routing, *rest = self.key
        defaults = (REGIMES["flush"], CLAMP, "fast", _granularity(GROUP))
        other = [
            "no clamp" if value is None else f"clamp {value:g}" if isinstance(value, float) else value
            for value, usual in zip(rest, defaults, strict=True)
            if value != usual
        ]
        named = " ".join([preset, f"T={tokens}", routing, *other])
        return f"{named}: {self.new} us, was {self.old} ({self.percent:+.1f} %)"


def key(row: Row) -> Key:
    """What makes two rows the same point. Older results lack some of the fields: they have the defaults."""
    clamp, silu = row.get("clamp", CLAMP), row.get("silu", "fast")
    regime, granularity = row.get("regime", REGIMES["flush"]), row.get("granularity", GROUP)
    return row["preset"], row["T"], row["routing"], regime, clamp, silu, _granularity(granularity)


def _granularity(value: int) -> str:
    return f"granularity {value}"


def pairs(new: list[Row], old: list[Row]) -> list[Pair]:
    """The points that both have, in the order of the new ones."""
    before = {key(row): row["us"] for row in old}
    return [Pair(key(row), row["us"], before[key(row)]) for row in new if key(row) in before]


def slower(both: list[Pair], percent: float) -> list[Pair]:
    """Those whose new time is longer by more than `percent`."""
    return [pair for pair in both if pair.new > pair.old * (1 + percent / 100)]


def verdict(both: list[Pair], percent: float | None) -> int:
    """Exit status: 5 without a point in common, 1 where `percent` is given and one is slower by more, else 0."""
    if not both:
        return 5
    return int(percent is not None and bool(slower(both, percent)))


def report(both: list[Pair], percent: float | None) -> list[str]:
    """Lines for a reader: what is slower by more than `percent` (0 where it is None), then the counts."""
    worse = slower(both, percent or 0.0)
    return [*(f"slower: {pair}" for pair in worse), f"{len(both)} points compared, {len(worse)} slower"]


def read_rows(path: Path, whole: bool = False) -> list[Row]:
    """The rows of a result. Raises UsageError; with `whole`, of a run that was cut short too, which is said otherwise.

    Older results do not say whether they are complete: they are.
    """
    try:
        result = json.loads(path.read_text())
        rows, complete = result["rows"], result.get("complete", True)
        for row in rows:
            if not (row["us"] > 0 and isinstance(key(row)[1], int)):
                raise ValueError(f"us = {row['us']}, T = {row['T']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--compare {path} must be a result of this command ({error!r})") from None
    if not complete and whole:
        raise UsageError(f"--fail-slower needs whole results: the run of {path} was cut short")
    if not complete:
        print(f"{path}: the run was cut short, {len(rows)} points", file=sys.stderr)
    return rows
