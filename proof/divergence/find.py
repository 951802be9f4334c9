"""The first stage that differs, its first element in canonical order, and what can be said of the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megaproof.cases import inputs
from megaproof.cases.cases import CASES, DEFAULT_SEED, Case
from megaproof.proof.divergence import shape, values
from megaproof.proof.divergence.evidence import Evidence, Pattern
from megaproof.proof.divergence.place import Place, Rows, place, rows_of
from megaproof.proof.divergence.report import neighbours, report
from megaproof.quant.stored import Stored, unsigned
from megaproof.reference import oracle
from megaproof.reference.layer import LayerResult
from megaproof.reference.stages import OUTPUTS, SHOWN, STAGES, Stage

MOST_ELEMENTS = 1 << 26
"""Elements of a stage that patterns are sought in; of a larger stage, wrong rows first."""


@dataclass(frozen=True)
class Divergence:
    """The first difference between what a layer should compute and what it did."""

    case_id: str
    stage: str
    equation: str
    stored: Stored
    """How the elements of the stage are stored."""
    granularity: int
    """Columns of an L2 activation scale group."""
    compared: dict[str, int]
    """Elements of the stages before, all equal."""
    missing: tuple[str, ...]
    """Stages that the kernel does not show."""
    explain: str
    """The command that derives the element by hand."""
    problem: str = ""
    """A wrong shape, dtype or number of tensors; then there is nothing below."""
    place: Place | None = None
    expected_bits: int = 0
    actual_bits: int = 0
    ulp: int = 0
    """Steps of the format between the two; -1: one is a NaN."""
    extent: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What is touched -> (wrong, all): elements, rows, columns, ranks, experts."""
    ulp_max: int = 0
    ulp_histogram: dict[str, int] = field(default_factory=dict)
    calc_diff: float = 0.0
    allclose: bool = False
    patterns: tuple[Pattern, ...] = ()
    neighbours: tuple[str, ...] = ()
    looked_at: int = 0
    """Rows that patterns were sought in, where that is not all."""
    rows: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """'expected' and 'actual': the row of the stage; 'y_expected' and 'y_actual': the token's row of y."""

    @property
    def format(self) -> str:
        """Name of the format of the stage."""
        return self.stored.name

    def show(self, bits: int) -> str:
        """'0x3a = 1.25', in the format of the stage."""
        return self.stored.show(bits)

    def report(self) -> str:
        """Text for a terminal, at most 120 columns wide."""
        return report(self)


@dataclass(frozen=True)
class Comparison:
    """What was compared, and the first divergence, if any."""

    divergence: Divergence | None
    compared: dict[str, int]
    """Elements found equal, by stage. Stages behind a divergence are not looked at."""
    missing: tuple[str, ...]
    """Stages that the kernel does not show, of those looked at."""


def compare_stages(
    expected: LayerResult,
    actual_stages: Mapping[str, Tensor],
    actual_y: Sequence[Tensor],
    actual_stats: Sequence[Tensor],
    case: Case,
    *,
    topk_idx: Sequence[Tensor] | None = None,
    previous: Mapping[str, Tensor] | None = None,
    fill: Mapping[str, int] | None = None,
) -> Comparison:
    """Compares in the order of STAGES, row by row in (source rank, token, slot) order, and stops at a difference.

    expected must be traced. actual_stages: any of the stages before y, rows in canonical order as in the trace, dtypes
    as there; y and stats are lists by rank. topk_idx: the case's own where None. previous: stages of the launch before,
    fill: bits that a buffer held before the launch, by stage; both only help to name a pattern.
    Raises ValueError where expected has no trace or a stage's name is unknown.
    """
    if expected.trace is None:
        raise ValueError("expected has no trace: compute it with trace=True")
    unknown = set(actual_stages) - set(SHOWN)
    if unknown:
        raise ValueError(f"actual_stages has {', '.join(sorted(unknown))}; it takes {', '.join(SHOWN)}")
    compared: dict[str, int] = {}
    missing: list[str] = []
    by_rank = {"y": (expected.y, actual_y), "stats": (expected.stats, actual_stats)}
    for name, stage in STAGES.items():
        if name in SHOWN and name not in actual_stages:
            missing.append(name)
            continue
        theirs, problem = _gather(name, *by_rank[name]) if name in OUTPUTS else (actual_stages[name], "")
        ours = expected.trace[name]
        problem = problem or _misfit(ours, theirs)
        if not problem and (ours.numel() == 0 or not _differs(ours, theirs).any()):
            compared[name] = ours.numel()
            continue
        head = (case.id, name, stage.equation, stage.format(case.recipe), case.recipe.activation_granularity)
        told = (dict(compared), tuple(missing))
        if problem:
            explain = "check what the adapter hands out: stages are in canonical order, as reference/layer.py has them"
            return Comparison(Divergence(*head, *told, explain, problem), *told)
        where = inputs.make(case).topk_idx if topk_idx is None else topk_idx
        rows = rows_of(case, stage, where)
        before = _previous(name, previous)
        found = _decode(case, stage, rows, ours, theirs, before, (fill or {}).get(name))
        found["rows"] |= _y_rows(found["place"], expected.y, actual_y)
        return Comparison(Divergence(*head, *told, _command(case, stage, found["place"]), **found), *told)
    return Comparison(None, compared, tuple(missing))


