"""`python -m proof gloo CASE`: ranks as processes against all ranks in one process, every stage bit for bit."""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from rich.console import Console

from megaproof.cases.cases import find
from megaproof.cases.compare import Differs, same
from megaproof.cases.run import dimensions, run_case
from megaproof.proof.worlds import gloo
from megaproof.proof.worlds.supervisor import Limits, Supervisor
from megaproof.reference.ranks import gather
from megaproof.reference.stages import STAGES
from megaproof.toolchain.errors import EnvironmentMissing

console = Console(highlight=False, soft_wrap=True)


def _seconds(value: float) -> float:
    if not value > 0:  # nan is not
        raise typer.BadParameter(f"{value:g} must be more than 0 seconds; inf is no limit")
    return value


def gloo_command(
    case_id: Annotated[str, typer.Argument(metavar="CASE", help="a case id of cases/cases.py; it says how many ranks")],
    quiet: Annotated[
        float,
        typer.Option(callback=_seconds, help="seconds without progress after which a rank hangs, or inf"),
    ] = Limits.quiet_s,
    timeout: Annotated[
        float, typer.Option(callback=_seconds, help="seconds after which a run is too late, or inf")
    ] = Limits.whole_s,
) -> None:
    """Runs the case both ways and compares every stage, bit for bit.

    Exit status: 0 proven, 1 differs or a rank failed, 2 usage, 3 environment.
    """
    try:
        case = find(case_id)
    except KeyError as error:
        raise typer.BadParameter(str(error.args[0]), param_hint="CASE") from None
    try:
        started = time.monotonic()
        limits = Limits(quiet_s=quiet, whole_s=timeout)
        results = gloo.rank_results(case, Supervisor(limits, time.monotonic))
        seconds = time.monotonic() - started
    except EnvironmentMissing as error:
        console.print(f"environment: {error}")
        raise typer.Exit(3) from None
    except gloo.RankFailure as failure:
        console.print(str(failure), style="red", markup=False)
        raise typer.Exit(1) from None

    expected = run_case(case).trace
    actual, differing, compared = gather(dimensions(case), results).trace, 0, 0
    if actual is None:
        raise RuntimeError("the ranks' results have to be traced")
    console.print(f"{case.id}: {case.ranks} processes over gloo, {seconds:.1f} s")
    for stage in ("rows", *STAGES):
        try:
            size = same(stage, expected[stage], actual[stage])
        except Differs as error:
            differing += 1
            console.print(str(error), style="red", markup=False)
        else:
            compared += size * expected[stage].element_size()
            console.print(f"  equal  {stage:11} {size:,} elements")
    sent = torch.stack([result.sent for result in results])  # [from, there or back, to]
    there, back = sent.sum(dim=(0, 2)).tolist()
    inside = int(sent.diagonal(dim1=0, dim2=2).sum())
    console.print(f"  {there:,} bytes sent to experts, {back:,} back; {inside:,} of them from a rank to itself")
    console.print(f"  {compared:,} bytes compared, {differing} of {len(STAGES) + 1} stages differ")
    if differing:
        raise typer.Exit(1)
