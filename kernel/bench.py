"""`python -m kernel bench`: kernel time of the fused layer on one rank with the load of one of eight.

Beside each time stand the roofline's floor and what public kernels took on an H200 (`peers_h200.json`).
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernel import api
from kernel.build import FOLDER, EnvironmentMissing, nvrtc_version, sources_sha256
from kernel.launch import Device, require_device
from kernel.roofline import Load, floor_us
from quant.recipe import SHAPES, Shape
from quant.scale import input_scale

PEERS: dict[str, Any] = json.loads((FOLDER / "peers_h200.json").read_text())
RANKS = 8
"""The layer is spread over as many; one of them is measured."""
CAPACITY = 8192
CLAMP = 10.0
WARM_UPS, LEAST_REPEATS = 3, 20
FLUSH_BYTES, FLUSHES = 1 << 30, 4
"""4 GiB of memset take about a millisecond: L2 holds none of our bytes, and the host runs ahead of the device."""
KERNEL = "moe_"
"""In the name of every kernel that a call launches."""

Row = dict[str, Any]
Weights = tuple[Tensor, Tensor]


# --- the load ---------------------------------------------------------------------------------------------------------


def folded(tokens: int, experts: int, topk: int, seed: int) -> Tensor:
    """int64 [T, K], the peers' routing: top-K of the layer's experts by uniform scores, index modulo the local ones.

    A token may name an expert twice; every slot is one row all the same.
    """
    return _top(tokens, RANKS * experts, topk, seed) % experts


def distinct(tokens: int, experts: int, topk: int, seed: int) -> Tensor:
    """int64 [T, K]: K distinct local experts a token, uniform."""
    return _top(tokens, experts, topk, seed)


def _top(tokens: int, experts: int, topk: int, seed: int) -> Tensor:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(topk).indices


ROUTINGS = {"folded": folded, "distinct": distinct}


def quantised_rows(x: Tensor) -> Weights:
    """(fp8 [T, H], scales [T, H/128]), one scale a token and 128 columns."""
    groups = x.unflatten(-1, (-1, 128))
    scale = input_scale(groups.abs().amax(-1))
    return (groups / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn), scale


def quantised_blocks(w: Tensor) -> Weights:
    """(fp8 [N, K], scales [N/128, K/128]), one scale a block of 128 x 128."""
    blocks = w.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale = input_scale(blocks.abs().amax((1, 3)))
    return (blocks / scale[:, None, :, None]).reshape(w.shape).to(torch.float8_e4m3fn), scale


def random_weights(experts: int, rows: int, columns: int, generator: torch.Generator) -> Weights:
    """0.05 times normal values, quantised one expert after the other: a layer in float32 would not fit."""
    codes = torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn, device=generator.device)
    scales = torch.empty(experts, rows // 128, columns // 128, device=generator.device)
    for expert in range(experts):
        w = torch.randn(rows, columns, generator=generator, device=generator.device).mul_(0.05)
        codes[expert], scales[expert] = quantised_blocks(w)
    return codes, scales


class Layer:
    """One rank of a preset on the GPU: weights and a buffer, made once for all T."""

    def __init__(self, shape: Shape, capacity: int, seed: int) -> None:
        self.shape, self.seed, self.experts = shape, seed, shape.experts_per_rank(RANKS)
        self.generator = torch.Generator("cuda").manual_seed(seed)
        h, i, e = shape.hidden, shape.intermediate, self.experts
        l1, l2 = (random_weights(e, *size, self.generator) for size in ((2 * i, h), (h, i)))
        self.l1, self.l2 = api.transform_weights_for_mega_moe_sm90(l1, l2)
        self.buffer = api.get_symm_buffer_for_mega_moe(None, e, capacity, shape.topk, h, i)
        self.stats = torch.zeros(e, dtype=torch.int32, device="cuda")

    def route(self, tokens: int, routing: str) -> tuple[Load, Callable[[], None]]:
        """Fills the buffer's inputs; returns what the rank has to do, and the call that does it."""
        shape, rank, generator = self.shape, self.buffer.rank(0), self.generator
        topk_idx = ROUTINGS[routing](tokens, self.experts, shape.topk, self.seed)
        x = torch.randn(tokens, shape.hidden, generator=generator, device="cuda")
        rank.x[:tokens], rank.x_sf[:tokens] = quantised_rows(x)
        rank.topk_idx[:tokens] = topk_idx.cuda()
        weights = torch.rand(tokens, shape.topk, generator=generator, device="cuda")
        rank.topk_weights[:tokens] = weights / weights.sum(-1, keepdim=True)
        y = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")

        def call() -> None:
            api.fp8_mega_moe(y, self.l1, self.l2, self.buffer, self.stats, activation_clamp=CLAMP, fast_math=True)

        touched = topk_idx.unique().numel()
        return Load(shape.hidden, shape.intermediate, tokens, topk_idx.numel(), touched), call


