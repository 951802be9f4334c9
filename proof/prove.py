"""The proof of a kernel on one case: launches through its adapter, everything that it shows compared.

1. The case.  2. The same again: the same bits, and statistics twice as large.  3. Another batch in the same buffers:
each rank gets the tokens of the rank before it in reverse order, one fewer where there are two or more. What is
expected of it are rows of the case's own result, since a token's row depends on neither batch nor rank.  4. Other
inputs of the same sizes: every token in the place of the one before it, which a kernel that gives an earlier answer at
equal sizes does not see.  5. The first inputs again.
Each time, in this order: the stages that the kernel shows, y of every rank, statistics, on a lattice whether y is what
int64 arithmetic alone says, and whether the inputs are what they were.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.cases.compare import Differs
from megaproof.cases.inputs import Inputs
from megaproof.proof import tally
from megaproof.proof.adapters import Adapter, Prepared, taken
from megaproof.proof.divergence import Divergence, compare_stages
from megaproof.proof.exact import Exact
from megaproof.quant.host_state import guarded, neutral
from megaproof.reference.layer import LayerResult
from megaproof.reference.stages import SHOWN

FILL = 0xFF
"""The byte that buffers are filled with where an adapter can do so: a NaN in every format, and none that the layer
makes."""
LAUNCHES = (
    "the first launch",
    "the second launch",
    "another batch",
    "other inputs of the same sizes",
    "the first inputs again",
)
SAME = (0, 1, 4)
"""Launches on the case's own inputs."""


Held = list[tuple[str, Tensor, Tensor]]
"""(what it is, the tensor that was handed out, its copy of that moment)."""


class Convicted(AssertionError):
    """A kernel that is wrong. `check` names what saw it: a stage, 'y', 'y of other ranks' (the first one's is right),
    'written' (NaN where there should be a number), 'stats', 'integers' (y is the reference's, and both are wrong),
    'inputs', 'stages', 'fill' (y is not what it was filled with), 'changed' (a result that was changed after it was
    handed out), 'bytes' (the comparison of tensors missed what bytes show); then which launch, if not the first."""

    def __init__(self, check: str, launch: int, message: str, expected_y: Sequence[Tensor]) -> None:
        self.check = check if launch == 0 else f"{check} of {LAUNCHES[launch]}"
        self.of_case = launch in SAME
        """Whether the case's seed makes the inputs again."""
        super().__init__(f"{self.check}: {message}")
        self.expected_y = list(expected_y)
        """What the last launch had to return."""
        self.divergence: Divergence | None = None


@dataclass(frozen=True)
class Proof:
    """What was compared."""

    compared: dict[str, int]
    """Elements by stage, over all launches."""
    launches: int
    shown: tuple[str, ...]
    not_shown: tuple[str, ...]
    filled: bool
    """Whether buffers held NaNs before each launch."""
    by_integers: int = 0
    """Elements of y that int64 arithmetic was asked for besides."""

    @property
    def elements(self) -> int:
        """Of all stages."""
        return sum(self.compared.values())

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {count:,}" for name, count in self.compared.items())
        hidden = f"; not shown: {', '.join(self.not_shown)}" if self.not_shown else ""
        integers = f"; {self.by_integers:,} of y by int64 arithmetic too" if self.by_integers else ""
        filled = "filled with NaN before" if self.filled else "not filled before"
        return f"{self.elements:,} elements in {self.launches} launches: {stages}{hidden}{integers}; buffers {filled}"


