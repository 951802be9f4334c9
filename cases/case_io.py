"""A case as plain JSON values and back: what bundles keep, what processes are told, what goldens name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megaproof.cases.cases import Case
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape


def to_json(case: Case) -> dict[str, Any]:
    """Every field of a case as values that JSON has; a clamp is written in hex, so that it comes back exactly."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return fields | {
        "shape": dataclasses.asdict(case.shape),
        "tokens": list(case.tokens),
        "recipe": case.recipe.fields(),
    }


def from_json(fields: Mapping[str, Any]) -> Case:
    """Inverse of `to_json`.

    Raises:
        KeyError: shape, tokens or recipe is missing.
        TypeError: a field that a case or a shape does not have, or a value of another type.
        RecipeError: values that this version does not know.
    """
    built = {
        "shape": Shape(**fields["shape"]),
        "tokens": tuple(fields["tokens"]),
        "recipe": Recipe.from_fields(fields["recipe"]),
    }
    return Case(**dict(fields) | built)
