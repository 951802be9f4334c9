"""Kernels that are wrong on purpose: `python -m proof wrong` shows which check convicts each, and what the
field's tolerances would have said of its y.

Each is the reference with one thing changed. Exit status: 0 all convicted by the check named, 1 otherwise, 2 usage.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import Tensor

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.cases.run import run_case
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.reference import ReferenceAdapter
from megaproof.proof.prove import Convicted, prove
from megaproof.quant import philox
from megaproof.quant.recipe import RECIPES
from megaproof.quant.shapes import SHAPES
from megaproof.reference import oracle
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.stages import STAGES

CASE = Case(SHAPES["smoke"], (64, 64), routing="zipf", masked=30)
ORDER_CASE = Case(SHAPES["smoke"], (64, 64), RECIPES["no_clamp"], routing="zipf", family="adversarial")
"""Four BF16 values of like size add up exactly in float32, whatever the order: it takes these inputs to see it."""
TOLERANCES = (0.01, 0.07, 0.1)
"""What public tests compare calc_diff with."""


class Stale(ReferenceAdapter):
    """Every launch returns the y of the first."""

    first: list[Tensor] | None = None

    def y(self) -> list[Tensor]:
        y = super().y()
        self.first = self.first or y
        return [old[: len(new)] for old, new in zip(self.first, y, strict=True)]


class ChangedY(ReferenceAdapter):
    """y, changed by a function of the list by rank; nothing else is shown."""

    def __init__(self, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
        super().__init__()
        self.change = change

    def stages(self) -> dict[str, Tensor]:
        return {}

    def y(self) -> list[Tensor]:
        return self.change([part.clone() for part in super().y()])


class LastBit(ReferenceAdapter):
    """One byte of one stage with another last bit."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def stages(self) -> dict[str, Tensor]:
        stages = super().stages()
        return {n: _last_bit(t) if n == self.stage else t for n, t in stages.items()}

    def y(self) -> list[Tensor]:
        first, *others = super().y()
        return [_last_bit(first) if self.stage == "y" else first, *others]

    def stats(self) -> list[Tensor]:
        first, *others = super().stats()
        return [first ^ (torch.arange(len(first)) == 0).int() if self.stage == "stats" else first, *others]


class SlotOrder(ReferenceAdapter):
    """The rows of a token's slots in reverse order."""

    def stages(self) -> dict[str, Tensor]:
        stages = super().stages()
        rank, token, slot = self._launched().trace["rows"].unbind(1)
        order = torch.tensor(sorted(range(len(rank)), key=lambda i: (int(rank[i]), int(token[i]), -int(slot[i]))))
        return stages | {"slots": stages["slots"][order]}


class SumsInAnotherOrder(ReferenceAdapter):
    """A token's slots added up from the last to the first; only y is shown."""

    def stages(self) -> dict[str, Tensor]:
        return {}

    def y(self) -> list[Tensor]:
        trace, tokens = self._launched().trace, self.prepared.case.tokens
        rank, token, slot = trace["rows"].unbind(1)
        row = torch.tensor([sum(tokens[:r]) for r in range(len(tokens))])[rank] + token
        total = torch.zeros(sum(tokens), trace["slots"].shape[1])
        for k in range(int(slot.max()), -1, -1):
            total[row[slot == k]] += trace["slots"][slot == k].float()
        return list(total.bfloat16().split(list(tokens)))


class CountsMasked(ReferenceAdapter):
    """A masked slot counts as one for expert 0."""

    def stats(self) -> list[Tensor]:
        first, *others = (part.clone() for part in super().stats())
        first[0] += sum(int((idx < 0).sum()) for idx in self.prepared.inputs.topk_idx)
        return [first, *others]


class OverwritesCounts(ReferenceAdapter):
    """Statistics of the last launch alone."""

    def launch(self) -> None:
        self.counts = None
        super().launch()


class WritesInputs(ReferenceAdapter):
    """The result is right; one byte of x is not what it was."""

    def launch(self) -> None:
        super().launch()
        self.prepared.inputs.x[0][0, 0] ^= 1


class DropsExpert(ReferenceAdapter):
    """Nothing comes from the last expert, and only y is shown."""

    def stages(self) -> dict[str, Tensor]:
        return {}

    def y(self) -> list[Tensor]:
        case, made = self.prepared.case, self.prepared.inputs
        last = max(int(idx.max()) for idx in made.topk_idx)
        kept = dataclasses.replace(made, topk_idx=[torch.where(idx == last, -1, idx) for idx in made.topk_idx])
        return moe_layer(case.recipe, *kept.arguments(), experts=case.shape.experts).y


