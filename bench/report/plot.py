"""`--plot`: time and share of the floor against T, one column of panels a shape, the public kernels beside ours."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megaproof.bench import peers
from megaproof.bench.measure.points import UsageError
from megaproof.bench.measure.rows import Row
from megaproof.toolchain.errors import EnvironmentMissing

SUFFIXES = (".png", ".svg")
Line = list[tuple[int, float]]
"""(T, value), by T."""


def check(path: Path) -> None:
    """Raises UsageError for another suffix or a folder that is not there, EnvironmentMissing without matplotlib."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path} must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path} must lie in a folder that exists")
    _pyplot()


def lines(rows: Iterable[Row], preset: str) -> tuple[dict[str, Line], dict[str, Line]]:
    """(label -> time in us, label -> share of the floor) of a shape; points that hold nothing are left out."""
    times: dict[str, Line] = {}
    shares: dict[str, Line] = {}
    for row in rows:
        if row["preset"] != preset:
            continue
        label, tokens = f"fused, {row['routing']}, {row.get('regime', 'l2 flushed')}", row["T"]
        columns = {label: row["us"]}
        if row["routing"] == "folded":
            columns |= {name: row.get(name) for name in peers.NAMES}
            columns["unfused baseline"] = row.get("baseline_us")
        for name, value in columns.items():
            if value is not None:
                times.setdefault(name, []).append((tokens, value))
        best = [row.get(name) for name in ("share_read", "share_compute")]
        measured = max((share for share in best if share is not None), default=None)
        floor = row.get("share_floor")
        found = {label: floor, f"{label}, measured": measured}
        if floor is not None and row["routing"] == "folded":
            # A whole layer has a share of its floor; the GEMMs alone have none.
            found |= {name: floor * row["us"] / row[name] for name in peers.FUSED if row.get(name) is not None}
        for name, value in found.items():
            if value is not None:
                shares.setdefault(name, []).append((tokens, value))
    # The unfused baseline and the peers may stand in several regimes: one point a T, the first.
    first_times, first_shares = (
        {name: sorted(dict(reversed(line)).items()) for name, line in part.items()} for part in (times, shares)
    )
    return first_times, first_shares


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes the picture of a result; png or svg by the file's suffix."""
    pyplot = _pyplot()
    rows = result["rows"]
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    size = (5.5 * len(presets), 8)
    figure, axes = pyplot.subplots(2, len(presets), figsize=size, squeeze=False, sharex="col", layout="constrained")
    for column, preset in enumerate(presets):
        for axis, part, title in zip(
            axes[:, column], lines(rows, preset), ("time, us", "share of the floor"), strict=True
        ):
            for name, line in part.items():
                style = {"linestyle": "--", "marker": "x"} if name in peers.NAMES else {"marker": "."}
                axis.plot(*zip(*line, strict=True), label=name, **style)
            axis.set_xscale("log", base=2)
            axis.set_ylabel(title)
            axis.grid(alpha=0.3)
            if part:
                axis.legend(fontsize="x-small")
        axes[0, column].set_yscale("log")
        axes[0, column].set_title(preset)
        axes[1, column].set_ylim(0, 1.1)
        axes[1, column].set_xlabel("T, tokens of the rank")
    figure.suptitle(f"{result.get('device', '')}, {result.get('date', '')}")
    figure.savefig(path)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise EnvironmentMissing(f"--plot needs matplotlib ({error}); install it, all else works without") from error
    matplotlib.use("Agg")  # a file, never a window
    from matplotlib import pyplot

    return pyplot
