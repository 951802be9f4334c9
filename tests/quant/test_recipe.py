"""The recipe and the shapes: identity, what is refused and how, and the round trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaproof.quant import recipe as recipes
from megaproof.quant import shapes
from megaproof.quant.recipe import CHOICES, RECIPES, Recipe, RecipeError
from megaproof.quant.shapes import SHAPES, Shape

DEFAULT_ID = "39ed206e4eab4362a73a2bfaa257fc98eed65788483db1e35c05f459b8e0883a"
"""Every golden of the default recipe carries it: it may never change."""

CLAMPS = st.none() | st.floats(min_value=0, max_value=3.4028234663852886e38)
BUILT = {name: built for name, (built, _) in CHOICES.items()}
ANY_RECIPE = st.builds(Recipe, clamp=CLAMPS, **{name: st.sampled_from(built) for name, built in BUILT.items()})
FLIPS = [("clamp", 1.0), ("clamp", None)] + [(name, value) for name in BUILT for value in BUILT[name][1:]]
UNBUILT = [(name, value) for name, (_, unbuilt) in CHOICES.items() for value in unbuilt]


# --- identity ---------------------------------------------------------------------------------------------------------


def test_default_id_is_pinned() -> None:
    assert Recipe().recipe_id == DEFAULT_ID


def test_default_is_the_specified_one() -> None:
    assert Recipe().fields() == {
        "clamp": "0x1.4000000000000p+3",
        "silu": "fast",
        "activation_scale": "ue8m0",
        "activation_granularity": 64,
        "l1_rounding": "none",
        "weight_fold": "before_quantisation",
        "zero_group": "clamp",
        "accumulation": "promoted",
        "combine_payload": "bf16",
        "weight_format": "e4m3",
        "dispatch_payload": "e4m3",
    }


def test_named_recipes_have_their_own_ids() -> None:
    ids = [recipe.recipe_id for recipe in RECIPES.values()]
    assert len(set(ids)) == len(RECIPES) == 8


@pytest.mark.parametrize(("name", "value"), FLIPS, ids=[f"{name}-{value}" for name, value in FLIPS])
def test_every_field_flips_the_id(name: str, value: Any) -> None:
    flipped = Recipe().replace(**{name: value})
    assert flipped.recipe_id != DEFAULT_ID
    assert flipped.diff(Recipe()) == {name: (value, getattr(Recipe(), name))}


def test_every_field_is_a_choice_or_the_clamp() -> None:
    assert {field.name for field in dataclasses.fields(Recipe)} == {"clamp", *CHOICES}


@given(ANY_RECIPE, ANY_RECIPE)
def test_ids_are_equal_only_for_equal_recipes(one: Recipe, other: Recipe) -> None:
    assert (one.recipe_id == other.recipe_id) == (one == other) == (not one.diff(other))
    assert Recipe(**dataclasses.asdict(one)).recipe_id == one.recipe_id


@given(ANY_RECIPE)
def test_fields_round_trip_through_json(recipe: Recipe) -> None:
    assert Recipe.from_fields(json.loads(json.dumps(recipe.fields()))) == recipe


@pytest.mark.parametrize(
    ("neutral", "ours"), [("fast", "fast"), ("precise", "precise")], ids=["default-is-neutral", "default-is-newer"]
)
def test_a_field_at_its_neutral_value_stays_out_of_the_id(
    monkeypatch: pytest.MonkeyPatch, neutral: str, ours: str
) -> None:
    """As if silu had been added later: recipes that leave it as before keep the id they had without the field."""
    before = {name: value for name, value in Recipe(silu=ours).fields().items() if name != "silu"}
    monkeypatch.setattr(recipes, "NEUTRAL", {"silu": neutral})
    assert Recipe(silu=neutral).fields() == before
    assert Recipe.from_fields(before) == Recipe(silu=neutral), "a field that is left out means: as before"
    other = {"fast": "precise", "precise": "fast"}[neutral]
    assert Recipe(silu=other).fields() == before | {"silu": other}
    assert Recipe.from_fields(before | {"silu": other}) == Recipe(silu=other)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().silu = "precise"


# --- the clamp --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_clamp", "kept"), [(math.inf, None), (None, None), (10, 10.0), (0, 0.0), (-0.0, 0.0), (0.5, 0.5)]
)
def test_clamp_is_normalised(given_clamp: float | None, kept: float | None) -> None:
    recipe = Recipe(clamp=given_clamp)
    assert recipe.clamp == kept
    assert kept is None or (type(recipe.clamp) is float and math.copysign(1, recipe.clamp) == 1)
    assert recipe.recipe_id == Recipe(clamp=kept).recipe_id


@pytest.mark.parametrize(
    "value",
    [-1, -1e-300, -math.inf, math.nan, True, False, "10", Fraction(1, 2), [10.0], 1e39, 10**400],
    ids=lambda value: repr(value)[:20],
)
def test_clamp_is_refused(value: Any) -> None:
    """Beyond float32, too: the layer clamps in float32, where only None and inf mean no clamp."""
    with pytest.raises(RecipeError, match=r"recipe field clamp = .* must be") as error:
        Recipe(clamp=value)
    assert repr(value) in str(error.value)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), UNBUILT, ids=[f"{name}-{value}" for name, value in UNBUILT])
def test_a_known_value_that_is_not_built_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe(**{name: value})
    message = str(error.value)
    assert f"recipe field {name} = {value!r} is known but not built yet" in message
    assert all(str(built) in message for built in BUILT[name])


def test_unbuilt_values_are_those_of_the_specification() -> None:
    assert UNBUILT == [
        ("accumulation", "rescaled"),
        ("accumulation", "bf16x2"),
        ("combine_payload", "fp8"),
        ("weight_format", "mxfp4"),
        ("dispatch_payload", "e2m1"),
    ]


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["", "FAST", None, 0, True, 64.0, 63, b"fast"], ids=repr)
def test_an_unknown_value_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe(**{name: value})
    message = str(error.value)
    assert f"recipe field {name} = {value!r} is unknown" in message
    assert " | ".join(map(str, BUILT[name])) in message


@pytest.mark.parametrize("make", [Recipe().replace, lambda **f: Recipe.from_fields(f)], ids=["replace", "from_fields"])
def test_an_unknown_field_is_refused(make: Any) -> None:
    with pytest.raises(RecipeError, match=r"recipe has no field 'speed'; its fields: .*silu"):
        make(speed="fast")


@pytest.mark.parametrize("clamp", ["ten", "", "0x1p+5000"])
def test_a_damaged_clamp_is_refused(clamp: str) -> None:
    with pytest.raises(RecipeError, match="clamp"):
        Recipe.from_fields({"clamp": clamp})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RecipeError, match="recipe 'deafult' is unknown; known: default, precise"):
        recipes.recipe("deafult")
    with pytest.raises(RecipeError, match="shape 'dsv5' is unknown; known: smoke, dsv4_flash"):
        shapes.shape("dsv5")
    assert recipes.recipe("precise") is RECIPES["precise"]
    assert shapes.shape("glm") is SHAPES["glm"]


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("dsv4_flash", (4096, 2048, 256, 6)),
        ("dsv4_pro", (7168, 3072, 384, 6)),
        ("mimo_pro", (6144, 2048, 384, 8)),
        ("glm", (4096, 2048, 288, 8)),
    ],
)
def test_presets_are_the_models(name: str, sizes: tuple[int, int, int, int]) -> None:
    shape = SHAPES[name]
    assert (shape.name, shape.hidden, shape.intermediate, shape.experts, shape.topk) == (name, *sizes)


SMALL = {"hidden": 128, "intermediate": 128, "experts": 4, "topk": 2}


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("hidden", 0, "must be a positive multiple of 128"),
        ("hidden", -128, "must be a positive multiple of 128"),
        ("hidden", 192, "must be a positive multiple of 128"),
        ("intermediate", 0, "must be a positive multiple of 128"),
        ("intermediate", 64, "must be a positive multiple of 128"),
        ("experts", 0, "must be positive"),
        ("topk", 0, "must be in"),
        ("topk", 5, "must be in"),
    ],
)
def test_a_shape_that_breaks_a_rule_is_refused(field: str, value: int, rule: str) -> None:
    with pytest.raises(RecipeError, match=f"shape tiny: {field} = {value} {rule}"):
        Shape("tiny", **(SMALL | {field: value}))


def test_topk_ends_at_32() -> None:
    assert Shape("wide", **(SMALL | {"experts": 64, "topk": 32})).topk == 32
    with pytest.raises(RecipeError, match="topk = 33"):
        Shape("wide", **(SMALL | {"experts": 64, "topk": 33}))


@pytest.mark.parametrize("ranks", [0, -1, 3, 8])
def test_ranks_divide_the_experts(ranks: int) -> None:
    shape = Shape("tiny", **SMALL)
    assert [shape.experts_per_rank(r) for r in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(RecipeError, match=rf"ranks = {ranks} must divide experts = 4 \(shape tiny\)"):
        shape.experts_per_rank(ranks)
