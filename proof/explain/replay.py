"""`python -m reference explain`: what to derive for a case or a bundle, and how to show it.

A bundle's first difference may lie in any stage. It is derived on the way to an element of y, or, for statistics, by
counting; what comes out must be the value that the bundle says was expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.proof.bundle import Bundle
from megaproof.proof.explain.anatomy import Section, hexadecimal
from megaproof.proof.explain.derive import ExplainError, Explanation, Question, explain
from megaproof.reference import layout
from megaproof.reference.dispatch import routes
from megaproof.reference.stages import STAGES, Stage
from megaproof.reference.stats import accumulate


@dataclass(frozen=True)
class Told:
    """What is printed: sections, then verdicts; `holds` is the exit status."""

    case: Case
    sections: list[Section]
    verdicts: list[str]
    holds: bool
    explanation: Explanation | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        inner = self.explanation.as_dict() if self.explanation else {"sections": [s.as_dict() for s in self.sections]}
        return {"case": self.case.id} | inner | {"verdicts": self.verdicts, "holds": self.holds}


def of_element(case: Case, question: Question) -> Told:
    """One element of y. Raises `ExplainError`, naming it, where there is no such element."""
    made = inputs.make(case, "cuda" if torch.cuda.is_available() else "cpu")
    found = explain(case.recipe, *made.arguments(), question, experts=case.shape.experts)
    return Told(case, found.sections, [found.verdict], found.holds, found)


def of_expert(case: Case, expert: int) -> Told:
    """How many rows an expert received: Eq. (9), each of them listed. Raises `ExplainError` for an unknown expert."""
    if not 0 <= expert < case.shape.experts:
        raise ExplainError(f"expert = {expert} must be in [0, {case.shape.experts})")
    where = routes(inputs.make(case).topk_idx)
    local = case.shape.experts_per_rank(case.ranks)
    rank_of, number = layout.owner(expert, local), layout.local(expert, local)
    section = Section(f"Statistics expert {expert}, local expert {number} of rank {rank_of}", "Eq. (9)")
    triples = where.triples()[where.of_expert(expert)].tolist()
    for count, (rank, token, slot) in enumerate(triples, start=1):
        section.say(f"rank {rank}, token {token}, slot {slot}", f"count {count}")
    counted = accumulate(None, where, case.ranks, local)[rank_of][number]
    section.put("received", counted, key="stats")
    holds = int(counted) == len(triples)
    place = f"stats[{rank_of}][{number}] of the layer"
    verdict = f"equals {place}: {hexadecimal(counted)}"
    return Told(case, [section], [verdict if holds else f"counted {len(triples)}, but {place} is {counted}"], holds)


def of_bundle(bundle: Bundle, k_block: int | None = None, full: bool = False) -> Told:
    """The first difference of a bundle: derived, and compared with the value that the bundle calls expected."""
    case, stage, place = bundle.case, STAGES[bundle.stage], bundle.place
    if stage.rows == "expert":
        told = of_expert(case, place["expert"])
        here = told.sections[0].lines[-1].bits
    else:
        question = question_of(case, stage, place, k_block, full)
        told = of_element(case, question)
        here = _derived(told, stage, place)
    width = stage.format(case.recipe).width // 4
    expected, actual = f"0x{bundle.expected_bits:0{width}x}", f"0x{bundle.actual_bits:0{width}x}"
    agrees = here == expected
    verdicts = [
        *told.verdicts,
        f"stage {stage.name}: derived here {here}, "
        + ("as the bundle expects" if agrees else f"but the bundle expects {expected}: other inputs or another recipe")
        + f"; the kernel gave {actual}",
        *(f"pattern seen by the comparison: {pattern}" for pattern in bundle.patterns),
    ]
    return Told(case, told.sections, verdicts, told.holds and agrees, told.explanation)


def question_of(case: Case, stage: Stage, place: dict[str, Any], k_block: int | None, full: bool) -> Question:
    """The element of y on whose way an element of a stage lies; column 0 of y where the stage does not say which."""
    column = place["column"]
    first = column * stage.span(case.recipe)
    return Question(
        place["rank"],
        place["token"],
        column if stage.is_of_y else 0,
        place["slot"],
        place["k_block"] if stage.read_by == 1 and k_block is None else k_block,
        first if stage.columns == "intermediate" else None,
        full,
    )


def _derived(told: Told, stage: Stage, place: dict[str, Any]) -> str | None:
    """Bits of the bundle's element as they are here."""
    explanation = told.explanation
    if explanation is None:
        raise ValueError("told.explanation is None: nothing was derived")
    if stage.read_by == 1:  # Eq. (1) copies it
        made = inputs.make(told.case)
        tensors = made.x_sf if stage.covers else made.x
        return hexadecimal(tensors[place["rank"]][place["token"], place["column"]])
    return explanation.value(f"slot{place['slot']}.{stage.name}" if stage.rows == "slot" else stage.name).bits


def show(told: Told, console: Console) -> None:
    """Sections and verdicts as text; colours only where the console is a terminal."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    recipe = told.case.recipe
    line(f"{told.case.id}, recipe {recipe.recipe_id[:12]}", "dim")
    for section in told.sections:
        line("")
        line(f"{section.equation}  {section.title}", "bold")
        for entry in section.lines:
            line("  " + entry.text())
    line("")
    for i, verdict in enumerate(told.verdicts):
        line(verdict, ("bold green" if told.holds else "bold red") if i < 2 else "")