# --- time -------------------------------------------------------------------------------------------------------------


class Timer:
    """Device times of repeated calls, L2 flushed before each: the profiler's, or CUDA events around a graph."""

    def __init__(self, profiler: bool, repeats: int) -> None:
        self.repeats = repeats
        self.measure = self._profiled if profiler else self._by_events
        self.method = "profiler (CUPTI) kernel durations" if profiler else ""
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def flush(self) -> None:
        """Queues the memsets."""
        for _ in range(FLUSHES):
            self._flushed.zero_()

    def __call__(self, call: Callable[[], None]) -> list[float]:
        """Microseconds of each repeat."""
        call()
        torch.cuda.synchronize()
        return self.measure(call)

    def _profiled(self, call: Callable[[], None]) -> list[float]:
        from torch.profiler import ProfilerActivity, profile

        runs = WARM_UPS + self.repeats
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(runs):
                self.flush()
                call()
            torch.cuda.synchronize()
        events = [e for e in seen.events() if KERNEL in e.name and e.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda event: event.time_range.start)
        launches, rest = divmod(len(events), runs)
        if rest or not launches:
            print(f"the profiler saw {len(events)} kernels in {runs} runs: using events from here", file=sys.stderr)
            self.measure = self._by_events
            return self.measure(call)
        times = [event.time_range.elapsed_us() for event in events]
        return [sum(times[n : n + launches]) for n in range(WARM_UPS * launches, len(times), launches)]

    def _by_events(self, call: Callable[[], None]) -> list[float]:
        launch, what = _captured(call)
        self.method = f"CUDA events around {what}"
        pairs = []
        for _ in range(WARM_UPS + self.repeats):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush()
            before.record()
            launch()
            after.record()
            pairs.append((before, after))
        torch.cuda.synchronize()
        return [1e3 * before.elapsed_time(after) for before, after in pairs[WARM_UPS:]]