def prove(
    adapter: Adapter, prepared: Prepared, expected: LayerResult, launches: int = 3, integers: Exact | None = None
) -> Proof:
    """The first `launches` of LAUNCHES; expected: the reference's traced result; integers: rows of y without it.

    Raises `Convicted`.
    """
    fill = getattr(adapter, "fill", None)
    plan = [(prepared, expected, integers), (prepared, _counted_twice(expected), integers)]
    if prepared.world != "gloo":  # its processes make their inputs from the case's seed, so they know whole cases only
        for place in (turned, functools.partial(rotated, case=prepared.case)):
            plan.append((*another_batch(prepared, expected, place), integers and integers.moved(place)))
        plan.append((prepared, expected, integers))
    plan = plan[:launches]
    compared: Counter[str] = Counter()
    by_integers, previous, stages, digest = 0, None, {}, ""
    for launch, (problem, wanted, exact) in enumerate(plan):
        if launch != 1:
            digest = problem.inputs.sha256()
            taken.asked(adapter.prepare, problem)
        if fill:
            taken.asked(fill, FILL)
            if launch == 1 and set(taken.raw(_results(adapter, "y", launch, problem, wanted))) - {FILL}:
                raise Convicted("fill", launch, "y does not hold the byte that fill() was given", wanted.y)
        versions = _versions(problem.inputs)
        taken.asked(adapter.launch)
        held: Held = []
        stages = _results(adapter, "stages", launch, problem, wanted, held)
        compared.update(_compare(adapter, stages, held, previous, launch, problem, wanted))
        if exact:
            by_integers += _compare_integers(adapter, launch, problem, wanted, exact)
        if problem.inputs.sha256() != digest:
            raise Convicted("inputs", launch, "the kernel wrote to its inputs", wanted.y)
        if _versions(problem.inputs) != versions:
            raise Convicted("inputs", launch, "the adapter wrote to its inputs, and put them back", wanted.y)
        previous = stages
    shown = tuple(name for name in SHOWN if name in stages)
    hidden = tuple(name for name in SHOWN if name not in stages)
    tally.add(adapter.name, compared, len(plan))
    return Proof(dict(compared), len(plan), shown, hidden, bool(fill), by_integers)


def _results(
    adapter: Adapter, method: str, launch: int, problem: Prepared, wanted: LayerResult, held: Held | None = None
) -> Any:
    """Copies of what a method of an adapter hands out, plain; held: where both are kept, to be compared again.

    Raises Convicted for what can't be compared.
    """
    handed_out = taken.asked(getattr(adapter, method))
    take = taken.stages if method == "stages" else functools.partial(taken.tensors, method)
    try:
        with neutral():
            copies = take(handed_out, problem.device)
    except taken.Unfit as error:
        raise Convicted(method, launch, str(error), wanted.y) from None
    if held is not None:
        names = copies if isinstance(copies, dict) else range(len(copies))
        held += [(f"{method}() {name}", handed_out[name], copies[name]) for name in names]
    return copies


def _versions(made: Inputs) -> list[int]:
    """How often each input was written through torch, whatever it holds now."""
    lists = (made.x, made.x_sf, made.topk_idx, made.topk_weights)
    return [tensor._version for part in lists for tensor in part if not tensor.is_inference()]


def rotated(tensors: Sequence[Tensor], case: Case) -> list[Tensor]:
    """Tensors by rank, one row a token, for the fourth launch: each token where the one before was, over all ranks."""
    return list(torch.cat(list(tensors)).roll(1, 0).split(list(case.tokens)))


