"""A run in lines of text: the end of what pytest prints, and `python -m proof report reports/run.json`."""

from __future__ import annotations

from collections.abc import Iterator

from megaproof.proof import header, selection, tally
from megaproof.proof.record import Record

Section = tuple[str, list[str]]
"""(title, lines)."""


def sections(record: Record, reproduce: bool = True) -> Iterator[Section]:
    """What is to be said after a run; only what there is. reproduce: whether to repeat the commands of failures."""
    if record.skips:
        by_count = sorted(record.skips.items(), key=lambda item: -item[1])
        yield "skipped, by reason", [f"{count:5d}  {reason}" for reason, count in by_count]
    if record.tally:
        yield "equal to the reference, bit for bit", tally.lines(record.tally)
    if record.reproduce and reproduce:
        yield "reproduce with", record.reproduce
    if record.lost:
        yield "processes that ended too early", record.lost
    if record.disagree:
        yield "calls of one test that do not agree", record.disagree
    if record.names:
        yield "modules under wrong names", [*record.names, "What one of them changes is unknown to the other."]
    if record.unproven:
        said = f"{record.unproven}, so nothing is proven: this is not green (exit status 5)."
        yield "nothing was compared", [said]


def whole(record: Record) -> Iterator[Section]:
    """A run from its record alone: what it was, its verdicts by case, and `sections`."""
    lines = header.lines(record.options, record.versions, record.described)
    yield "run", lines + (selection.lines(record.selected) if record.selected else [])
    outcomes = ", ".join(f"{count} {outcome or 'unfinished'}" for outcome, count in record.outcomes().most_common())
    status = "did not end" if record.exit_status is None else f"ended with status {record.exit_status}"
    yield "verdict", [f"{status} after {record.seconds:.1f} s: {outcomes or 'no test'}"]
    wrong = [
        f"{outcome:8} {case}: {check}"
        for case, checks in record.verdicts().items()
        for check, outcome in checks.items()
        if outcome not in ("passed", "skipped")
    ]
    if wrong:
        yield "cases that are not proven", wrong
    yield from sections(record)
