"""Guesses at what happened to the bits: stale, constant, scaled, a sign, a last bit, another row's."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from megaproof.proof.divergence.evidence import UNLIKELY, Evidence, Pattern, equal_rows, some

LEAST_SPAN = 2
"""Columns that rows must be compared over to say that one is another."""


def nan_class(e: Evidence) -> Pattern | None:
    """Every difference is one NaN against another: the payloads differ, the numbers do not."""
    if not (e.stored.is_nan(e.before) & e.stored.is_nan(e.after)).all():
        return None
    return Pattern("NaN class only", "expected and actual are both NaN everywhere they differ; only payloads differ")


def constant(e: Evidence) -> Pattern | None:
    """Every wrong element is NaN, zero, the fill pattern, or at least one and the same bits."""
    if e.fill is not None and (e.after == e.fill).all() and e.by_chance(e.stored.width) < UNLIKELY:
        return Pattern("stale: fill", f"every wrong element still holds the fill pattern {e.stored.show(e.fill)}")
    nan = e.stored.is_nan(e.after) & ~e.stored.is_nan(e.before)
    if nan.all() and e.by_chance(e.stored.width - e.stored.mantissa) < UNLIKELY:
        return Pattern("stale: NaN", "every wrong element is NaN where a number is due: never written, or poisoned")
    zero = ((e.after & ~e.stored.sign) == 0) & ((e.before & ~e.stored.sign) != 0)
    if zero.all() and e.by_chance(e.stored.width - 1) < UNLIKELY:
        return Pattern("stale: zero", "every wrong element is 0: never written, or dropped")
    first = int(e.after[0])
    if (e.after == first).all() and e.count >= 4 and len(e.before.unique()) > 1:
        return Pattern("constant", f"every wrong element is {e.stored.show(first)}")
    return None


def previous_launch(e: Evidence) -> Pattern | None:
    """Every wrong element is what the launch before left there."""
    if e.previous is None or e.previous.shape[1] != e.actual.shape[1]:
        return None
    rows = e.wrong_rows
    if int(rows.max()) < len(e.previous):
        held = e.previous[rows][e.wrong[rows]] == e.after
        if held.all() and e.by_chance(e.stored.width) < UNLIKELY:
            return Pattern("stale: previous launch", "every wrong element is the previous launch's value of this place")
    if e.actual.shape[1] < LEAST_SPAN:
        return None
    known = _by_bytes(e.previous)
    found = [known.get(_key(row)) for row in e.actual[rows]]
    if all(found):
        pairs = [f"{row} holds its row {held[0]}" for row, held in zip(rows.tolist(), found, strict=True)]
        return Pattern("stale: previous launch", f"wrong rows are rows of the previous launch: {some(pairs)}")
    return None


def sign_flip(e: Evidence) -> Pattern | None:
    """Only the sign bit differs."""
    if not e.stored.sign or not ((e.before ^ e.after) == e.stored.sign).all():
        return None
    zeros = "; all are zeros" if ((e.before & ~e.stored.sign) == 0).all() else ""
    return Pattern("sign flip", f"every wrong element has the right magnitude and the other sign{zeros}")


def last_bit(e: Evidence) -> Pattern | None:
    """Every difference is one step of the format."""
    if not e.stored.mantissa or not (e.stored.ulps(e.before, e.after) == 1).all():
        return None
    up = int((e.stored.ordered(e.after) > e.stored.ordered(e.before)).sum())
    return Pattern(
        "last bit only",
        f"every wrong element is 1 ulp off, {up} above and {e.count - up} below: a rounding, an order of sums, "
        "or a contraction",
    )


def power_of_two(e: Evidence) -> Pattern | None:
    """Every wrong element is the expected one times the same 2^k, rounded and saturated as its format does."""
    before, after = e.stored.values(e.before), e.stored.values(e.after)
    usable = torch.isfinite(before) & torch.isfinite(after) & (before != 0) & (after != 0)
    if not usable.any():
        return None
    (mantissa, exponent), (other, new) = torch.frexp(before[usable].abs()), torch.frexp(after[usable].abs())
    # Subnormal and saturated results tell less; where there are none, all elements vote.
    exact = mantissa == other
    if not exact.any():
        return None
    k = int((new - exponent)[exact].mode().values)
    if k == 0 or not (e.stored.encode(before * 2.0**k) == e.after).all():
        return None
    # One element fixes k, with the chance that sign and mantissa agree; the others have no choice.
    free = e.stored.width - e.stored.mantissa - 1
    if e.by_chance(e.stored.width, free) >= UNLIKELY:
        return None
    return Pattern("scaled by a power of two", f"every wrong element is the expected one times 2^{k}")


def _span(e: Evidence) -> slice:
    """The columns that may have moved: the wrong ones, widened to whole 64-groups where the stage is wide."""
    first, last = int(e.wrong_columns[0]), int(e.wrong_columns[-1])
    if e.actual.shape[1] <= 64:
        return slice(0, e.actual.shape[1])
    return slice(first // 64 * 64, min(e.actual.shape[1], (last // 64 + 1) * 64))


def moved_rows(e: Evidence) -> Pattern | None:
    """Wrong rows are other rows of the expected stage: shifted by one, swapped, or copied."""
    span = _span(e)
    expected, actual, rows = e.expected[:, span], e.actual[:, span], e.wrong_rows
    if expected.shape[1] < LEAST_SPAN or len(expected) < 2:
        return None
    within = "" if span.stop - span.start == e.actual.shape[1] else f", in columns {span.start} to {span.stop - 1}"
    return _shifted(e, expected, actual, within) or _permuted(expected, actual, rows, within)


def _shifted(e: Evidence, expected: Tensor, actual: Tensor, within: str) -> Pattern | None:
    everyone = torch.arange(len(expected))
    orders = {"its expert's rows": torch.argsort(e.rows.expert, stable=True), "canonical order": everyone}
    if bool((e.rows.expert < 0).any()):
        del orders["its expert's rows"]
    for what, order in orders.items():
        for step in (1, -1):
            source = torch.full_like(everyone, -1)
            if step == 1:
                source[order[1:]] = order[:-1]
            else:
                source[order[:-1]] = order[1:]
            if what != "canonical order":
                source[(source >= 0) & (e.rows.expert[source.clamp(min=0)] != e.rows.expert)] = -1
            known = e.wrong_rows[source[e.wrong_rows] >= 0]  # the end of a run has no neighbour to hold
            if len(known) >= 2 and equal_rows(actual[known], expected[source[known]]).all():
                side = "before" if step == 1 else "after"
                text = f"each of {len(known)} wrong rows is the expected row {side} it in {what}{within}"
                return Pattern("shifted by one row", text)
    return None


def _permuted(expected: Tensor, actual: Tensor, rows: Tensor, within: str) -> Pattern | None:
    known = _by_bytes(expected)
    source: dict[int, list[int]] = {}
    for row in rows.tolist():
        found = known.get(_key(actual[row]))
        if not found:
            return None
        source[row] = found
    if not bool(actual[rows].any()):  # zeros alone are every zero row's
        return None
    pairs = sorted({tuple(sorted((i, j))) for i, js in source.items() for j in js if i in source.get(j, [])})
    if {row for pair in pairs for row in pair} == set(source):
        text = some([f"{i} and {j}" for i, j in pairs])
        return Pattern("rows swapped", f"actual rows are each other's expected rows: {text}{within}")
    text = some([f"row {i} holds row {js[0]}" for i, js in source.items()])
    return Pattern("rows moved", f"every wrong row is another expected row: {text}{within}")


def _key(row: Tensor) -> bytes:
    return row.contiguous().numpy().tobytes()


def _by_bytes(rows: Tensor) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        found[_key(row)].append(i)
    return found


GUESSES = (nan_class, constant, previous_launch, sign_flip, last_bit, power_of_two, moved_rows)
