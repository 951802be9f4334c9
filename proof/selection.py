"""Which tests run, and on which cases: --ranks leaves cases out, --seed and --recipe change them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from megaproof.proof.options import SEED_BITS


def case_of(item: pytest.Item | pytest.Collector) -> Any | None:
    """The case of cases/cases.py that an item was parametrised with, if any."""
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    return case if hasattr(case, "ranks") else None


def case_id(case: Any) -> str:
    """Its id; '' for a case of a test that gives it none."""
    return getattr(case, "id", "")


def drop_other_ranks(items: list[pytest.Item], ranks: frozenset[int] | None) -> list[pytest.Item]:
    """Takes the tests on cases of other rank counts out of `items` and returns them."""
    dropped = [item for item in items if ranks and (case := case_of(item)) and case.ranks not in ranks]
    gone = set(dropped)
    items[:] = [item for item in items if item not in gone]
    return dropped


def change_cases(items: Sequence[pytest.Item], seed: int, recipe: str | None) -> None:
    """Gives every case another seed, `seed` larger, and the recipe of this name, where they are asked for."""
    if not (seed or recipe):
        return
    from megaproof.quant.recipe import RECIPES

    # One new case for each old one: fixtures of a wider scope compare their parameter by identity.
    changed: dict[int, Any] = {}
    for item in items:
        if case := case_of(item):
            if id(case) not in changed:
                changes: dict[str, Any] = {"seed": (case.seed + seed) % (1 << SEED_BITS)}
                if recipe and hasattr(case, "recipe"):
                    changes["recipe"] = RECIPES[recipe]
                changed[id(case)] = dataclasses.replace(case, **changes)
            item.callspec.params["case"] = changed[id(case)]


def count(items: Sequence[pytest.Item]) -> dict[str, int]:
    """Tests, those on cases and those that need a GPU; cases of tier cpu and of tier gpu."""
    found: dict[tuple[str, int], str] = {}
    for item in items:
        if case := case_of(item):
            key, needs_gpu = (case_id(case), case.ranks), item.get_closest_marker("gpu") is not None
            found[key] = "gpu" if needs_gpu and found.get(key) != "cpu" else "cpu"
    tiers = Counter(found.values())
    return {
        "tests": len(items),
        "on_cases": sum(case_of(item) is not None for item in items),
        "need_gpu": sum(item.get_closest_marker("gpu") is not None for item in items),
        "cases_cpu": tiers["cpu"],
        "cases_gpu": tiers["gpu"],
    }


def lines(counts: dict[str, int]) -> list[str]:
    """What `count` found, in words."""
    cases = counts["cases_cpu"] + counts["cases_gpu"]
    return [
        f"{counts['tests']} tests selected, {counts['on_cases']} of them on cases; {counts['need_gpu']} need a GPU",
        f"{cases} cases, {counts['cases_cpu']} of tier cpu and {counts['cases_gpu']} of tier gpu",
    ]