def _captured(call: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """A graph keeps the host's share of a call out of the time between two events."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, "the call (it cannot be captured)"
    return graph.replay, "a graph of the call"


def spread(times: list[float]) -> float:
    """Half the distance from the 10th to the 90th percentile."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return (tenths[-1] - tenths[0]) / 2


def median_and_peak(samples: str) -> dict[str, float | None]:
    """nvidia-smi's lines 'MHz, W' -> median clock, maximum power; None without a line of numbers."""
    found = re.findall(r"^(\d+), ([\d.]+)$", samples, re.MULTILINE)
    clocks, watts = [float(clock) for clock, _ in found], [float(power) for _, power in found]
    return {"clock_mhz": statistics.median(clocks) if clocks else None, "power_w": max(watts, default=None)}


@contextmanager
def sampled(device: Device) -> Iterator[dict[str, float | None]]:
    """What nvidia-smi shows each 50 ms, in the dictionary once the block ends: an indication, flushes included."""
    card = median_and_peak("")
    uuid = torch.cuda.get_device_properties(device.index).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as samples:  # a pipe that nobody reads would fill up
        try:
            process = subprocess.Popen([*command, "--loop-ms=50"], stdout=samples, stderr=subprocess.DEVNULL)
        except OSError:
            yield card
            return
        try:
            yield card
        finally:
            process.terminate()
            process.wait()
            samples.seek(0)
            card.update(median_and_peak(samples.read()))


# --- rows -------------------------------------------------------------------------------------------------------------


def peers(preset: str, routing: str, tokens: int) -> dict[str, float | None]:
    """What the public kernels took for this point; None where they were not measured."""
    table = PEERS["us" if routing == "folded" else "us_distinct"].get(preset, {})
    return {name: table.get(name, {}).get(str(tokens)) for name in PEERS["source"]}


def row(preset: str, routing: str, load: Load, times: list[float]) -> Row:
    """One point as it is written to JSON."""
    us, others = statistics.median(times), peers(preset, routing, load.tokens)
    return {
        "preset": preset,
        "T": load.tokens,
        "routing": routing,
        "us": round(us, 2),
        "us_spread": round(spread(times), 2),
        "tflops": round(load.flops / us / 1e6, 1),
        "hbm_gb_s": round(load.bytes / us / 1e3),
        "share_floor": round(floor_us(load) / us, 3),
        "touched": load.touched,
        "rows": load.rows,
        **others,
        "ratio_pr323": round(us / others["pr323"], 3) if others["pr323"] else None,
    }


def compare(new: list[Row], old: list[Row], percent: float) -> tuple[int, list[str]]:
    """(points in both, a sentence for each that is slower by more than `percent`)."""

    def by_point(rows: list[Row]) -> dict[tuple[str, int, str], float]:
        return {(r["preset"], r["T"], r["routing"]): r["us"] for r in rows}

    ours, theirs = by_point(new), by_point(old)
    both = [point for point in ours if point in theirs]
    slower = [
        f"{point[0]} T={point[1]} {point[2]}: {ours[point]} us, was {theirs[point]}"
        for point in both
        if ours[point] > theirs[point] * (1 + percent / 100)
    ]
    return len(both), slower


def sweep(points: dict[str, list[int]], routings: list[str], timer: Timer, seed: int) -> list[Row]:
    """Measures every T of every preset; progress goes to stderr."""
    rows = []
    for preset, tokens in points.items():
        layer = Layer(SHAPES[preset], max(CAPACITY, *tokens), seed)
        for t in tokens:
            for routing in routings:
                load, call = layer.route(t, routing)
                times = timer(call)
                layer.buffer.check()
                rows.append(row(preset, routing, load, times))
                print(f"{preset} T={t} {routing}: {rows[-1]['us']} us", file=sys.stderr)
        del layer, call  # the next preset needs the memory
        torch.cuda.empty_cache()
    return rows


def show(rows: list[Row]) -> None:
    """The rows as a table on stdout."""
    table = Table(*rows[0])
    for column in table.columns[3:]:
        column.justify = "right"
    for entry in rows:
        table.add_row(*("" if value is None else str(value) for value in entry.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


# --- the command ------------------------------------------------------------------------------------------------------


def _tokens(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise typer.BadParameter(
            f"--tokens {text!r} must be positive whole numbers with commas between, such as 1,8,32"
        )
    return counts


def _known(option: str, names: list[str], known: list[str]) -> list[str]:
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{option} {', '.join(unknown)}: name one of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _old_rows(path: Path | None) -> list[Row]:
    """Read before anything is measured: a wrong path costs no GPU time."""
    if path is None:
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        compare(rows, rows, 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"--compare {path} is not a result of this command ({error!r})") from None
    return rows


def bench_command(
    presets: Annotated[
        list[str] | None, typer.Option("--preset", help="Shape; repeatable. Default: flash, pro.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Default: T of the peers.", metavar="LIST")] = None,
    routing: Annotated[list[str] | None, typer.Option(help="folded or distinct. Default: both.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help=f"Launches a point; {LEAST_REPEATS} or more to report.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of inputs and routing.")] = 0,
    profiler: Annotated[
        bool, typer.Option("--profiler/--events", help="Kernel durations, or events around a graph.")
    ] = True,
    json_path: Annotated[str | None, typer.Option("--json", help="Where to write JSON; - is stdout.")] = None,
    old: Annotated[Path | None, typer.Option("--compare", help="JSON of an earlier run.")] = None,
    fail_slower: Annotated[
        float | None, typer.Option(min=0, metavar="PERCENT", help="Status 1 if slower by more.")
    ] = None,
) -> None:
    """Times the fused kernel: one rank with the load of one of eight, all T, L2 flushed, beside floor and peers.

    Exit status: 0 done, 1 slower than --compare allows, 2 usage, 3 environment, 5 --compare has no point in common.
    """
    names = _known("--preset", presets or ["dsv4_flash", "dsv4_pro"], list(PEERS["shapes"]))
    routings = _known("--routing", routing or list(ROUTINGS), list(ROUTINGS))
    chosen = _tokens(tokens)
    points = {name: chosen or [int(t) for t in PEERS["us"][name]["pr323"]] for name in names}
    if fail_slower is not None and old is None:
        raise typer.BadParameter("--fail-slower needs --compare OLD.json")
    old_rows = _old_rows(old)
    try:
        device = require_device()
        timer = Timer(profiler, repeats)
        with sampled(device) as card:
            rows = sweep(points, routings, timer, seed)
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "nvrtc": nvrtc_version()}
    except EnvironmentMissing as error:
        print(f"environment: {error}", file=sys.stderr)
        raise typer.Exit(3) from error
    options = [f"--preset {name}" for name in names] + [f"--routing {name}" for name in routings]
    options += [f"--tokens {tokens}"] if tokens else []
    options += [f"--repeats {repeats}", f"--seed {seed}", "--profiler" if profiler else "--events"]
    result = {
        "what": "fused kernel, one rank with the load of one of eight, fast silu, clamp 10, capacity 8192 or more; "
        f"median of {repeats} after {WARM_UPS}, us_spread is half of p90 - p10",
        "device": device.name,
        "driver": device.driver,
        "versions": {**versions, "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
        "regime": "l2 flushed",
        "method": timer.method,
        **card,
        "sources_sha256": sources_sha256(),
        "command": " ".join(["python -m kernel bench", *options]),
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if json_path == "-":
        print(text)
    else:
        show(rows)
        if json_path:
            Path(json_path).write_text(text + "\n")
    if old is not None:
        count, slower = compare(rows, old_rows, fail_slower or 0.0)
        for sentence in slower:
            print(f"slower: {sentence}", file=sys.stderr)
        print(f"{count} points compared, {len(slower)} slower", file=sys.stderr)
        if not count:
            raise typer.Exit(5)
        if slower and fail_slower is not None:
            raise typer.Exit(1)
