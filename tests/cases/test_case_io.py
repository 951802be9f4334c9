"""A case as JSON and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megaproof.cases import case_io
from megaproof.cases.cases import CASES, Case
from megaproof.quant.recipe import Recipe, RecipeError
from megaproof.quant.shapes import SHAPES


def through_json(case: Case) -> Case:
    return case_io.from_json(json.loads(json.dumps(case_io.to_json(case))))


def test_every_case_survives_json() -> None:
    for case in CASES:
        reseeded = dataclasses.replace(case, seed=(1 << 64) - 1)
        assert through_json(reseeded) == reseeded


def test_a_clamp_comes_back_exactly() -> None:
    odd = Case(SHAPES["smoke"], (1,), Recipe(clamp=0.1))
    assert case_io.to_json(odd)["recipe"]["clamp"] == (0.1).hex()
    assert through_json(odd).recipe.clamp == 0.1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"colour": "red"}, TypeError),
        ({"shape": {"name": "smoke"}}, TypeError),
        ({"tokens": 7}, TypeError),
        ({"recipe": Recipe().fields() | {"silu": "slow"}}, RecipeError),
        ({"recipe": Recipe().fields() | {"colour": "red"}}, RecipeError),
    ],
)
def test_what_is_no_case_is_refused(change: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        case_io.from_json(case_io.to_json(CASES[0]) | change)


@pytest.mark.parametrize("missing", ["shape", "tokens", "recipe"])
def test_what_is_missing_is_named(missing: str) -> None:
    fields = case_io.to_json(CASES[0])
    del fields[missing]
    with pytest.raises(KeyError, match=missing):
        case_io.from_json(fields)
