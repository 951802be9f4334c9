"""What is shown beside the columns of a result and follows from them: no JSON holds it."""

from __future__ import annotations

from collections.abc import Iterable

from megaproof.bench import peers
from megaproof.bench.measure.rows import Row
from megaproof.bench.model.chips import Chip
from megaproof.quant.shapes import SHAPES

VALLEY_FROM = 512
"""No valley is wanted from this T on."""
REFERENCES = {
    "share_deepgemm": ("tflops_128", "deepgemm"),
    "share_plain_128": ("tflops_128", "plain_128"),
    "share_plain_64": ("tflops_64", "plain_64"),
}
"""Share of a dense row -> our rate, and whose it is over: a key of `dense` in bench/peers."""


def points(rows: Iterable[Row], chip: Chip | None) -> list[Row]:
    """Rows by T within a preset, each with three columns more; None where there is nothing to compare with.

    share_before: TFLOP/s over the best at a smaller T of at least VALLEY_FROM. share_ceiling: TFLOP/s over the ceiling
    of the shape (chips.py). ratio_grouped: our time over that of the two grouped GEMMs alone.
    """
    best: dict[str, float] = {}
    found = []
    for row in rows:
        before, shape = best.get(row["preset"]), SHAPES.get(row["preset"])
        ceiling = chip.ceiling_tflops.get((shape.hidden, shape.intermediate)) if chip and shape else None
        columns = {
            "share_before": _over(row["tflops"], before),
            "share_ceiling": _over(row["tflops"], ceiling),
            "ratio_grouped": _over(row["us"], row["grouped_gemms"]),
        }
        found.append(row | columns)
        if row["T"] >= VALLEY_FROM:
            best[row["preset"]] = max(before or 0.0, row["tflops"])
    return found


def dense(rows: Iterable[Row], chip: Chip | None) -> list[Row]:
    """The rows of dense.json, one a size: tflops_128, tflops_64, cublaslt_tflops and our rate over others'."""
    sizes: dict[str, Row] = {}
    for row in rows:
        size = f"{row['m']} x {row['n']} x {row['k']}"
        own = {f"tflops_{row['group']}": row["tflops"], "cublaslt_tflops": row["cublaslt_tflops"]}
        sizes[size] = sizes.get(size, {"size": size}) | own
    for size, own in sizes.items():
        own["share_cublaslt"] = _over(own.get("tflops_128"), own["cublaslt_tflops"])
        for column, (rate, name) in REFERENCES.items():
            own[column] = _over(own.get(rate), peers.of(chip)["dense"]["tflops"].get(name, {}).get(size))
    return list(sizes.values())


def _over(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value / other
