"""What other tools make of the kernel: a Chrome trace of torch's profiler, and how to ask Nsight Compute."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megaproof.bench.measure.points import Options, UsageError

TRACED = 5
"""Launches of a trace."""
SECTIONS = (
    "SpeedOfLight",
    "SpeedOfLight_RooflineChart",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "SchedulerStats",
    "WarpStateStats",
    "SourceCounters",
    "LaunchStats",
    "Occupancy",
)
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum",
    "sm__inst_executed_pipe_tensor.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "sm__cycles_elapsed.avg.per_second",
)
REPORT = "megaproof"


def check_trace(path: Path) -> None:
    """Raises UsageError for a file name that is no .json, or a folder that is not there."""
    if path.suffix != ".json":
        raise UsageError(f"--trace {path} must end in .json")
    if not path.parent.is_dir():
        raise UsageError(f"--trace {path} must lie in a folder that exists")


def write_trace(call: Callable[[], None], flush: Callable[[], None], path: Path) -> None:
    """Chrome trace (chrome://tracing, ui.perfetto.dev) of TRACED calls, L2 flushed before each, host and device."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(TRACED):
            flush()
            call()
        torch.cuda.synchronize()
    seen.export_chrome_trace(str(path))


def ncu_recipe(options: Options) -> str:
    """The command lines that have Nsight Compute look at one launch of the first point, and read its report.

    The clock is left as it is, as it is in every other figure; ncu flushes the caches before each of its passes.
    """
    name, tokens = next(iter(options.points.items()))
    one = replace(
        options,
        shapes={name: options.shapes[name]},
        tokens=tokens[:1],
        routings=options.routings[:1],
        regimes=("flush",),
        repeats=2,
        profiler=False,
        yardsticks=False,
        baseline=False,
        check_output_diff=False,
    )
    ncu = ["ncu", "--target-processes", "all", "--clock-control", "none", "--cache-control", "all"]
    ncu += ["--kernel-name", "regex:moe_", "--launch-skip", "1", "--launch-count", "1", "--import-source", "yes"]
    ncu += [part for section in SECTIONS for part in ("--section", section)]
    ncu += ["--metrics", ",".join(METRICS), "--force-overwrite", "--export", REPORT]
    return "\n".join(
        (
            "# One launch after the one that warms up. --events: ncu and torch's profiler can't both use CUPTI.",
            f"{shlex.join(ncu)} {one.command()}",
            "# Another T, shape or option: add it to this command. The report as text:",
            f"ncu --import {REPORT}.ncu-rep --page details",
            f"ncu --import {REPORT}.ncu-rep --page source --csv  # stalls by SASS instruction",
        )
    )
