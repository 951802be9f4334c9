"""`python -m bench floor`: the time that nothing goes below on a chip, how the kernel's one tile fills it, and the
symmetric memory that a rank needs. No GPU.

The two terms are those of bench/model/chips.py: measured for the H200, by model for a chip that was not at hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from megaproof.bench import files
from megaproof.bench.measure import points
from megaproof.bench.measure.load import ROUTINGS
from megaproof.bench.model.chips import CHIPS, Chip
from megaproof.bench.model.roofline import RANKS, Load
from megaproof.kernel.host import sizes
from megaproof.kernel.host.buffer import BufferSize
from megaproof.reference.scheduler import gemm2_tile_n

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megaproof.quant.shapes import Shape

BY_MODEL, MEASURED = "by model, not measured", "rates as measured"
REGISTERS = {"producer": 56, "math": 224}
"""As registers.cuh shares them out; `kernel build` reads them from the SASS."""
CONFIGURATION = (
    f"tile {sizes.BLOCK_M} x {sizes.BLOCK_N} x {sizes.BLOCK_K}, {sizes.NUM_STAGES} stages, "
    f"registers {'/'.join(map(str, REGISTERS.values()))}, {sizes.shared_bytes()} bytes of shared memory"
)
"""One for every shape, T and chip: there is nothing to choose."""
TOKENS = "1,8,64,512,2048,8192"


@dataclass(frozen=True)
class Tasks:
    """Tiles of a rank, and how they fill a chip: blocks take them as they come, one block an SM."""

    l1: int
    l2: int
    sms: int
    l2_width: int
    """Columns of a tile of GEMM 2, the one thing that is chosen: half a tile where blocks are few."""

    @property
    def per_sm(self) -> float:
        return (self.l1 + self.l2) / self.sms

    @property
    def waves(self) -> int:
        return -(-(self.l1 + self.l2) // self.sms)

    @property
    def last_wave(self) -> float:
        """Share of the SMs that have a task in the last wave, if all tasks were as long."""
        return self.per_sm - self.waves + 1


def tasks(counts: Sequence[int], hidden: int, intermediate: int, sms: int) -> Tasks:
    """counts: rows of each local expert."""
    blocks = sum(-(-rows // sizes.BLOCK_M) for rows in counts)
    narrow = gemm2_tile_n(hidden, blocks, sms)
    l1, l2 = (blocks * -(-n // width) for n, width in ((2 * intermediate, sizes.BLOCK_N), (hidden, narrow)))
    return Tasks(l1, l2, sms, narrow)


@cache
def routed(shape: Shape, tokens: int, routing: str, seed: int) -> tuple[int, ...]:
    """Rows of each local expert, as the benchmark routes them. Kept: a page asks for the same again and again."""
    experts = shape.experts_per_rank(RANKS)
    chosen = ROUTINGS[routing](tokens, experts, shape.topk, seed)
    return tuple(torch.bincount(chosen.flatten(), minlength=experts).tolist())


def row(chip: Chip, shape: Shape, tokens: int, routing: str, seed: int) -> dict[str, Any]:
    """One line of the table. Raises KeyError for an (H, I) without a ceiling."""
    counts = routed(shape, tokens, routing, seed)
    load = Load(shape.hidden, shape.intermediate, tokens, sum(counts), sum(map(bool, counts)))
    found = tasks(counts, shape.hidden, shape.intermediate, chip.sms)
    read, multiply = chip.read_us(load.bytes), chip.multiply_us(load)
    floor = max(read, multiply)
    times = {"read_us": read, "multiply_us": multiply, "floor_us": floor}
    times |= {"tflops": load.flops / floor / 1e6, "hbm_gb_s": load.bytes / floor / 1e3}
    totals = {"bytes": load.bytes, "flops": load.flops}
    waves = {"l1_tasks": found.l1, "l2_tasks": found.l2, "tasks_per_sm": found.per_sm, "last_wave": found.last_wave}
    waves["l2_width"] = found.l2_width
    bound = "read" if read >= multiply else "multiply"
    return {"preset": shape.name, "T": tokens, "routing": routing, **totals, **times, "bound": bound, **waves}


def memory(shape: Shape) -> dict[str, Any]:
    """Bytes of a rank's symmetric buffer among eight, and what it would be if activations of the whole pool stayed."""
    dimensions = shape.experts, shape.topk, shape.hidden, shape.intermediate
    size = BufferSize(RANKS, *dimensions, points.CAPACITY)
    found = {"preset": shape.name, "capacity": points.CAPACITY, "ring_blocks": size.ring_blocks}
    whole = replace(size, ring=size.pool_blocks)
    return found | {"bytes": size.offsets()[1], "whole_pool_bytes": whole.offsets()[1]}


