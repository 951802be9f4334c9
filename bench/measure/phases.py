"""Where the time of each role goes: `python -m bench phases`, on a build of the kernel that marks its phases.

The marks are those of phase.cuh, compiled in with PHASES alone; the shipped kernel has none. One thread of each
warpgroup reads the clock of its SM: the producer, and one of either math warpgroup. Warps 1 to 3, which pull rows, keep
none: their time shows where others wait for it.

prologue     rows are announced, all ranks meet, every block makes its plan
wait         math: until the first stage of the next task is full, with the barrier after the task before; at the end,
             until the producer has no task any more
operands     producer: until a task's rows have arrived or its activations are computed, where it came too early
load         producer: all else of its role. It asks for copies, and waits for places in the ring
l1, l2       main loop of GEMM 1 or 2, with its waits for the stages after the first
l1 epilogue, l2 epilogue
             SwiGLU and cast, or rows to their slots
meet         the last meeting: until all blocks of all ranks have scattered
combine      the sum of the slots
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from megaproof import HOME
from megaproof.bench import files
from megaproof.bench.measure import points
from megaproof.bench.measure.load import ROUTINGS, Layer
from megaproof.bench.measure.sweep import provenance
from megaproof.bench.measure.timer import WARM_UPS, Timer, captured
from megaproof.kernel.programs import moe
from megaproof.toolchain.errors import BuildError, EnvironmentMissing
from megaproof.toolchain.launch import require_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megaproof.kernel.host.symm_buffer import SymmBuffer
    from megaproof.quant.shapes import Shape

ROLES = ("producer", "math 0", "math 1")
STATUS_WORDS = 6
"""u32 of `Status` in params.cuh; the rows lie behind it, see phase.cuh."""
COST = (
    "Marks cost time themselves, some tens of cycles each and registers that the roles would use: the kernel is slower "
    "than the one that ships, and a phase that is short and frequent looks longer than it is."
)
SCALE = (
    "us are cycles of each SM's clock, scaled so that the row with most of them takes the whole launch by events: "
    "launch and ramp, which no mark sees, are spread over its phases."
)
TOKENS = "8,128,1024"


def phase_names() -> tuple[str, ...]:
    """Those of the enum in phase.cuh, in words: kL1Epilogue is 'l1 epilogue'."""
    found = re.search(r"enum Phase : u32 \{([^}]*)\}", (HOME / "kernel" / "phase.cuh").read_text())
    if found is None:
        raise BuildError("phase.cuh has no enum Phase : u32")
    names = [name.strip() for name in found[1].split(",")]
    if names[-1] != "kPhases":
        raise BuildError(f"phase.cuh: the last phase is {names[-1]} and must be kPhases, their number")
    return tuple(re.sub(r"(?<=.)([A-Z])", r" \1", name[1:]).lower() for name in names[:-1])


NAMES = phase_names()


def status_words(blocks: int) -> int:
    """Words of a status tensor that has a row for each role of so many blocks."""
    return STATUS_WORDS + blocks * len(ROLES) * 2 * (len(NAMES) + 1)


def cycles(status: Tensor, blocks: int) -> Tensor:
    """int64 [blocks, role, phase]: what the rows behind the status word hold; `last` of each row is no phase."""
    rows = status[STATUS_WORDS : status_words(blocks)].clone().view(torch.int64)
    return rows.view(blocks, len(ROLES), len(NAMES) + 1)[..., :-1]


@dataclass(frozen=True)
class Figure:
    """Microseconds of a phase, over the blocks."""

    mean: float
    least: float
    most: float


@dataclass(frozen=True)
class Phases:
    """One T: us of the launch by events (median), the clock that scales, and each role's phases that took time."""

    us: float
    clock_mhz: float
    roles: dict[str, dict[str, Figure]]

    def as_dict(self) -> dict[str, Any]:
        roles = {role: {name: vars(figure) for name, figure in own.items()} for role, own in self.roles.items()}
        return {"us": self.us, "clock_mhz": self.clock_mhz, "roles": roles}


def table(launches: list[Tensor], us: list[float]) -> Phases:
    """cycles [blocks, role, phase] of each launch and its us by events -> the mean launch; each has its own clock.

    The producer marks no wait before its role ends: what stands there is loading.
    """
    longest = [float(own.sum(-1).max()) for own in launches]
    if min(longest) <= 0:
        raise BuildError("no phase took a cycle: the build has no marks, or no launch has run")
    scaled = [own.double() * time / most for own, time, most in zip(launches, us, longest, strict=True)]
    mean = torch.stack(scaled).mean(0)
    wait, load = NAMES.index("wait"), NAMES.index("load")
    mean[:, 0, load] += mean[:, 0, wait]
    mean[:, 0, wait] = 0
    roles = {}
    for role, own in zip(ROLES, mean.unbind(1), strict=True):
        figures = {n: Figure(*map(float, (t.mean(), t.min(), t.max()))) for n, t in zip(NAMES, own.T, strict=True)}
        roles[role] = {name: figure for name, figure in figures.items() if figure.most > 0}
    clock = statistics.median(most / time for most, time in zip(longest, us, strict=True))
    return Phases(statistics.median(us), clock, roles)


