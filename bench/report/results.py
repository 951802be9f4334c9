"""The committed results, bench/results/<chip>/*.json: what each holds, and what makes one unfit to be quoted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaproof.bench.measure.rows import Row
from megaproof.bench.measure.timer import REGIMES
from megaproof.bench.model import chips
from megaproof.bench.report import derived
from megaproof.kernel.host.sizes import GROUP
from megaproof.kernel.programs import PINS

POINTS = {
    "sweep": ("folded", REGIMES["flush"], GROUP),
    "distinct": ("distinct", REGIMES["flush"], GROUP),
    "sustained": ("folded", REGIMES["sustained"], GROUP),
    "granularity_128": ("folded", REGIMES["flush"], 128),
    "baseline": ("folded", REGIMES["flush"], GROUP),
}
"""Name of a result -> routing, regime and granularity of the rows that it is read for."""
RUN = {"device", "driver", "versions", "date", "code", "rows"}
"""Keys of every result."""
POINT = {"preset", "T", "routing", "regime", "granularity", "us", "us_spread", "tflops", "hbm_gb_s", "share_floor"}
POINT |= {"share_read", "share_compute", "grouped_gemms", "ratio_pr323", "ratio_pr383", "ratio_best"}
COLUMNS = dict.fromkeys(POINTS, POINT) | {
    "baseline": POINT | {"baseline_us", "speedup", "differing"},
    "dense": {"group", "m", "n", "k", "us", "tflops", "cublaslt_us", "cublaslt_tflops"},
    "phases": {"preset", "T", "routing", "us", "clock_mhz", "roles"},
}
"""Every result that is known -> what its rows hold at least."""
KEYS = {"sweep": {"what", "method", "regime"}, "dense": {"what"}, "baseline": {"baseline"}}
"""What is quoted of a result beside its rows."""
Results = Mapping[str, Mapping[str, Any]]
"""Name of a file, without .json -> what is in it."""


class ReportError(Exception):
    """A file is missing, damaged, cut short or stale; the message names it."""


def read_all(root: Path) -> dict[chips.Chip, dict[str, dict[str, Any]]]:
    """The results of every chip that has some, in the order of CHIPS. Raises ReportError."""
    folders = {chip.folder: chip for chip in chips.CHIPS.values()}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.is_dir() and path.name not in folders:
            raise ReportError(f"{path.name} is no chip of bench/model/chips.py")
    found = {chip: read(root / name) for name, chip in folders.items() if (root / name).is_dir()}
    for chip, own in found.items():
        if own and chip_of(own) is not chip:
            raise ReportError(f"{chip.folder}/sweep.json has device {own['sweep']['device']!r}: that is no {chip.name}")
    return {chip: own for chip, own in found.items() if own}


def chip_of(results: Results) -> chips.Chip | None:
    """The chip that these results were measured on."""
    return chips.of_device(results["sweep"]["device"])


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of a folder by name. Raises ReportError."""
    found = {path.stem: _read_one(path) for path in sorted(folder.glob("*.json"))}
    if found and "sweep" not in found:
        raise ReportError(f"sweep.json is missing beside {', '.join(f'{name}.json' for name in found)}")
    for name in POINTS.keys() & found.keys():
        if not chosen(found, name):
            raise ReportError(f"{name}.json has no row of {', '.join(map(str, POINTS[name]))}")
    for name, result in found.items():
        for key in ("device", "driver"):
            if (own := result[key]) != (wanted := found["sweep"][key]):
                raise ReportError(f"{name}.json has {key} {own!r}; it must be sweep.json's, {wanted!r}")
    return found


def _read_one(path: Path) -> dict[str, Any]:
    """Of the pinned code, whole, with all that is quoted of it. Raises ReportError."""
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ReportError(f"{path.name} is damaged: {error}") from error
    if not isinstance(result, dict):
        raise ReportError(f"{path.name} is damaged: a result is an object")
    if path.stem not in COLUMNS:
        raise ReportError(f"{path.name} is none of {', '.join(f'{name}.json' for name in COLUMNS)}")
    if missing := sorted((RUN | KEYS.get(path.stem, set())) - set(result)):
        raise ReportError(f"{path.name} is damaged: {', '.join(missing)} missing")
    if not (isinstance(result["rows"], list) and result["rows"]):
        raise ReportError(f"{path.name} is damaged: a result has rows")
    for number, row in enumerate(result["rows"]):
        if not isinstance(row, dict) or (missing := sorted(COLUMNS[path.stem] - set(row))):
            what = f"{', '.join(missing)} missing" if isinstance(row, dict) else "it is no object"
            raise ReportError(f"{path.name} is damaged: row {number}: {what}")
    _check_code(path, result["code"])
    if not result.get("complete", True) or result.get("failed"):
        raise ReportError(f"{path.name}: the run was cut short or a point failed; measure again")
    return result


def _check_code(path: Path, code: Any) -> None:
    """Target -> entry -> code digest, each the pinned one. Raises ReportError."""
    if not (isinstance(code, dict) and code and all(isinstance(own, dict) and own for own in code.values())):
        raise ReportError(f"{path.name} is damaged: code names the entries of each target that was measured")
    pinned = PINS.code()
    measured = [(target, entry, digest) for target, own in code.items() for entry, digest in own.items()]
    if others := [(t, entry) for t, entry, digest in measured if pinned.get(t, {}).get(entry) != digest]:
        names = ", ".join(f"{entry} of {target}" for target, entry in others)
        raise ReportError(
            f"{path.name} is stale: its code of {names} is not that of {PINS.path.name}; measure again, or delete it"
        )


def chosen(results: Results, name: str) -> list[Row]:
    """Rows that a result is read for, by preset as they come and by T, with derived.py's columns; none without it.

    Raises ReportError for a point that is there twice.
    """
    rows = results[name]["rows"] if name in results else []
    rows = [row for row in rows if (row["routing"], row["regime"], row["granularity"]) == POINTS[name]]
    twice = [key for key, count in Counter((row["preset"], row["T"]) for row in rows).items() if count > 1]
    if twice:
        raise ReportError(f"{name}.json has {len(twice)} points twice, the first is {twice[0][0]} T = {twice[0][1]}")
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    return derived.points(sorted(rows, key=lambda row: (presets.index(row["preset"]), row["T"])), chip_of(results))