def memory_text(rows: list[dict[str, Any]]) -> str:
    """A line for people."""
    mib = [(r["preset"], r["bytes"] / 2**20, r["whole_pool_bytes"] / 2**20) for r in rows]
    each = "; ".join(f"{name} {own:,.0f} MiB, {all_ / own:.1f} times less than {all_:,.0f}" for name, own, all_ in mib)
    return (
        f"symmetric memory of a rank of {RANKS}, capacity {points.CAPACITY}, beside one with room for the whole pool: "
        + each
    )


def text(rows: list[dict[str, Any]]) -> str:
    """A table for people."""
    head = (
        "preset          T       MB    GFLOP  read us  mult us floor us TFLOP/s   GB/s  by        "
        "L1 tasks L2 tasks width  per SM last wave"
    )
    lines = [head]
    for r in rows:
        cells = f"{r['preset']:11} {r['T']:5} {r['bytes'] / 1e6:8.1f} {r['flops'] / 1e9:8.1f}"
        cells += "".join(f" {r[name]:8.1f}" for name in ("read_us", "multiply_us", "floor_us"))
        cells += f" {r['tflops']:7.1f} {r['hbm_gb_s']:6.0f}  {r['bound']:8} {r['l1_tasks']:9} {r['l2_tasks']:8}"
        cells += f" {r['l2_width']:5} {r['tasks_per_sm']:7.2f} {r['last_wave']:9.0%}"
        lines.append(cells)
    return "\n".join(lines)


def floor_command(
    chip: Annotated[str, typer.Option(help=f"One of {', '.join(CHIPS)}.")] = "H20",
    presets: Annotated[list[str] | None, typer.Option("--preset", help="Shape; repeatable. Default: all four.")] = None,
    tokens: Annotated[str, typer.Option(help="T, with commas between.", metavar="LIST")] = TOKENS,
    routing: Annotated[str, typer.Option(help="folded or distinct.")] = "folded",
    seed: Annotated[int, typer.Option(min=0, help="Of the routing.")] = 0,
    json_path: Annotated[str | None, typer.Option("--json", help="Where to write JSON; - is stdout.")] = None,
) -> None:
    """How fast a chip could run one rank of eight, how many tiles each SM gets, and its symmetric memory; needs no GPU.

    Exit status: 0 done, 2 usage.
    """
    try:
        (name,) = points.known("--chip", [chip], CHIPS)
        shapes = points.shapes(presets, {})
        chosen = points.parse_tokens(tokens)
        points.known("--routing", [routing], ROUTINGS)
        files.check_json(json_path)
    except points.UsageError as error:
        raise typer.BadParameter(str(error)) from None
    what = CHIPS[name]
    basis = MEASURED if what.measured else BY_MODEL
    rows = [row(what, shape, t, routing, seed) for shape in shapes.values() for t in chosen]
    published = {"name": name, "sms": what.sms, "tb_s": what.tb_s, "fp8_tflops": what.fp8_tflops}
    chip_of_result = {**published, "measured": what.measured}
    result: dict[str, Any] = {"chip": chip_of_result, "basis": basis, "configuration": CONFIGURATION, "rows": rows}
    result["memory"] = [memory(shape) for shape in shapes.values()]
    if json_path == files.STDOUT:
        print(json.dumps(result, indent=1))
        return
    print(f"{name}, {what.sms} SMs, {basis}; {CONFIGURATION}, for every shape and T\n{text(rows)}")
    print(memory_text(result["memory"]))
    if json_path:
        files.write_json(result, json_path)
