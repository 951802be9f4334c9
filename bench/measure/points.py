"""What a run measures: shapes, tokens, routings and regimes of the command line, checked without a GPU."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch

from megaproof.bench import peers
from megaproof.bench.measure.load import ROUTINGS
from megaproof.bench.measure.timer import REGIMES
from megaproof.bench.model.chips import H200
from megaproof.bench.model.roofline import RANKS
from megaproof.kernel.host import sizes
from megaproof.quant.shapes import SHAPES, Shape
from megaproof.reference.scheduler import evicts_weights_first, gemm2_tile_n

PRESETS = tuple(name for name in SHAPES if name != "smoke")
"""The shapes of models, each of which is measured."""
CAPACITY, CLAMP = 8192, 10.0
"""The peers' own."""
SMS, FEW_TOKENS = H200.sms, 64
"""Of an H200, whose sweep is measured; T up to which every one is looked at for a change of the schedule."""
SIZES = ("hidden", "intermediate", "experts", "topk")
"""What makes a shape; experts are those of the measured rank."""


class UsageError(ValueError):
    """An option that breaks a rule; names option, value and rule."""


@dataclass(frozen=True)
class Options:
    """A run, as it was asked for. `points` says what it measures."""

    shapes: dict[str, Shape]
    tokens: tuple[int, ...] | None = None
    """None: the default of each shape."""
    routings: tuple[str, ...] = tuple(ROUTINGS)
    regimes: tuple[str, ...] = ("flush",)
    capacity: int | None = None
    """None: CAPACITY, or as many tokens as there are."""
    clamp: float | None = CLAMP
    fast_math: bool = True
    granularity: int = sizes.GROUP
    repeats: int = 30
    seed: int = 0
    profiler: bool = True
    yardsticks: bool = True
    """Whether the bulk read and the dense GEMMs are measured beside the kernel."""
    baseline: bool = False
    check_output_diff: bool = False
    points: dict[str, list[int]] = field(init=False)
    """Shape -> the T that are measured."""

    def __post_init__(self) -> None:
        chosen = {name: self._tokens(name, shape) for name, shape in self.shapes.items()}
        object.__setattr__(self, "points", chosen)

    def _tokens(self, name: str, shape: Shape) -> list[int]:
        most = self.capacity
        if self.tokens is None:
            return [t for t in default_tokens(name, shape) if most is None or t <= most]
        if most is not None and max(self.tokens) > most:
            raise UsageError(f"--tokens {max(self.tokens)} must be at most --capacity {most}")
        return list(self.tokens)

    def capacity_of(self, name: str) -> int:
        """Tokens that the buffer of a shape is made for."""
        return self.capacity or max(CAPACITY, *self.points[name])

    def command(self) -> str:
        """The command line that measures the same."""
        parts = ["python", "-m", "bench", "sweep"]
        for name, shape in self.shapes.items():
            if name in SHAPES:
                parts += ["--preset", name]
            else:
                dimensions = shape.hidden, shape.intermediate, shape.experts_per_rank(RANKS), shape.topk
                parts += [
                    text for pair in zip(SIZES, dimensions, strict=True) for text in (f"--{pair[0]}", str(pair[1]))
                ]
        parts += ["--tokens", ",".join(map(str, self.tokens))] if self.tokens else []
        parts += [text for routing in self.routings for text in ("--routing", routing)]
        parts += ["--l2-flush"] if "flush" in self.regimes else []
        parts += ["--sustained"] if "sustained" in self.regimes else []
        parts += ["--capacity", str(self.capacity)] if self.capacity else []
        parts += ["--clamp", "none" if self.clamp is None else f"{self.clamp:g}"]
        parts += ["--fast-math" if self.fast_math else "--precise"]
        parts += ["--granularity", str(self.granularity)] if self.granularity != sizes.GROUP else []
        parts += ["--repeats", str(self.repeats), "--seed", str(self.seed)]
        parts += ["--profiler" if self.profiler else "--events"]
        parts += [] if self.yardsticks else ["--no-yardsticks"]
        parts += ["--baseline"] if self.baseline else []
        parts += ["--check-output-diff"] if self.check_output_diff else []
        return shlex.join(parts)

    def what(self) -> str:
        """A result's first line, in words."""
        clamp = "no clamp" if self.clamp is None else f"clamp {self.clamp:g}"
        capacity = f"capacity {self.capacity or f'{CAPACITY} or more'}"
        scales = "" if self.granularity == sizes.GROUP else f"granularity {self.granularity}, "
        recipe = f"{'fast' if self.fast_math else 'precise'} silu, {clamp}, {scales}{capacity}"
        return (
            f"fused kernel, one rank with the load of one of eight, {recipe}; median of {self.repeats}, us_spread is "
            "half of p90 - p10; columns are explained in bench/measure/rows.py"
        )


def default_tokens(name: str, shape: Shape) -> list[int]:
    """Powers of two up to 8192, the peers' T of the shape, and both sides of every threshold of tile and schedule."""
    powers = {1 << n for n in range(14)}
    measured = {int(t) for own in peers.PEERS.values() for us in own["us"].get(name, {}).values() for t in us}
    return sorted(powers | measured | set(sides(shape, sizes.THRESHOLDS)) | set(turns(shape)))


