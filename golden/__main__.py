"""`python -m golden verify | diff | regenerate | capture`: what the recipe computes, and what a chip computes, pinned.

Exit status: 0 proven, 1 differs, 2 usage, 3 environment (driver, device, packages), 5 nothing was compared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from torch import Tensor

from megaproof.cases.cases import CASES, Case
from megaproof.cases.compare import bits
from megaproof.cases.run import CaseRun, run_case
from megaproof.golden import folders, silicon, store
from megaproof.golden.errors import GoldenError
from megaproof.quant import twin
from megaproof.quant.recipe import Recipe
from megaproof.quant.tables import TableError
from megaproof.toolchain import optimized, signals
from megaproof.toolchain.errors import BuildError, EnvironmentMissing, escaped

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

Folder = Annotated[Path, typer.Option("--folder", help="folder of the goldens")]
Only = Annotated[str, typer.Option("--only", "-k", help="only cases whose id contains this text")]


@app.callback(help=__doc__)
def commands() -> None:
    """Whatever a command of this module says is a proof."""
    optimized.refuse()


def _say(text: str, style: str = "") -> None:
    """A line that may hold what others wrote: it is no markup, and nothing in it is obeyed by a terminal."""
    console.print(Text("".join(c if c.isprintable() else escaped(c) for c in text), style), soft_wrap=True)


def _selected(only: str) -> list[Case]:
    cases = [case for case in CASES if case.tier == "cpu" and only in case.id]
    if not cases:
        _say(f"nothing was compared: no case of tier cpu has {only!r} in its id")
        raise typer.Exit(5)
    return cases


def _each(cases: list[Case], work: Callable[[Case, Callable[[int, int], None]], None]) -> None:
    with Progress(console=Console(stderr=True)) as bar:
        whole = bar.add_task("cases", total=len(cases))
        for case in cases:
            task = bar.add_task(case.id, total=None)
            work(case, lambda done, total, task=task: bar.update(task, completed=done, total=total))
            bar.remove_task(task)
            bar.advance(whole)


@app.command()
def verify(only: Only = "", folder: Folder = store.FOLDER) -> None:
    """Reads every golden, recomputes its case and compares all stages; and checks the captures of every chip."""
    failures, compared = [], 0

    def check(case: Case, progress: Callable[[int, int], None]) -> None:
        nonlocal compared
        started = time.monotonic()
        try:
            golden = store.read(case, folder)
            run = run_case(case, progress=progress)
            size = store.check(case, golden, run.sha256, run.trace)
        except GoldenError as error:
            failures.append(str(error))
            console.print(f"[red]differs[/] {case.id}", highlight=False)
            return
        compared += size
        console.print(f"proven  {case.id}: {size:,} bytes, {time.monotonic() - started:.1f} s", highlight=False)

    _each(_selected(only), check)
    orphans = set(store.read_manifest_or_none(folder)) - {case.id for case in CASES if case.tier == "cpu"}
    if orphans and not only:
        failures.append(f"goldens of cases that no longer exist: {', '.join(sorted(orphans))}; regenerate")
    for chip in silicon.chips() if not only else ():
        try:
            counts = ", ".join(f"{count:,} {what}" for what, count in silicon.verify(chip).items())
            _say(f"proven  silicon {chip}: {counts}")
        except (GoldenError, TableError) as error:
            failures.append(str(error))
    for failure in failures:
        _say(failure, "red")
    console.print(f"{compared:,} bytes compared, {len(failures)} failures, {twin.describe()}", highlight=False)
    if failures:
        raise typer.Exit(1)


@app.command()
def regenerate(
    reason: Annotated[str, typer.Option(help="why the bytes change; kept in the manifest")] = "",
    only: Only = "",
    folder: Folder = store.FOLDER,
) -> None:
    """Recomputes the goldens and prints what changed, stage by stage.

    Refused when bytes change under the same recipe id and no reason is given.
    """
    old = store.read_manifest_or_none(folder)
    new: dict[str, store.Golden] = {}
    unexplained = []

    def make(case: Case, progress: Callable[[int, int], None]) -> None:
        run, before = run_case(case, progress=progress), old.get(case.id)
        golden = store.make_entry(case, run.sha256, run.trace, f"reference, {twin.describe()}", reason)
        if before is not None and before["recipe_id"] == golden.entry["recipe_id"]:
            changed = store.changed_stages(before, golden.entry)
            if not changed and before["inputs_sha256"] == run.sha256:
                golden.entry.update({key: before[key] for key in ("producer", "versions", "reason")})
                console.print(f"same    {case.id}", highlight=False)
            else:
                unexplained.append(case.id)
                _print_change(run, before, changed or ["inputs"], folder)
        else:
            console.print(f"{'recipe' if before else 'new   '}  {case.id}", highlight=False)
            if before is None:
                unexplained.append(case.id)
            else:
                _print_change(run, before, store.changed_stages(before, golden.entry), folder)
        new[case.id] = golden

    selected = _selected(only)
    if not folders.is_being_written(folder):  # what a writer has half done is not foreign; `write` looks again
        store.check_folder(folder)
    _each(selected, make)
    if unexplained and old and not reason:
        console.print(
            f"[red]refused[/]: {len(unexplained)} cases are new or change under the same recipe "
            f"({', '.join(unexplained[:3])}); give the reason with --reason. Nothing was written.",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)
    keep = {case.id for case in CASES if case.tier == "cpu"} - set(new)
    store.write(new, keep, folder)
    console.print(f"{len(new)} goldens written, {len(keep & set(old))} kept", highlight=False)


@app.command()
def diff(only: Only = "", folder: Folder = store.FOLDER) -> None:
    """Prints what `regenerate` would change, stage by stage and bit by bit where the trace is stored whole.

    Writes nothing. Exit status 1 when something would change.
    """
    old, changed = store.read_manifest_or_none(folder), []

    def show(case: Case, progress: Callable[[int, int], None]) -> None:
        run = run_case(case, progress=progress)
        before, golden = old.get(case.id), store.make_entry(case, run.sha256, run.trace, "", "")
        if before is None:
            changed.append(case.id)
            console.print(f"new     {case.id}", highlight=False)
            return
        fields = Recipe.from_fields(before["recipe"]).diff(case.recipe)
        stages = store.changed_stages(before, golden.entry)
        inputs_changed = before["inputs_sha256"] != run.sha256
        if fields or stages or inputs_changed:
            changed.append(case.id)
            for name, (was, now) in fields.items():
                _say(f"recipe  {case.id}: {name} {was} -> {now}")
            _print_change(run, before, ["inputs"] * inputs_changed + stages, folder)

    selected = _selected(only)
    _each(selected, show)
    console.print(f"{len(changed)} of {len(selected)} cases would change", highlight=False)
    if changed:
        raise typer.Exit(1)


def _print_change(run: CaseRun, before: dict[str, Any], changed: list[str], folder: Path) -> None:
    trace = run.trace
    console.print(f"[yellow]changes[/] {run.case.id}", highlight=False)
    for name in changed:
        if name == "inputs":
            console.print("  inputs: other bytes", highlight=False)
            continue
        try:
            golden = store.read_entry(before, folder)
        except GoldenError as error:
            _say(f"  {name}: {error}")
            continue
        rows = len(store.changed_rows(name, golden, trace))
        console.print(f"  {name}: {rows or 'all'} of {trace[name].shape[0]} rows", highlight=False)
        if golden.entry["data"] == "stages" and golden.data[name].shape == trace[name].shape:
            _print_bits(golden.data[name], trace[name].cpu())


def _print_bits(old: Tensor, new: Tensor) -> None:
    """How many elements changed, and the first of them as hex."""
    before, after = bits(old), bits(new)
    where = (before != after).nonzero()
    mask, width = (1 << 8 * old.element_size()) - 1, 2 + 2 * old.element_size()
    console.print(f"    {len(where):,} of {before.numel():,} elements", highlight=False)
    for place in map(tuple, where[:3].tolist()):
        was, now = int(before[place]) & mask, int(after[place]) & mask
        console.print(f"    {list(place)}: {was:#0{width}x} -> {now:#0{width}x}", highlight=False, markup=False)


@app.command()
def capture(
    quick: Annotated[bool, typer.Option("--quick", help="a small part of everything; nothing is written")] = False,
    out: Annotated[Path, typer.Option(help="folder to write to")] = silicon.FOLDER,
) -> None:
    """Measures the chip at hand (needs an SM90 GPU): tables, tensor-core vectors, sweeps of all 2^32 inputs."""
    from megaproof.golden import capture as capturing

    try:
        capturing.run(out, quick, console)
    except EnvironmentMissing as error:
        _say(f"environment: {error}")
        raise typer.Exit(3) from None
    except (BuildError, capturing.ChipDiffers) as error:
        _say(str(error), "red")
        raise typer.Exit(1) from None


def main() -> None:
    """Runs the command line; what ends in a known error gets one sentence and its status."""
    try:
        app()
    except (GoldenError, TableError) as error:
        _say(str(error), "red")
        sys.exit(1)
    except EnvironmentMissing as error:
        _say(f"environment: {error}")
        sys.exit(3)


if __name__ == "__main__":
    signals.exit_on_sigterm()
    main()