def first_divergence(
    expected: LayerResult,
    actual_stages: Mapping[str, Tensor],
    actual_y: Sequence[Tensor],
    actual_stats: Sequence[Tensor],
    case: Case,
    *,
    topk_idx: Sequence[Tensor] | None = None,
    previous: Mapping[str, Tensor] | None = None,
    fill: Mapping[str, int] | None = None,
) -> Divergence | None:
    """The divergence of `compare_stages`, or None where every stage that is shown, y and the statistics are equal."""
    keywords = {"topk_idx": topk_idx, "previous": previous, "fill": fill}
    return compare_stages(expected, actual_stages, actual_y, actual_stats, case, **keywords).divergence


def _gather(stage: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[Tensor, str]:
    """(one tensor of all ranks, '') or (nothing, what does not fit)."""
    if len(ours) != len(theirs):
        return torch.empty(0), f"{stage} must be a list of {len(ours)} tensors, one a rank; it has {len(theirs)}"
    for rank, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if problem := _misfit(a, b):
            return torch.empty(0), f"rank {rank}: {problem}"
    return torch.cat([t.cpu() for t in theirs]), ""


def _misfit(ours: Tensor, theirs: Tensor) -> str:
    empty = ours.numel() == theirs.numel() == 0 and ours.shape[:1] == theirs.shape[:1]
    if ours.dtype == theirs.dtype and (ours.shape == theirs.shape or empty):
        return ""
    return f"expected {ours.dtype} {list(ours.shape)}, got {theirs.dtype} {list(theirs.shape)}"


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _differs(ours: Tensor, theirs: Tensor) -> Tensor:
    """bool, on the CPU; [n, 1] for a vector."""
    a, b = (t.contiguous().view(_INTEGER[t.element_size()]) for t in (ours, theirs.to(ours.device)))
    return (a != b).cpu().reshape(len(a), -1)


def _previous(stage: str, previous: Mapping[str, Tensor] | None) -> Tensor | None:
    if not previous or stage not in previous:
        return None
    held = previous[stage]
    return unsigned(held).reshape(len(held), -1)


def _decode(
    case: Case, stage: Stage, rows: Rows, ours: Tensor, theirs: Tensor, previous: Tensor | None, fill: int | None
) -> dict[str, Any]:
    """Everything that a Divergence says of a stage that differs."""
    stored, wrong = stage.format(case.recipe), _differs(ours, theirs)
    row, column = (int(i) for i in wrong.nonzero()[0])
    kept = _kept(wrong)
    expected, actual = (unsigned(t if len(kept) == len(wrong) else t[kept.to(t.device)]) for t in (ours, theirs))
    expected, actual = (t.reshape(len(kept), -1) for t in (expected, actual))
    seen = Rows(*(getattr(rows, name)[kept] for name in Rows.__dataclass_fields__))
    evidence = Evidence(expected, actual, stored, seen, stage.span(case.recipe), previous, fill)
    ulps = stored.ulps(evidence.before, evidence.after)
    numbers = [stored.values(t) for t in (expected, actual)]
    at = int((kept == row).nonzero()[0])
    return {
        "place": place(case, stage, rows, row, column),
        "expected_bits": int(expected[at, column]),
        "actual_bits": int(actual[at, column]),
        "ulp": int(stored.ulps(expected[at, column], actual[at, column])),
        "extent": _extent(wrong, rows),
        "ulp_max": max(0, int(ulps.max())),
        "ulp_histogram": _histogram(ulps),
        "calc_diff": oracle.calc_diff(*numbers),
        "allclose": torch.allclose(*numbers, rtol=1e-2, atol=1e-2, equal_nan=True),
        "patterns": tuple(p for guess in (*values.GUESSES, *shape.GUESSES) if (p := guess(evidence))),
        "neighbours": tuple(_around(stage, seen, evidence, at, column)),
        "looked_at": 0 if len(kept) == len(wrong) else len(kept),
        "rows": {"expected": ours.cpu()[row].reshape(-1).clone(), "actual": theirs.cpu()[row].reshape(-1).clone()},
    }


def _kept(wrong: Tensor) -> Tensor:
    """Indices of the rows to look at: all, or as many as fit, half of them wrong ones; ascending."""
    rows, most = len(wrong), max(2, MOST_ELEMENTS // wrong.shape[1])
    if rows <= most:
        return torch.arange(rows)
    bad = wrong.any(1)
    first = bad.nonzero().squeeze(1)[: most // 2]
    others = (~bad).nonzero().squeeze(1)[: most - len(first)]
    return torch.cat([first, others]).sort().values


def _extent(wrong: Tensor, rows: Rows) -> dict[str, tuple[int, int]]:
    bad = wrong.any(1)
    extent = {"elements": (int(wrong.sum()), wrong.numel()), "rows": (int(bad.sum()), len(wrong))}
    if wrong.shape[1] > 1:
        extent["columns"] = (int(wrong.any(0).sum()), wrong.shape[1])
    for what, key in (
        ("source ranks" if bool((rows.token >= 0).all()) else "ranks", rows.rank),
        ("destination ranks", rows.destination),
        ("experts", rows.expert),
    ):
        if bool((key >= 0).all()) and not (what == "destination ranks" and "ranks" in extent):
            extent[what] = (len(key[bad].unique()), len(key.unique()))
    return extent


def _histogram(ulps: Tensor) -> dict[str, int]:
    """Elements by distance, in powers of two: '0' (zeros of two signs), '1', '2', '3-4', '5-8', ..., 'NaN'."""
    counts: dict[str, int] = {}
    finite = ulps[ulps >= 0].sort().values
    low = 0
    while len(finite):
        high = low if low < 2 else 1 << (low - 1).bit_length()
        inside = int((finite <= high).sum())
        if inside:
            counts[str(low) if low == high else f"{low:,}-{high:,}"] = inside
        finite, low = finite[inside:], high + 1
    if bool((ulps < 0).any()):
        counts["NaN"] = int((ulps < 0).sum())
    return counts


def _around(stage: Stage, rows: Rows, e: Evidence, row: int, column: int) -> list[str]:
    """The window around an element: rows of the same expert in a stage of slots, else the rows beside it."""
    same = rows.expert == rows.expert[row] if stage.rows == "slot" else torch.ones(len(rows), dtype=torch.bool)
    order = same.nonzero().squeeze(1).tolist()
    if stage.rows == "expert":
        names = [f"expert {number}" for number in rows.expert.tolist()]
    else:
        parts = (t.tolist() for t in (rows.rank, rows.token, rows.slot))
        names = [f"({r}, {t})" if k < 0 else f"({r}, {t}, {k})" for r, t, k in zip(*parts, strict=True)]
    return neighbours(e.expected, e.actual, names, row, column, order, e.stored.width)


def _y_rows(at: Place, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The token's rows of y on both sides, where the element has a token and y has its shape."""
    if at.token is None or len(theirs) != len(ours) or theirs[at.rank].shape != ours[at.rank].shape:
        return {}
    return {f"y_{side}": y[at.rank][at.token].cpu().clone() for side, y in (("expected", ours), ("actual", theirs))}


def _command(case: Case, stage: Stage, at: Place) -> str:
    """The command that explains an element of a case of the table; an id does not tell the seed."""
    if case.id not in {known.id for known in CASES}:
        return f"{case.id} is not in cases/cases.py, so `python -m reference explain` takes a bundle of it alone"
    command = f"python -m reference explain {case.id}"
    if case.seed != DEFAULT_SEED:
        command += f" --seed {(case.seed - DEFAULT_SEED) % (1 << 64)}"
    if stage.rows == "expert":
        return f"{command} --expert {at.expert}"
    command += f" --rank {at.rank} --token {at.token}"
    if at.slot is not None:
        command += f" --slot {at.slot}"
    if stage.is_of_y:
        return f"{command} --column {at.column}"
    if stage.columns == "hidden":
        return f"{command} --column 0 --k-block {at.k_block}"
    return f"{command} --column 0 --activation {at.column * stage.span(case.recipe)}"
