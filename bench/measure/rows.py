"""A measured point as it is written to JSON and shown: what every column means stands here."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megaproof.bench import peers
from megaproof.bench.measure.timer import REGIMES, spread
from megaproof.bench.measure.yardsticks import DENSE, READ
from megaproof.bench.model.chips import Chip
from megaproof.bench.model.roofline import Load, adjusted_tflops, reduction_us
from megaproof.kernel.host.sizes import GROUP

Row = dict[str, Any]
CLOCK = "nvidia-smi's; of flushed launches it samples mostly the memsets between them"
"""What clock_mhz is worth, wherever it is shown."""
COLUMNS = {
    "preset": "shape: a preset, or h<H>-i<I>-e<local experts>-k<K>",
    "T": "tokens of the rank",
    "routing": "folded, as the peers' table, or distinct",
    "regime": "l2 flushed before each launch, or sustained: back to back after a while of the same",
    "clamp": "of the activation; null: none",
    "silu": "fast or precise",
    "granularity": "L2 activations that share a scale, which are one chain of the second GEMM: 64 or 128",
    "us": "the fused kernel's time, median",
    "us_spread": "half of p90 - p10 of it",
    "tflops": "useful TFLOP/s: 6 * T * K * H * I over the time; padding does not count",
    "tflops_adjusted": "the same over the time less reduction_us; null where nothing would be left",
    "hbm_gb_s": "bytes that must move (roofline.Load.bytes) over the time, GB/s",
    "nvlink_bytes": "what eight ranks would send over NVLink for this rank: 7/8 of dispatched and of combined rows",
    "reduction_us": "estimate of the combine's sum: T*K*2H read and T*2H written, at the rate of the bulk read",
    "share_floor": "the model's floor (chips.Chip.floor_us) over the time; null for a shape or granularity without one",
    "share_read": "read_us over the time",
    "share_compute": "dense_128_us + dense_64_us over the time; where granularity is 128, dense_128_us alone",
    "read_us": "plain bulk read of as many bytes, same run, in turn with the kernel",
    "dense_128_us": "our dense GEMM promoted per 128, M = T*K up to 128, N = 2I, K = H; same run, in turn; where "
    "granularity is 128, with the second GEMM right behind it: same M, N = H, K = I",
    "dense_64_us": "our dense GEMM promoted per 64, same M, N = H, K = I; null where granularity is 128",
    "touched": "local experts that have rows",
    "rows": "rows that the rank receives, T*K",
    **{name: f"{name}'s time, us, on the same chip (bench/peers); of flushed runs alone" for name in peers.NAMES},
    "ratio_pr323": "our time over PR 323's",
    "ratio_pr383": "our time over PR 383's",
    "ratio_best": "our time over the better of the two",
    "baseline_us": "our unfused baseline, by events around a graph of the whole pass",
    "speedup": "the baseline's time over ours",
    "differing": "elements of y whose bits are not the exact baseline's",
    "clock_mhz": f"SM clock while the point was measured, median; {CLOCK}",
    "power_w": "power, maximum; nvidia-smi",
}
"""Every field of a row, in its order. Times in us, medians; null: not measured."""
PAPER = {"nvlink_bytes", "reduction_us", "clamp", "silu", "granularity", "read_us", "grouped_gemms"}
PAPER |= {"dense_128_us", "dense_64_us"}
"""Columns of the JSON that the table has no room for."""


@dataclass(frozen=True)
class Point:
    """What was measured."""

    preset: str
    routing: str
    regime: str
    """A key of REGIMES."""
    load: Load
    clamp: float | None
    silu: str
    chip: Chip | None
    """None: one that chips.py does not know, without floor and peers."""


def row(
    point: Point,
    times: Mapping[str, list[float]],
    baseline: list[float] | None = None,
    differing: int | None = None,
) -> Row:
    """One point: times in us of the calls 'fused' and, where they were measured, of the yardsticks."""
    load, us = point.load, statistics.median(times["fused"])
    medians = {name: statistics.median(own) for name, own in times.items()}
    read, gemms = medians.get(READ), [medians[name] for name in DENSE.values() if name in medians]
    chip = point.chip if point.chip is not None and point.chip.measured else None
    plain_read = chip.read_us(load.bytes) if read is None and chip else read
    reduction = None if plain_read is None else reduction_us(load, plain_read)
    modelled = chip is not None and chip.has_floor(load) and load.granularity == GROUP
    others = peers.at(point.chip, point.preset, point.routing, load.tokens)
    if point.regime != "flush":
        others = dict.fromkeys(others)  # they were measured flushed
    fused = [others[name] for name in peers.FUSED if others[name] is not None]
    unfused = None if baseline is None else statistics.median(baseline)
    found = {
        "preset": point.preset,
        "T": load.tokens,
        "routing": point.routing,
        "regime": REGIMES[point.regime],
        "clamp": point.clamp,
        "silu": point.silu,
        "granularity": load.granularity,
        "us": round(us, 2),
        "us_spread": round(spread(times["fused"]), 2),
        "tflops": round(load.flops / us / 1e6, 1),
        "tflops_adjusted": None if reduction is None else _rounded(adjusted_tflops(load, us, reduction), 1),
        "hbm_gb_s": round(load.bytes / us / 1e3),
        "nvlink_bytes": load.nvlink_bytes,
        "reduction_us": _rounded(reduction, 2),
        "share_floor": _ratio(chip.floor_us(load), us) if modelled else None,
        "share_read": _ratio(read, us),
        "share_compute": _ratio(sum(gemms), us) if gemms else None,
        "read_us": _rounded(read, 2),
        **{f"{name}_us": _rounded(medians.get(name), 2) for name in DENSE.values()},
        "touched": load.touched,
        "rows": load.rows,
        **others,
        "ratio_pr323": _ratio(us, others["pr323"]),
        "ratio_pr383": _ratio(us, others["pr383"]),
        "ratio_best": _ratio(us, min(fused, default=None)),
        "baseline_us": _rounded(unfused, 2),
        "speedup": _ratio(unfused, us),
        "differing": differing,
        "clock_mhz": None,  # the card's figures come once the run has ended
        "power_w": None,
    }
    return {name: found[name] for name in COLUMNS}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _ratio(value: float | None, to: float | None) -> float | None:
    return None if value is None or to is None else round(value / to, 3)


def show(rows: list[Row]) -> None:
    """The rows as a table on stdout, without PAPER and columns that hold nothing; under it, what the clock is worth."""
    names = [name for name in rows[0] if name not in PAPER and any(entry[name] is not None for entry in rows)]
    table = Table(*names, caption=f"clock_mhz: {CLOCK}" if "clock_mhz" in names else None)
    for column in table.columns[3:]:
        column.justify = "right"
    for entry in rows:
        table.add_row(*("" if entry[name] is None else str(entry[name]) for name in names))
    Console(width=None if sys.stdout.isatty() else 240).print(table)
