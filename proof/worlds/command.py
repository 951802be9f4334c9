"""`python -m proof gloo CASE`: ranks as processes against all ranks in one process, every stage bit for bit."""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from rich.console import Console

from megaproof.cases import inputs
from megaproof.cases.cases import find
from megaproof.cases.compare import Differs, same
from megaproof.proof.worlds import gloo
from megaproof.proof.worlds.supervisor import Limits, Supervisor
from megaproof.reference.arguments import Dimensions
from megaproof.reference.layer import moe_layer
from megaproof.reference.ranks import gather
from megaproof.reference.stages import STAGES
from megaproof.toolchain.build import EnvironmentMissing

console = Console(highlight=False, soft_wrap=True)


def gloo_command(
    case_id: Annotated[str, typer.Argument(metavar="CASE", help="a case id of cases/cases.py; it says how many ranks")],
    quiet: Annotated[
        float, typer.Option(min=0, help="seconds without progress after which a rank counts as hung")
    ] = Limits.quiet_s,
    timeout: Annotated[float, typer.Option(min=0, help="seconds after which a run is too late")] = Limits.whole_s,
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

    made = inputs.make(case, "cuda" if torch.cuda.is_available() else "cpu")
    expected = moe_layer(case.recipe, *made.arguments(), trace=True, experts=case.shape.experts)
    dimensions = Dimensions(
        case.ranks, case.shape.hidden, case.shape.topk, case.shape.experts, case.tokens, made.x[0].device
    )
    actual, differing, compared = gather(dimensions, results), 0, 0
    if expected.trace is None or actual.trace is None:
        raise RuntimeError("both results have to be traced")
    console.print(f"{case.id}: {case.ranks} processes over gloo, {seconds:.1f} s")
    for stage in ("rows", *STAGES):
        try:
            size = same(stage, expected.trace[stage], actual.trace[stage])
        except Differs as error:
            differing += 1
            console.print(str(error), style="red", markup=False)
        else:
            compared += size * expected.trace[stage].element_size()
            console.print(f"  equal  {stage:11} {size:,} elements")
    sent = torch.stack([result.sent for result in results])  # [from, there or back, to]
    there, back = sent.sum(dim=(0, 2)).tolist()
    inside = int(sent.diagonal(dim1=0, dim2=2).sum())
    console.print(f"  {there:,} bytes sent to experts, {back:,} back; {inside:,} of them from a rank to itself")
    console.print(f"  {compared:,} bytes compared, {differing} of {len(STAGES) + 1} stages differ")
    if differing:
        raise typer.Exit(1)