def turned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors by rank, one row a token, for the third launch."""
    return [tensor[: max(1, len(tensor) - 1)].flip(0) for tensor in [*tensors[-1:], *tensors[:-1]]]


@guarded
def _copied(stages: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stages.items()}


@guarded
def _counted_twice(expected: LayerResult) -> LayerResult:
    twice = [2 * counts for counts in expected.stats]
    return LayerResult(expected.y, twice, {**(expected.trace or {}), "stats": torch.cat(twice)})


@guarded
def another_batch(
    prepared: Prepared, expected: LayerResult, turned: Callable[[Sequence[Tensor]], list[Tensor]] = turned
) -> tuple[Prepared, LayerResult]:
    """(problem, its result) of the third launch, or of another that moves tokens as `turned` does."""
    made, case, trace = prepared.inputs, prepared.case, expected.trace
    if trace is None:
        raise ValueError("expected.trace is None: the proof needs the reference's trace")
    topk_idx = turned(made.topk_idx)
    inputs = Inputs(turned(made.x), turned(made.x_sf), topk_idx, turned(made.topk_weights), made.weights)
    smaller = dataclasses.replace(case, tokens=tuple(map(len, topk_idx)))
    routed = torch.cat(topk_idx).flatten().cpu()
    counts = torch.bincount(routed[routed >= 0], minlength=case.shape.experts).to(torch.int32)
    stats = list(counts.to(made.x[0].device).chunk(case.ranks))

    first = [sum(case.tokens[:rank]) for rank in range(case.ranks)]
    source = torch.cat(turned([first[rank] + torch.arange(tokens) for rank, tokens in enumerate(case.tokens)]))
    active = torch.cat([(idx >= 0).sum(1).cpu() for idx in made.topk_idx])
    end = active.cumsum(0)
    rows = [row for t in source.tolist() for row in range(int(end[t] - active[t]), int(end[t]))]
    order = torch.tensor(rows, dtype=torch.int64, device=trace["rows"].device)
    y = turned(expected.y)
    stages = {name: trace[name] if not len(trace[name]) else trace[name][order] for name in SHOWN}
    stages |= {"y": torch.cat(y), "stats": torch.cat(stats)}
    return dataclasses.replace(prepared, case=smaller, inputs=inputs, whole=False), LayerResult(y, stats, stages)


@guarded
def _compare(
    adapter: Adapter,
    stages: dict[str, Tensor],
    held: Held,
    previous: dict[str, Tensor] | None,
    launch: int,
    problem: Prepared,
    wanted: LayerResult,
) -> dict[str, int]:
    """Elements compared in one launch, by stage; every rank's results are read before the verdict."""
    if unknown := sorted(set(stages) - set(SHOWN)):
        raise Convicted("stages", launch, f"{', '.join(unknown)}: unknown; known are {', '.join(SHOWN)}", wanted.y)
    y = _results(adapter, "y", launch, problem, wanted, held)
    stats = _results(adapter, "stats", launch, problem, wanted)
    for what, handed_out, copy in held:
        if taken.raw(handed_out) != taken.raw(copy):
            raise Convicted("changed", launch, f"{what} was changed after it had been handed out", wanted.y)
    found = compare_stages(
        wanted,
        stages,
        y,
        stats,
        problem.case,
        topk_idx=problem.inputs.topk_idx,
        previous=previous,
        fill={"y": FILL << 8 | FILL} if hasattr(adapter, "fill") else None,
    )
    if found.divergence is None:
        return _confirmed(found.compared, stages | {"y": y, "stats": stats}, launch, wanted)
    check, ranks = found.divergence.stage, ""
    if check == "y" and not found.divergence.problem:
        pairs = [(a.cpu(), b.cpu()) for a, b in zip(wanted.y, y, strict=True)]
        wrong = [r for r, (a, b) in enumerate(pairs) if not torch.equal(a.view(torch.int16), b.view(torch.int16))]
        ranks = f"rank {', '.join(map(str, wrong))} of {len(pairs)} differ\n"
        if any(bool((b.isnan() & ~a.isnan()).any()) for a, b in pairs):
            check = "written"
        elif wrong[0] != next(rank for rank, tokens in enumerate(problem.case.tokens) if tokens):
            check = "y of other ranks"
    error = Convicted(check, launch, f"{ranks}{found.divergence.report()}", wanted.y)
    error.divergence = found.divergence
    raise error


@guarded
def _confirmed(compared: dict[str, int], found: dict[str, Any], launch: int, wanted: LayerResult) -> dict[str, int]:
    """The elements compared, if bytes say the same. Raises Convicted: something has replaced functions of torch."""
    for name, part in found.items():
        if taken.raw(part) != taken.raw((wanted.trace or {})[name]):
            raise Convicted("bytes", launch, f"{name} differs, and the comparison of tensors did not say so", wanted.y)
    return compared


def _compare_integers(adapter: Adapter, launch: int, problem: Prepared, wanted: LayerResult, exact: Exact) -> int:
    """Elements of the kernel's own y that int64 arithmetic has confirmed."""
    try:
        return exact.compare(_results(adapter, "y", launch, problem, wanted))
    except Differs as error:
        raise Convicted("integers", launch, f"y is the reference's, and both are wrong: {error}", wanted.y) from error
