"""What public kernels took, and where that is from: a file a chip, <folder of the chip>.json."""

from __future__ import annotations

import json
from typing import Any

from megaproof import HOME
from megaproof.bench.model.chips import Chip

FUSED = ("pr323", "pr383")
"""Columns that are a whole layer: ours is put beside the faster one."""
NAMES = (*FUSED, "grouped_gemms")
"""The kernels that a row of a result is put beside; a file's `source` says what each is."""
PEERS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted((HOME / "bench" / "peers").glob("*.json"))
}
NOBODY: dict[str, Any] = {"shapes": {}, "us": {}, "us_distinct": {}, "dense": {"tflops": {}}}
"""The peers of a chip on which nobody was timed."""


def of(chip: Chip | None) -> dict[str, Any]:
    """The file of a chip: `us` and `us_distinct`, by preset, name and T, L2 flushed; `dense` TFLOP/s by name and
    M x N x K."""
    return NOBODY if chip is None else PEERS.get(chip.folder, NOBODY)


def table(chip: Chip | None, routing: str) -> dict[str, dict[str, dict[str, float]]]:
    """What they took with a routing, L2 flushed: preset -> name -> T -> us."""
    return of(chip)["us" if routing == "folded" else "us_distinct"]


def at(chip: Chip | None, preset: str, routing: str, tokens: int) -> dict[str, float | None]:
    """What they took for a point, us; None where they were not measured."""
    own = table(chip, routing).get(preset, {})
    return {name: own.get(name, {}).get(str(tokens)) for name in NAMES}
