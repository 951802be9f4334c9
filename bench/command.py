"""The command line of the benchmark: options in, verdict out."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from megaproof.bench import files
from megaproof.bench.measure import points, profiling
from megaproof.bench.measure.load import ROUTINGS
from megaproof.bench.measure.points import CAPACITY, Options, UsageError
from megaproof.bench.measure.rows import show
from megaproof.bench.measure.sweep import measure
from megaproof.bench.measure.timer import LEAST_REPEATS
from megaproof.bench.report import compare, plot
from megaproof.kernel.host.sizes import GROUP
from megaproof.toolchain.errors import EnvironmentMissing


def sweep_command(
    newer: Annotated[
        Path | None, typer.Argument(metavar="[B.json]", help="After --compare A.json: compare B with A, no GPU.")
    ] = None,
    presets: Annotated[list[str] | None, typer.Option("--preset", help="Shape; repeatable. Default: all four.")] = None,
    hidden: Annotated[int | None, typer.Option(help="H of a shape of your own, with the three below.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="I.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of the measured rank, an eighth of the layer's.")] = None,
    topk: Annotated[int | None, typer.Option(help="K.")] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Default: powers of two to 8192, the peers' T, both sides of thresholds.", metavar="LIST"),
    ] = None,
    routing: Annotated[list[str] | None, typer.Option(help="folded or distinct. Default: both.")] = None,
    capacity: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens that the buffer holds. Default: {CAPACITY} or more.")
    ] = None,
    clamp: Annotated[str, typer.Option(help="Of the activation; or none.")] = "10",
    fast_math: Annotated[bool, typer.Option("--fast-math/--precise", help="silu.")] = True,
    granularity: Annotated[int, typer.Option(help="L2 activations that share a scale: 64 or 128.")] = GROUP,
    l2_flush: Annotated[bool, typer.Option("--l2-flush", help="L2 flushed before each launch; the default.")] = False,
    sustained: Annotated[
        bool, typer.Option("--sustained", help="Back to back, clock and power settled. With --l2-flush: both.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=2, help=f"Launches a point; {LEAST_REPEATS} or more to report.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of inputs and routing.")] = 0,
    profiler: Annotated[
        bool, typer.Option("--profiler/--events", help="Kernel durations, or events around a graph.")
    ] = True,
    yardsticks: Annotated[
        bool, typer.Option("--yardsticks/--no-yardsticks", help="Bulk read and dense GEMMs in the same run.")
    ] = True,
    baseline: Annotated[bool, typer.Option("--baseline", help="Times the unfused baseline too; slow.")] = False,
    check_output_diff: Annotated[
        bool, typer.Option("--check-output-diff", help="Compares y with the exact baseline, bit for bit; slow.")
    ] = False,
    json_path: Annotated[
        str | None, typer.Option("--json", help="Where to write JSON, after every point; - is stdout.")
    ] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="A picture, .png or .svg; matplotlib.")] = None,
    trace_path: Annotated[
        Path | None, typer.Option("--trace", help="Chrome trace of a few launches of the last point, .json.")
    ] = None,
    old: Annotated[
        Path | None, typer.Option("--compare", metavar="A.json", help="An earlier run; with B.json, nothing is run.")
    ] = None,
    fail_slower: Annotated[
        float | None, typer.Option(min=0, metavar="PERCENT", help="Status 1 if slower than --compare's by more.")
    ] = None,
    ncu: Annotated[bool, typer.Option("--ncu", help="Prints how to profile a point with ncu, and ends.")] = False,
) -> None:
    """Times the fused kernel: one rank with the load of one of eight, beside floor, yardsticks, baseline and peers.

    Exit status: 0 done, 1 slower than --fail-slower allows, y differs from the exact baseline's or a point failed (the
    run goes on), 2 usage, 3 environment, 5 --compare has no point in common.
    """
    try:
        sizes = {"hidden": hidden, "intermediate": intermediate, "experts": experts, "topk": topk}
        options = Options(
            shapes=points.shapes(presets, sizes),
            tokens=None if tokens is None else points.parse_tokens(tokens),
            routings=points.known("--routing", routing or list(ROUTINGS), ROUTINGS),
            regimes=points.regimes(l2_flush, sustained),
            capacity=capacity,
            clamp=points.parse_clamp(clamp),
            fast_math=fast_math,
            granularity=points.checked_granularity(granularity),
            repeats=repeats,
            seed=seed,
            profiler=profiler,
            yardsticks=yardsticks,
            baseline=baseline,
            check_output_diff=check_output_diff,
        )
        if ncu:
            print(profiling.ncu_recipe(options))
            return
        # All that can be wrong is found before anything is measured: a mistake costs no GPU time.
        if fail_slower is not None and old is None:
            raise UsageError(f"--fail-slower {fail_slower:g} needs --compare A.json")
        if newer is not None and old is None:
            raise UsageError(f"{newer} needs --compare A.json before it")
        for option, path in (("--trace", trace_path), ("--json", json_path)):
            if newer is not None and path is not None:
                raise UsageError(f"{option} {path} can't go with two results: nothing is run")
        files.check_json(json_path)
        if plot_path is not None:
            plot.check(plot_path)
        if trace_path is not None:
            profiling.check_trace(trace_path)
        whole = fail_slower is not None
        before = None if old is None else compare.read_rows(old, whole)
        if newer is not None:
            compare.read_rows(newer, whole)
            result = json.loads(newer.read_text())
            for pair in compare.pairs(result["rows"], before):
                print(pair)
        else:
            result = measure(options, trace_path, partial(_keep, json_path))
            _write(result, json_path)
        if plot_path is not None and result["rows"]:
            plot.plot(result, plot_path)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None
    except EnvironmentMissing as error:
        print(f"environment: {error}", file=sys.stderr)
        raise typer.Exit(3) from error
    status = _verdict(result["rows"], before, fail_slower)
    raise typer.Exit(1 if newer is None and result.get("failed") else status)


def _keep(json_path: str | None, result: dict[str, Any]) -> None:
    """What has been measured so far; a disk that is full now may not be so at the end."""
    if json_path in (None, files.STDOUT):
        return
    try:
        files.write_json(result, json_path)
    except OSError as error:
        print(f"--json {json_path}: {error}", file=sys.stderr)


def _write(result: dict[str, Any], json_path: str | None) -> None:
    if json_path == files.STDOUT:
        print(json.dumps(result, indent=1))
        return
    if json_path:
        files.write_json(result, json_path)
    if result["rows"]:
        show(result["rows"])


def _verdict(rows: list[dict[str, Any]], before: list[dict[str, Any]] | None, fail_slower: float | None) -> int:
    """Exit status, said on stderr: wrong bits come before slow ones."""
    wrong = [row for row in rows if row.get("differing")]
    for row in wrong:
        at = f"{row['preset']} T={row['T']} {row['routing']} {row['regime']}"
        print(f"differs: {at}: {row['differing']} elements of y are not the exact baseline's", file=sys.stderr)
    if before is None:
        return int(bool(wrong))
    both = compare.pairs(rows, before)
    for line in compare.report(both, fail_slower):
        print(line, file=sys.stderr)
    return int(bool(wrong)) or compare.verdict(both, fail_slower)