def text(row: dict[str, Any]) -> str:
    """A table for people, of a row of `run`."""
    title = f"{row['preset']} T={row['T']} {row['routing']}"
    lines = [f"{title}: {row['us']:.1f} us by events, SM clock {row['clock_mhz']:.0f} MHz or more"]
    lines.append(f"  {'us':12}" + "".join(f"{role:>14} {'min':>7} {'max':>7}" for role in ROLES))
    for name in NAMES:
        shown = [row["roles"][role].get(name) for role in ROLES]
        if any(shown):
            cells = (
                f"{f['mean']:14.1f} {f['least']:7.1f} {f['most']:7.1f}" if f else f"{'-':>14} {'':15}" for f in shown
            )
            lines.append(f"  {name:12}{''.join(cells)}".rstrip())
    sums = (sum(figure["mean"] for figure in row["roles"][role].values()) for role in ROLES)
    return "\n".join([*lines, f"  {'sum':12}" + "".join(f"{total:14.1f} {'':15}" for total in sums).rstrip()])


@contextmanager
def marking(buffer: SymmBuffer) -> Iterator[int]:
    """Launches on this buffer are of the build with marks; gives the blocks of a launch. The buffer has room for them
    from here on, and its plans are made anew."""
    ranks = buffer.size.ranks
    blocks = require_device(buffer.device.index).sms // ranks * ranks
    shipped = buffer.program
    buffer.status = torch.zeros(status_words(blocks), dtype=torch.int32, device=buffer.device)
    buffer.program = moe.phases
    _forget(buffer)
    try:
        yield blocks
    finally:
        buffer.program = shipped
        _forget(buffer)


def _forget(buffer: SymmBuffer) -> None:
    """The plans hold the address of the status tensor."""
    buffer.template = None
    buffer.plans.clear()


def measure(layer: Layer, tokens: int, routing: str, repeats: int, blocks: int) -> Phases:
    """One T inside `marking`, L2 flushed before each launch as in the benchmark."""
    timer, buffer = Timer(False, repeats), layer.buffer
    work = layer.route(tokens, routing)
    work.call()  # a graph can capture it from the second time on
    launch, _ = captured(work.call)
    launches, us = [], []
    for _ in range(WARM_UPS + repeats):
        buffer.status.zero_()
        timer.flush()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        launch()
        after.record()
        buffer.check()
        us.append(1e3 * before.elapsed_time(after))
        launches.append(cycles(buffer.status, blocks).cpu())
    return table(launches[WARM_UPS:], us[WARM_UPS:])


def run(
    shapes: dict[str, Shape], tokens: tuple[int, ...], routing: str, repeats: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each shape and T. Raises EnvironmentMissing without an SM90 GPU."""
    for name, shape in shapes.items():
        layer = Layer(shape, max(points.CAPACITY, *tokens), seed, points.CLAMP, True)
        with marking(layer.buffer) as blocks:
            for t in tokens:
                found = measure(layer, t, routing, repeats, blocks)
                yield {"preset": name, "T": t, "routing": routing, **found.as_dict()}
        layer.buffer.destroy()
        del layer  # the next one's weights need the room


def phases_command(
    presets: Annotated[list[str] | None, typer.Option("--preset", help="Shape; repeatable.")] = None,
    tokens: Annotated[str, typer.Option(help="T, with commas between.", metavar="LIST")] = TOKENS,
    routing: Annotated[str, typer.Option(help="folded or distinct.")] = "folded",
    repeats: Annotated[int, typer.Option(min=1, help="Launches a T.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of inputs and routing.")] = 0,
    json_path: Annotated[str | None, typer.Option("--json", help="Where to write JSON; - is stdout.")] = None,
) -> None:
    """Where each role's time goes: mean, min and max over the blocks, on a build with clocks that is never shipped.

    What each phase means is written in bench/measure/phases.py.
    Exit status: 0 done, 2 usage, 3 environment.
    """
    try:
        shapes = points.shapes(presets or ["dsv4_flash"], {})
        chosen = points.parse_tokens(tokens)
        points.known("--routing", [routing], ROUTINGS)
        files.check_json(json_path)
        tables = sys.stderr if json_path == files.STDOUT else sys.stdout
        device, rows = require_device(), []
        source = provenance(device, {"phases": moe.phases().compile().code("moe_fast")})
        for row in run(shapes, chosen, routing, repeats, seed):
            print(text(row), file=tables, flush=True)
            rows.append(row)
    except points.UsageError as error:
        raise typer.BadParameter(str(error)) from None
    except EnvironmentMissing as error:
        print(f"environment: {error}", file=sys.stderr)
        raise typer.Exit(3) from error
    print(f"{SCALE}\n{COST}", file=tables)
    if json_path is None:
        return
    result = {**source, "scale": SCALE, "cost": COST, "rows": rows}
    if json_path == files.STDOUT:
        print(json.dumps(result, indent=1))
    else:
        files.write_json(result, json_path)
