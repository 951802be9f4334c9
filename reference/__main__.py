"""`python -m reference run | explain | usual | error`: compute a case; derive one element; compare with others.

Exit status: 0 done, 1 what was derived is not what the layer gives (or a bundle is damaged), 2 usage, 3 environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from megaproof.cases.cases import CASES, GATE, Case
from megaproof.cases.compare import bits
from megaproof.cases.run import CaseRun, run_case
from megaproof.golden.store import stage_digest
from megaproof.proof import bundle
from megaproof.proof.explain import replay
from megaproof.proof.explain.anatomy import Disagreement
from megaproof.proof.explain.derive import ExplainError, Question
from megaproof.quant import twin
from megaproof.reference import oracle
from megaproof.reference.operands import plain
from megaproof.reference.stages import STAGES
from megaproof.toolchain import signals

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console()

CaseId = Annotated[str, typer.Argument(help="a case id of cases/cases.py, or the start of one")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of text")]


def find_case(case_id: str) -> Case:
    """The one case with this id, or the first whose id starts so. Raises typer.BadParameter naming the closest ids."""
    matching = [case for case in CASES if case.id == case_id] or [c for c in CASES if c.id.startswith(case_id)]
    if not case_id or not matching:
        near = difflib.get_close_matches(case_id, [case.id for case in CASES], n=3, cutoff=0.0)
        raise typer.BadParameter(f"no case {case_id!r}; closest: {', '.join(near)}")
    return matching[0]


def compute(case: Case) -> tuple[CaseRun, float]:
    """(the traced run, its seconds) of a case, with progress on the terminal."""
    started = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{case.id}: experts", total=None)
        found = run_case(case, progress=lambda done, total: bar.update(task, completed=done, total=total))
    return found, time.monotonic() - started


@app.command()
def run(case_id: CaseId, as_json: AsJson = False) -> None:
    """Computes one case and prints time, peak memory and the digest of every stage."""
    case = find_case(case_id)
    found, seconds = compute(case)
    report: dict[str, Any] = {
        "case": case.id,
        "recipe_id": case.recipe.recipe_id,
        "seconds": round(seconds, 2),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "threads": torch.get_num_threads(),
        "arithmetic": twin.describe(found.result.y[0].device),
        "stages": {name: stage_digest(found.trace[name]) for name in STAGES},
    }
    if as_json:
        print(json.dumps(report))
        return
    for key, value in report.items():
        for line in [f"{key}: {value}"] if key != "stages" else [f"{k:11} {v}" for k, v in value.items()]:
            console.print(line, highlight=False, soft_wrap=True)


@app.command()
def explain(
    target: Annotated[str, typer.Argument(help="a case id, the start of one, or a bundle under reports/bundles")],
    rank: Annotated[int | None, typer.Option(help="source rank")] = None,
    token: Annotated[int | None, typer.Option(help="token of that rank")] = None,
    column: Annotated[int | None, typer.Option(help="column of y")] = None,
    slot: Annotated[int | None, typer.Option(help="show this slot alone on the way to y")] = None,
    k_block: Annotated[int | None, typer.Option(help="128-wide K block of GEMM 1 shown step by step")] = None,
    activation: Annotated[int | None, typer.Option(help="column of I whose activation is shown")] = None,
    expert: Annotated[int | None, typer.Option(help="explain this expert's statistics instead")] = None,
    seed: Annotated[int, typer.Option(help="added to the case's seed, as the suite's --seed is", min=0)] = 0,
    full: Annotated[bool, typer.Option("--full", help="one line for every K block of GEMM 1 too")] = False,
    as_json: AsJson = False,
) -> None:
    """Derives one element of y by hand, every number with its bits and its equation, and checks it against the layer.

    Without --k-block and --activation, those that move the result most are shown. A bundle says itself where to look.
    """
    try:
        told = _told(target, Question(rank, token, column, slot, k_block, activation, full), expert, seed)
    except ExplainError as error:
        raise typer.BadParameter(str(error)) from error
    except (bundle.BundleError, Disagreement) as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(told.as_dict()))
    else:
        replay.show(told, console)
    raise typer.Exit(0 if told.holds else 1)


def _told(target: str, question: Question, expert: int | None, seed: int) -> replay.Told:
    """What `explain` prints. Raises typer.BadParameter for options that are missing or do not go together."""
    place = {"--rank": question.rank, "--token": question.token, "--column": question.column}
    further = {"--slot": question.slot, "--activation": question.activation, "--expert": expert, "--seed": seed or None}
    if Path(target).suffix in (".json", ".safetensors"):
        if given := [name for name, value in (place | further).items() if value is not None]:
            raise typer.BadParameter(f"a bundle says itself what to explain; it takes no {', '.join(given)}")
        if not Path(target).exists():
            raise typer.BadParameter(f"no bundle {target!r}")
        return replay.of_bundle(bundle.read(Path(target)), question.k_block, question.full)
    found = find_case(target)
    case = dataclasses.replace(found, seed=(found.seed + seed) % (1 << 64))
    if expert is not None:
        return replay.of_expert(case, expert)
    if missing := [name for name, value in place.items() if value is None]:
        raise typer.BadParameter(f"{', '.join(missing)} must be given: which element of y of {case.id}?")
    return replay.of_element(case, question)


@app.command()
def usual(case_id: CaseId = GATE[0].id, as_json: AsJson = False) -> None:
    """How far the field's usual reference (FP32 einsum of dequantised values, amax / 448 scales) is from ours.

    Counts the elements of y whose bits differ, and prints the cosine-like figure that such tests compare with 0.01.
    """
    case = find_case(case_id)
    found, _ = compute(case)
    arguments = [torch.cat(list(tensors)).cpu() for tensors in found.inputs.arguments()[:4]]
    console_err = Console(stderr=True)
    console_err.print("FP32 einsum over dequantised values ...", highlight=False)
    theirs = oracle.usual_reference(
        *arguments,
        plain(found.inputs.weights),
        clamp=case.recipe.clamp,
        granularity=case.recipe.activation_granularity,
        weight_fold=case.recipe.weight_fold,
    )
    ours = torch.cat(found.result.y).cpu()
    differing = int((bits(ours) != bits(theirs)).sum())
    report: dict[str, Any] = {
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


@app.command()
def error(
    case_id: CaseId = GATE[0].id,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of rank 0 that FP64 computes, the first ones")] = 4,
    columns: Annotated[int, typer.Option(min=1, help="columns of y that FP64 computes, spread evenly")] = 256,
    as_json: AsJson = False,
) -> None:
    """What a scale for 128 activation columns costs in error, beside one for 64: y against FP64 without any rounding.

    Relative error: root mean square of y - y64 over that of y64, on a sample.
    """
    case = find_case(case_id)
    report: dict[str, Any] = {"case": case.id, "errors": {}}
    for granularity in (64, 128):
        recipe = dataclasses.replace(case.recipe, activation_granularity=granularity)
        found, _ = compute(dataclasses.replace(case, recipe=recipe))
        chosen = torch.arange(min(tokens, case.tokens[0]))
        hidden = torch.arange(0, case.shape.hidden, max(1, case.shape.hidden // columns))[:columns]
        arguments = [tensors[0] for tensors in found.inputs.arguments()[:4]]
        options = {"clamp": recipe.clamp, "silu": recipe.silu, "granularity": granularity}
        y64, _ = oracle.fp64_layer(*arguments, plain(found.inputs.weights), chosen, hidden, **options)
        report["errors"][granularity] = oracle.relative_error(found.result.y[0].cpu()[chosen][:, hidden].double(), y64)
    report["elements"] = y64.numel()
    if as_json:
        print(json.dumps(report))
        return
    said = ", ".join(f"per {g} columns {100 * e:.3f} %" for g, e in report["errors"].items())
    console.print(
        f"{case.id}: relative error of {y64.numel():,} elements of y: {said}", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    signals.exit_on_sigterm()
    app()
