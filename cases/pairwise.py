"""All pairs: a table in which every two values of every two axes meet in some row, made greedily and without chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
Value = tuple[str, object]
Axes = Mapping[str, Sequence[object]]


def possible_pairs(axes: Axes, allowed: Callable[[Row], bool]) -> list[tuple[Value, Value]]:
    """Every pair of values of two axes that no rule forbids, in the order of the axes."""
    return [
        ((a, left), (b, right))
        for a, b in combinations(axes, 2)
        for left in axes[a]
        for right in axes[b]
        if allowed({a: left, b: right})
    ]


def met(row: Row, axes: Axes, inert: Iterable[Value] = ()) -> set[tuple[Value, Value]]:
    """The pairs that a row, whole or in part, puts to the test.

    Beside an inert value (no tokens, every slot masked) the others have no effect: only pairs with it count.
    """
    named = [(axis, row[axis]) for axis in axes if axis in row]
    dead = set(inert).intersection(named)
    return {pair for pair in combinations(named, 2) if not dead or dead.intersection(pair)}


def table(
    axes: Axes, allowed: Callable[[Row], bool] = lambda row: True, inert: Iterable[Value] = frozenset()
) -> list[Row]:
    """Rows that meet every possible pair at least once.

    Each row starts from the first pair that is still missing; then each axis takes the value that brings most missing
    pairs, of equal ones that used least so far. `allowed` judges partial rows and must leave a way to complete any
    pair that it allows; raises ValueError naming the row where it does not.
    """
    missing = dict.fromkeys(possible_pairs(axes, allowed))
    used = {(axis, value): 0 for axis, values in axes.items() for value in values}
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for axis in (axis for axis in axes if axis not in row):
            choices = [value for value in axes[axis] if allowed(row | {axis: value})]
            # An inert value would waste the pairs that the row has already.
            choices = [value for value in choices if met(row, axes, inert) <= met(row | {axis: value}, axes, inert)]
            if not choices:
                raise ValueError(f"no value of {axis} is allowed beside {row}")
            brought = {value: len(met(row | {axis: value}, axes, inert) & missing.keys()) for value in choices}
            row[axis] = max(choices, key=lambda value: (brought[value], -used[axis, value]))
        for pair in met(row, axes, inert):
            missing.pop(pair, None)
        for axis, value in row.items():
            used[axis, value] += 1
        rows.append({axis: row[axis] for axis in axes})
    return rows
