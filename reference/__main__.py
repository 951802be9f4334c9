"""`python -m reference run | usual`: compute a case of the matrix; compare the field's usual reference with ours.

Exit status: 0 done, 2 usage, 3 environment.
"""

from __future__ import annotations

import json
import resource
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from golden.store import stage_digest
from quant import twin
from reference import oracle
from reference.layer import STAGES, LayerResult, moe_layer
from tests import inputs
from tests.cases import CASES, GATE, Case
from tests.compare import bits

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console()

CaseId = Annotated[str, typer.Argument(help="a case id of tests/cases.py, or the start of one")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of text")]


def find_case(case_id: str) -> Case:
    """The one case with this id, or the first whose id starts so. Raises typer.BadParameter naming the ids."""
    matching = [case for case in CASES if case.id == case_id] or [c for c in CASES if c.id.startswith(case_id)]
    if not matching:
        raise typer.BadParameter(f"no case {case_id!r}; ids are: {', '.join(case.id for case in CASES)}")
    return matching[0]


def compute(case: Case) -> tuple[inputs.Inputs, LayerResult, float]:
    """(inputs, traced result, seconds) of a case, with progress on the terminal."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = inputs.make(case, device)
    started = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{case.id}: experts", total=None)
        result = moe_layer(
            case.recipe,
            *made.arguments(),
            trace=True,
            experts=case.shape.experts,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return made, result, time.monotonic() - started


@app.command()
def run(case_id: CaseId, as_json: AsJson = False) -> None:
    """Computes one case and prints time, peak memory and the digest of every stage."""
    case = find_case(case_id)
    _, result, seconds = compute(case)
    trace = result.trace or {}
    report = {
        "case": case.id,
        "recipe_id": case.recipe.recipe_id,
        "seconds": round(seconds, 2),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "threads": torch.get_num_threads(),
        "arithmetic": twin.describe(result.y[0].device),
        "stages": {name: stage_digest(trace[name]) for name in STAGES},
    }
    if as_json:
        print(json.dumps(report))
        return
    for key, value in report.items():
        for line in [f"{key}: {value}"] if key != "stages" else [f"{k:11} {v}" for k, v in value.items()]:
            console.print(line, highlight=False, soft_wrap=True)


@app.command()
def usual(case_id: CaseId = GATE[0].id, as_json: AsJson = False) -> None:
    """How far the field's usual reference (FP32 einsum of dequantised values, amax / 448 scales) is from ours.

    Counts the elements of y whose bits differ, and prints the cosine-like figure that such tests compare with 0.01.
    """
    case = find_case(case_id)
    made, result, _ = compute(case)
    arguments = [torch.cat(list(tensors)).cpu() for tensors in made.arguments()[:4]]
    console_err = Console(stderr=True)
    console_err.print("FP32 einsum over dequantised values ...", highlight=False)
    theirs = oracle.usual_reference(
        *arguments,
        lambda e: tuple(t.cpu() for t in made.weights(e)),
        clamp=case.recipe.clamp,
        granularity=case.recipe.activation_granularity,
        weight_fold=case.recipe.weight_fold,
    )
    ours = torch.cat(result.y).cpu()
    differing = int((bits(ours) != bits(theirs)).sum())
    report = {
        "case": case.id,
        "elements": ours.numel(),
        "differing": differing,
        "share": differing / max(1, ours.numel()),
        "calc_diff": oracle.calc_diff(theirs.double(), ours.double()),
    }
    if as_json:
        print(json.dumps(report))
        return
    console.print(
        f"{case.id}: {differing:,} of {ours.numel():,} elements of y differ in their bits "
        f"({100 * report['share']:.1f} %); calc_diff {report['calc_diff']:.2e}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    app()