def schedule(shape: Shape, tokens: int) -> tuple[int, bool, bool, bool, bool]:
    """What the schedule of the folded routing depends on: GEMM 2's width, more than one group, a ring taken again,
    whether the blocks meet before rows travel, and whether weights stay in L2 as long as other bytes."""
    experts = shape.experts_per_rank(RANKS)
    counts = torch.bincount(ROUTINGS["folded"](tokens, experts, shape.topk, 0).flatten(), minlength=experts)
    blocks = int((-(-counts // sizes.BLOCK_M)).sum())
    met = tokens * shape.topk > sizes.FEW_SLOTS
    stay = not evicts_weights_first(shape.hidden, shape.intermediate, blocks)
    return gemm2_tile_n(shape.hidden, blocks, SMS), blocks > sizes.WAVE_BLOCKS, blocks > sizes.RING_BLOCKS, met, stay


@cache
def turns(shape: Shape) -> tuple[int, ...]:
    """The last T before and the first T after each change of `schedule`, up to CAPACITY.

    The width may go to and fro while blocks are few; all else comes once.
    """
    found, few = set(), [schedule(shape, t) for t in range(1, FEW_TOKENS + 1)]
    for t, (before, after) in enumerate(pairwise(few), 1):
        found |= {t, t + 1} if before != after else set()
    for changed in (1, 2, 3, 4):
        low, high = FEW_TOKENS, CAPACITY
        if few[-1][changed] or not schedule(shape, high)[changed]:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if schedule(shape, middle)[changed] else (middle, high)
        found |= {low, high}
    return tuple(sorted(found))


def sides(shape: Shape, thresholds: Iterable[float]) -> list[int]:
    """The last T below and the first T at each threshold, in rows an expert on average (`sizes.THRESHOLDS`)."""
    experts, found = shape.experts_per_rank(RANKS), set()
    for rows in thresholds:
        first = max(1, math.floor(rows * experts / shape.topk))
        while first * shape.topk / experts < rows:
            first += 1
        found |= {t for t in (first - 1, first) if t >= 1}
    return sorted(found)


def parse_tokens(text: str) -> tuple[int, ...]:
    """'1,8,32' -> (1, 8, 32). Raises UsageError."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UsageError(f"--tokens {text!r} must be positive whole numbers with commas between, such as 1,8,32")
    return tuple(dict.fromkeys(counts))


def parse_clamp(text: str) -> float | None:
    """'10' -> 10.0, 'none' -> None. Raises UsageError."""
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise UsageError(f"--clamp {text!r} must be a finite number from 0 up, or none")
    return value


def checked_granularity(value: int) -> int:
    """Raises UsageError for one that the kernel has no cubin for."""
    if value not in sizes.GRANULARITIES:
        raise UsageError(f"--granularity {value} must be {' or '.join(map(str, sizes.GRANULARITIES))}")
    return value


def known(option: str, names: Sequence[str], allowed: Iterable[str]) -> tuple[str, ...]:
    """The names, each once. Raises UsageError naming those that are not allowed."""
    allowed = list(allowed)
    if unknown := [name for name in names if name not in allowed]:
        raise UsageError(f"{option} {', '.join(unknown)}: name one of {', '.join(allowed)}")
    return tuple(dict.fromkeys(names))


def shapes(presets: Sequence[str] | None, own: dict[str, int | None]) -> dict[str, Shape]:
    """Name -> shape: presets (all four when nothing is named), or the one that all of SIZES make. Raises UsageError."""
    given = {name: value for name, value in own.items() if value is not None}
    if not given:
        return {name: SHAPES[name] for name in known("--preset", presets or PRESETS, PRESETS)}
    if presets:
        raise UsageError(f"--preset {presets[0]} must be alone: --{next(iter(given))} makes a shape of its own")
    if missing := [f"--{name}" for name in SIZES if name not in given]:
        raise UsageError(f"--{next(iter(given))} {next(iter(given.values()))} needs {', '.join(missing)} beside it")
    for name in ("hidden", "intermediate"):
        if given[name] <= 0 or given[name] % 128:
            raise UsageError(f"--{name} {given[name]} must be a positive multiple of 128")
    hidden, intermediate, experts, topk = (given[name] for name in SIZES)
    if not 1 <= experts <= sizes.MAX_EXPERTS:
        raise UsageError(f"--experts {experts} must be in [1, {sizes.MAX_EXPERTS}]: experts of the measured rank")
    if not 1 <= topk <= min(32, experts):
        raise UsageError(f"--topk {topk} must be in [1, {min(32, experts)}]: at most 32, and at most --experts")
    name = f"h{hidden}-i{intermediate}-e{experts}-k{topk}"
    return {name: Shape(name, hidden, intermediate, RANKS * experts, topk)}


def regimes(l2_flush: bool, sustained: bool) -> tuple[str, ...]:
    """Keys of REGIMES: those that are asked for, or flushed alone."""
    chosen = dict(zip(REGIMES, (l2_flush or not sustained, sustained), strict=True))
    return tuple(name for name, wanted in chosen.items() if wanted)