def _last_bit(tensor: Tensor) -> Tensor:
    raw = tensor.contiguous().clone().view(torch.uint8)
    raw[len(raw) // 2, 0] ^= 1
    return raw.view(tensor.dtype)


def _swapped(y: list[Tensor]) -> list[Tensor]:
    y[0][[1, 2]] = y[0][[2, 1]]
    return y


def _noise(y: list[Tensor]) -> list[Tensor]:
    """Each element times 1 + a random part within 0.5 %."""

    def noisy(part: Tensor) -> Tensor:
        word = philox.words(1, 1, part.numel()).reshape(part.shape)
        return (part.float() * (1 + 0.01 * (word.double() * 2.0**-32 - 0.5)).float()).bfloat16()

    return [noisy(part) for part in y]


def _zeroed_rows(y: list[Tensor]) -> list[Tensor]:
    for part in y:
        part[5::100] = 0
    return y


def _filled(value: float, y: list[Tensor]) -> list[Tensor]:
    return [torch.full_like(part, value) for part in y]


SUMMED = "slots summed in another order"

#: name -> (factory, the check that must convict it)
WRONG: dict[str, tuple[Callable[[], ReferenceAdapter], str]] = {
    "stale y": (Stale, "y of another batch"),
    "zeros": (lambda: ChangedY(functools.partial(_filled, 0.0)), "y"),
    "NaN everywhere": (lambda: ChangedY(functools.partial(_filled, float("nan"))), "written"),
    "rank 0's answer everywhere": (lambda: ChangedY(lambda y: [y[0]] * len(y)), "y of other ranks"),
    "slots in another order": (SlotOrder, "slots"),
    SUMMED: (SumsInAnotherOrder, "y"),
    "masked slots counted": (CountsMasked, "stats"),
    "statistics overwritten": (OverwritesCounts, "stats of the second launch"),
    "two rows swapped": (lambda: ChangedY(_swapped), "y"),
    **{f"last bit of {stage}": (functools.partial(LastBit, stage), stage) for stage in STAGES},
    "inputs written": (WritesInputs, "inputs"),
    "noise that keeps the cosine": (lambda: ChangedY(_noise), "y"),
    "1 % of the rows zero": (lambda: ChangedY(_zeroed_rows), "y"),
    "last expert dropped": (DropsExpert, "y"),
}


@dataclass(frozen=True)
class Trial:
    """What the proof, and what tolerances say of one wrong kernel."""

    kernel: str
    expected: str
    """The check that must convict."""
    convicted_by: str | None
    calc_diff: float
    passes: dict[str, bool]
    """Tolerance -> whether y of that launch would have passed it."""


@functools.cache
def truth(case: Case = CASE) -> LayerResult:
    """The reference's result."""
    return run_case(case, "cpu").result


@functools.cache
def judge(name: str) -> Trial:
    """Puts one wrong kernel through the proof of the gate."""
    factory, check = WRONG[name]
    case = ORDER_CASE if name == SUMMED else CASE
    adapter, convicted_by, wanted = factory(), None, truth(case).y
    try:
        prove(adapter, Prepared(case, inputs.make(case), torch.device("cpu")), truth(case))
    except Convicted as error:
        convicted_by, wanted = error.check, error.expected_y
    expected, actual = torch.cat(list(wanted)).double(), torch.cat(adapter.y()).double()
    adapter.close()
    if expected.shape != actual.shape:  # the right y of the other batch
        expected = actual
    figure = float(oracle.calc_diff(actual, expected))
    passes = {f"calc_diff < {limit}": figure < limit for limit in TOLERANCES}
    passes["allclose 1e-2"] = torch.allclose(actual, expected, rtol=1e-2, atol=1e-2)
    return Trial(name, check, convicted_by, figure, passes)


def wrong_command(as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False) -> None:
    """Wrong kernels, and which check convicts each; beside it what the field's tolerances would have said.

    Exit status: 0 each is convicted by its check, 1 one is not.
    """
    verdicts = [judge(name) for name in WRONG]
    if as_json:
        print(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts]))
    else:
        limits = list(verdicts[0].passes)
        print("| wrong kernel | convicted by | calc_diff | " + " | ".join(limits) + " |")
        print("|---|---|---|" + "---|" * len(limits))
        for v in verdicts:
            passed = " | ".join("passes" if v.passes[limit] else "fails" for limit in limits)
            print(f"| {v.kernel} | {v.convicted_by or 'NOTHING'} | {v.calc_diff:.1e} | {passed} |")
    raise typer.Exit(int(any(verdict.convicted_by != verdict.expected for verdict in verdicts)))
