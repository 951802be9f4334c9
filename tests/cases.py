"""The differential matrix: one table of cases with readable ids. `tests/inputs.py` makes their tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from quant.recipe import RECIPES, SHAPES, Recipe, Shape

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
    """'cpu': small enough for the gate without a GPU."""

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


def _case(shape: str, ranks: int, tokens: int | tuple[int, ...], **axes: object) -> Case:
    changes = {name: axes.pop(name) for name in ("clamp", "silu") if name in axes}
    recipe = axes.pop("recipe", RECIPES["default"]).replace(**changes)
    spread = (tokens,) * ranks if isinstance(tokens, int) else tokens
    return Case(SHAPES[shape], spread, recipe, **axes)


def _flash(tokens: int | tuple[int, ...], **axes: object) -> Case:
    return _case("dsv4_flash", 8, tokens, **axes)


#: The gate: full-size dsv4_flash at 8 ranks, at most 64 tokens over all ranks.
GATE = (
    _flash(8),
    _flash(4, silu="precise", routing="zipf"),
    _flash(2, clamp=None, routing="one_hot"),
    _flash(2, clamp=None, silu="precise", masked=30),
    _flash((9, 0, 1, 7, 3, 0, 2, 5), clamp=1.0, routing="zipf", masked=30),
    _flash((16, 0, 0, 0, 0, 0, 0, 0), clamp=0.5, silu="precise", routing="one_rank"),
    _flash((1, 1, 1, 1, 1, 1, 1, 0), clamp=10.0, routing="few_experts", masked=70),
    _flash(1, masked=100),
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

CASES = GATE + SMOKE


def find(case_id: str) -> Case:
    """The case of this id. Raises KeyError naming the closest ids."""
    for case in CASES:
        if case.id == case_id:
            return case
    import difflib

    near = difflib.get_close_matches(case_id, [case.id for case in CASES], n=3, cutoff=0.0)
    raise KeyError(f"no case {case_id!r}; closest: {', '.join(near)}")
