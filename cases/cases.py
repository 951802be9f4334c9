"""The differential matrix: one table of cases with readable ids. `cases/inputs/__init__.py` makes their tensors.

GATE, SMOKE, BIG and EXTREMES are named by hand. SMALL and FULL are pairwise tables (`cases/pairwise.py`): every two
values of every two axes meet in a case, at smoke size on any machine and at full size on a GPU.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from megaproof.cases.pairwise import Row, table
from megaproof.quant.recipe import RECIPES, Recipe
from megaproof.quant.shapes import SHAPES, Shape

DEFAULT_SEED = 20261124


@dataclass(frozen=True)
class Case:
    """One problem of the matrix; its id names every axis."""

    shape: Shape
    tokens: tuple[int, ...]
    """Tokens of each rank; its length is the number of ranks."""
    recipe: Recipe = field(default_factory=Recipe)
    routing: str = "uniform"
    """How experts are chosen: see `inputs.ROUTINGS`."""
    masked: int = 0
    """Per cent of the slots that are -1."""
    family: str = "mixed"
    """Values: see `inputs.FAMILIES`."""
    seed: int = DEFAULT_SEED
    tier: str = "cpu"
    """'cpu': small enough for the gate without a GPU. 'gpu': computed on a GPU only, and without a golden."""

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def id(self) -> str:
        tokens = self.tokens
        spread = str(tokens[0]) if len(set(tokens)) == 1 else "x".join(map(str, tokens))
        clamp = "none" if self.recipe.clamp is None else f"{self.recipe.clamp:g}"
        parts = [
            self.shape.name,
            f"r{self.ranks}",
            f"t{spread}",
            f"clamp{clamp}",
            f"fast{int(self.recipe.silu == 'fast')}",
            self.routing,
        ]
        if self.masked:
            parts.append(f"mask{self.masked}")
        if self.family != "mixed":
            parts.append(self.family)
        plain = Recipe(clamp=self.recipe.clamp, silu=self.recipe.silu)
        parts += [f"{name}_{value}" for name, (value, _) in self.recipe.diff(plain).items()]
        return "-".join(parts)


def _case(shape: str, ranks: int, tokens: int | tuple[int, ...], **axes: Any) -> Case:
    changes = {name: axes.pop(name) for name in ("clamp", "silu") if name in axes}
    recipe = axes.pop("recipe", RECIPES["default"]).replace(**changes)
    spread = (tokens,) * ranks if isinstance(tokens, int) else tokens
    return Case(SHAPES[shape], spread, recipe, **axes)


def _flash(tokens: int | tuple[int, ...], **axes: Any) -> Case:
    return _case("dsv4_flash", 8, tokens, **axes)


# --- named by hand ----------------------------------------------------------------------------------------------------

#: The gate: full-size dsv4_flash at 8 ranks, at most 64 tokens over all ranks.
GATE = (
    _flash(8),
    _flash(4, silu="precise", routing="zipf"),
    _flash(2, clamp=None, routing="one_hot"),
    _flash(2, clamp=None, silu="precise", masked=30, family="adversarial"),
    _flash((9, 0, 1, 7, 3, 0, 2, 5), clamp=1.0, routing="zipf", masked=30),
    _flash((16, 0, 0, 0, 0, 0, 0, 0), clamp=0.5, silu="precise", routing="one_rank"),
    _flash((1, 1, 1, 1, 1, 1, 1, 0), clamp=10.0, routing="few_experts", masked=70),
    _flash(1, masked=100),
    _flash(2, clamp=None, family="adversarial"),  # the only family in which y depends on the order of the slots
    _flash((3, 2, 2, 2, 2, 2, 2, 1), clamp=None, family="lattice"),
    _flash((2, 1, 0, 1, 1, 1, 1, 1), clamp=64.0, silu="precise", family="lattice", routing="zipf", masked=30),
)

#: Every rank count and every recipe, at a size that takes a second.
SMOKE = (
    *(_case("smoke", ranks, 5, routing="zipf", masked=30) for ranks in (1, 2, 4, 8)),
    *(_case("smoke", 2, (7, 4), recipe=recipe) for name, recipe in RECIPES.items() if name not in ("default",)),
    *(_case("smoke", 4, (0, 65, 1, 12), clamp=clamp, silu="precise") for clamp in (None, 0.5, 1.0)),
    _case("smoke", 4, (8, 0, 3, 1), clamp=None, family="lattice", masked=30),
    _case("smoke", 2, 0),
)

#: The other full-size presets with one to three tokens: their real dimensions, within seconds on a CPU.
BIG = (
    _case("dsv4_pro", 8, (1, 0, 0, 0, 0, 0, 1, 0)),
    _case("dsv4_pro", 1, 1, clamp=None, silu="precise", family="lattice"),
    _case("mimo_pro", 4, (0, 1, 0, 1), silu="precise", routing="zipf", masked=30),
    _case("mimo_pro", 8, (0, 0, 0, 0, 0, 1, 0, 0), clamp=None, family="lattice"),
    _case("glm", 2, (2, 1), clamp=1.0, routing="few_experts"),
    _case("glm", 8, (0, 1, 0, 0, 0, 0, 0, 1), clamp=0.5, silu="precise", routing="one_rank"),
)


def _on_gpu(shape: str, ranks: int, tokens: int | tuple[int, ...], **axes: Any) -> Case:
    return _case(shape, ranks, tokens, tier="gpu", **axes)


UNEVEN = (129, 0, 64, 1, 128, 7, 65, 2)
"""Every tile edge at once, on ranks of one launch."""

#: Full-size extremes for a GPU: tile edges, skew, heat, emptiness, capacity.
EXTREMES = (
    *(_on_gpu("dsv4_flash", 8, tokens) for tokens in (63, 64, 65, 127, 128, 129)),
    *(_on_gpu("dsv4_flash", 8, 33, clamp=clamp, silu=silu) for clamp in (None, 0.5) for silu in ("fast", "precise")),
    _on_gpu("dsv4_flash", 8, UNEVEN, routing="zipf", masked=30),
    _on_gpu("dsv4_flash", 8, (0, 0, 0, 129, 0, 0, 0, 0), silu="precise"),
    _on_gpu("dsv4_flash", 8, 129, routing="one_hot"),
    _on_gpu("dsv4_flash", 8, 65, routing="one_rank", silu="precise"),
    _on_gpu("dsv4_flash", 8, 64, routing="few_experts", masked=70),
    _on_gpu("dsv4_flash", 8, 128, clamp=None, family="lattice", masked=30),
    _on_gpu("dsv4_flash", 8, 64, family="adversarial", clamp=None),
    _on_gpu("dsv4_flash", 8, UNEVEN, family="position", clamp=None),
    _on_gpu("dsv4_flash", 8, 1024, routing="zipf"),
    _on_gpu("dsv4_flash", 1, 2048),
    *(_on_gpu(shape, 8, UNEVEN, routing="zipf") for shape in ("dsv4_pro", "mimo_pro", "glm")),
    *(_on_gpu(shape, 8, 64, silu="precise", masked=30) for shape in ("dsv4_pro", "mimo_pro", "glm")),
)

# --- every two values of every two axes -------------------------------------------------------------------------------

SPREADS: dict[str, tuple[int, ...]] = {
    **{str(tokens): (tokens,) * 8 for tokens in (0, 1, 7, 64, 65, 128, 129)},
    "uneven": (5, 0, 1, 9, 3, 0, 2, 7),
    "one_idle": (17, 0, 17, 17, 17, 17, 17, 17),
    "capacity": (512,) * 8,
}
"""Tokens of ranks 0, 1, 2 ...; fewer ranks take the first of them."""

AXES: dict[str, tuple[object, ...]] = {
    "ranks": (1, 2, 4, 8),
    "tokens": tuple(SPREADS),
    "clamp": (None, 0.5, 1.0, 10.0),
    "silu": ("fast", "precise"),
    "routing": ("uniform", "zipf", "one_hot", "one_rank", "few_experts"),
    "masked": (0, 30, 70, 100),
    "recipe": ("default", "granularity_128", "fp32_scales", "unfused", "pr323_small", "weight_in_combine"),
    "family": ("mixed", "lattice", "gaussian", "heavy_tail", "adversarial", "position"),
}
SMALL_AXES = AXES | {"shape": ("smoke",), "tokens": tuple(name for name in SPREADS if name != "capacity")}
FULL_AXES = {"shape": ("dsv4_flash", "dsv4_pro", "mimo_pro", "glm"), **AXES}
INERT = (("tokens", "0"), ("masked", 100))
"""Values beside which no other one has an effect: a case of theirs covers no pair of two others."""


def allowed(row: Row) -> bool:
    """Whether a row, whole or in part, is a case: some values exclude each other."""
    if row.get("tokens") in ("uneven", "one_idle") and row.get("ranks") == 1:
        return False  # one rank is neither uneven nor beside an idle one
    if row.get("family") == "lattice":
        # Clamps of the axis take its values off the lattice, and so do fp32 scales and roundings that are not exact.
        exact = row.get("recipe", "default") in ("default", "granularity_128", "pr323_small")
        if row.get("clamp") is not None or not exact:
            return False
    # The gate on a GPU is this preset at 8 ranks, with what a kernel must be able to run.
    gate = row.get("shape") == "dsv4_flash" and row.get("ranks") == 8
    return not gate or row.get("recipe", "default") == "default"


def _from_row(row: Row) -> Case:
    axes = {name: row[name] for name in ("routing", "masked", "family", "clamp", "silu")}
    tokens = SPREADS[row["tokens"]][: row["ranks"]]
    tier = "cpu" if row["shape"] == "smoke" or not any(tokens) else "gpu"
    return _case(row["shape"], row["ranks"], tokens, recipe=RECIPES[row["recipe"]], tier=tier, **axes)


SMALL = tuple(map(_from_row, table(SMALL_AXES, allowed, INERT)))
FULL = tuple(map(_from_row, table(FULL_AXES, allowed, INERT)))

CASES = GATE + SMOKE + BIG + EXTREMES + SMALL + FULL


def find(case_id: str) -> Case:
    """The case of this id. Raises KeyError naming the closest ids."""
    for case in CASES:
        if case.id == case_id:
            return case
    near = difflib.get_close_matches(case_id, [case.id for case in CASES], n=3, cutoff=0.0)
    raise KeyError(f"no case {case_id!r}; closest: {', '.join(near)}")
