"""A case as plain JSON values and back: what bundles keep, what processes are told, what goldens name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megaproof.cases.cases import Case
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape

MOST = {"hidden": 1 << 15, "intermediate": 1 << 15, "experts": 1 << 12, "topk": 32}
"""The largest sizes of a layer that a file may ask for; the kernel's own limits are lower."""
MOST_RANKS, MOST_TOKENS = 72, 1 << 17
"""Ranks, and tokens over all of them."""


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
        ValueError: a number beyond what this project computes: it would be allocated before anything fails.
        RecipeError: values that this version does not know.
    """
    built = {
        "shape": Shape(**fields["shape"]),
        "tokens": tuple(fields["tokens"]),
        "recipe": Recipe.from_fields(fields["recipe"]),
    }
    return _checked(Case(**dict(fields) | built))


def _checked(case: Case) -> Case:
    """The case, if its sizes and names are such that anybody may have written them, before a tensor is made of them."""
    shape, tokens = case.shape, case.tokens
    limits = {name: (getattr(shape, name), most) for name, most in MOST.items()}
    limits |= {"masked": (case.masked, 100), "seed": (case.seed, (1 << 64) - 1)}
    for name, (value, most) in limits.items():
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"{name} is no whole number from 0 to {most}")
    if not 1 <= len(tokens) <= MOST_RANKS or shape.experts % len(tokens):
        raise ValueError(f"tokens are of no number of ranks from 1 to {MOST_RANKS} that divides experts")
    if not all(type(count) is int and count >= 0 for count in tokens) or sum(tokens) > MOST_TOKENS:
        raise ValueError(f"tokens are no whole numbers, at most {MOST_TOKENS} together")
    names = {"shape": shape.name, "routing": case.routing, "family": case.family, "tier": case.tier}
    for name, value in names.items():
        if not isinstance(value, str) or not value.isprintable() or len(value) > 64:
            raise ValueError(f"{name} is no name")
    return case
