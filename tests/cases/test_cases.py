"""The matrix: how many cases there are, that no id is given twice, and that every two values of every two axes meet."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from megaproof.cases import cases, inputs
from megaproof.cases.cases import BIG, CASES, EXTREMES, FULL, GATE, SMALL, SMOKE, SPREADS, Case
from megaproof.cases.pairwise import met, possible_pairs, table
from megaproof.quant.recipe import RECIPES
from megaproof.quant.shapes import SHAPES

COUNTS = {
    ("smoke", "cpu"): 93,
    ("dsv4_flash", "cpu"): 13,
    ("dsv4_pro", "cpu"): 5,
    ("mimo_pro", "cpu"): 4,
    ("glm", "cpu"): 3,
    ("dsv4_flash", "gpu"): 39,
    ("dsv4_pro", "gpu"): 20,
    ("mimo_pro", "gpu"): 21,
    ("glm", "gpu"): 22,
}
"""(preset, tier) -> cases. A change of these numbers is a change of what the suite proves: say so in CHANGELOG.md."""

IMPOSSIBLE = {
    (("ranks", 1), ("tokens", "uneven")),
    (("ranks", 1), ("tokens", "one_idle")),
    *((("clamp", clamp), ("family", "lattice")) for clamp in (0.5, 1.0, 10.0)),
    *((("recipe", name), ("family", "lattice")) for name in ("fp32_scales", "unfused", "weight_in_combine")),
}
"""Pairs that no case can hold, with the reason in `cases.allowed`."""


def test_the_number_of_cases_is_pinned() -> None:
    assert Counter((case.shape.name, case.tier) for case in CASES) == COUNTS
    assert {shape for shape, _ in COUNTS} == set(SHAPES)


def test_no_id_is_given_twice() -> None:
    assert [case_id for case_id, count in Counter(case.id for case in CASES).items() if count > 1] == []


def test_the_gate_is_small_and_holds_what_matters() -> None:
    """8 to 12 full-size cases without a GPU, of at most 64 tokens; all clamps, both math modes, the lattice twice."""
    gate = [case for case in CASES if (case.shape.name, case.ranks, case.tier) == ("dsv4_flash", 8, "cpu")]
    assert 8 <= len(gate) <= 12
    assert set(GATE) <= set(gate)
    assert all(sum(case.tokens) <= 64 for case in gate)
    assert {case.recipe.clamp for case in GATE} >= {None, 0.5, 1.0, 10.0}
    assert {case.recipe.silu for case in GATE} == {"fast", "precise"}
    assert sum(case.family == "lattice" for case in GATE) == 2
    assert {case.routing for case in GATE} == set(cases.AXES["routing"])
    assert {case.masked for case in GATE} == {0, 30, 70, 100}


def test_a_kernel_can_claim_every_case_of_the_gate() -> None:
    """dsv4_flash at 8 ranks asks for no recipe but the default's, with any clamp and both forms of silu."""
    for case in CASES:
        if (case.shape.name, case.ranks) == ("dsv4_flash", 8):
            assert set(case.recipe.diff(RECIPES["default"])) <= {"clamp", "silu"}, case.id


def test_every_full_size_preset_runs_without_a_gpu() -> None:
    """A few tokens of each at its real dimensions, among them routed ones that reach more than one expert."""
    for name in set(SHAPES) - {"smoke"}:
        small = [case for case in CASES if case.shape.name == name and case.tier == "cpu"]
        assert sum(sum(case.tokens) > 0 and case.masked < 100 for case in small) >= 2, name
    assert all(1 <= sum(case.tokens) <= 3 for case in BIG)
    assert not any(sum(case.tokens) for case in FULL if case.tier == "cpu")


def test_every_case_can_be_made() -> None:
    """Families and routings exist, and the ranks divide the experts."""
    assert {case.family for case in CASES} <= set(inputs.FAMILIES)
    assert {case.routing for case in CASES} <= set(inputs.ROUTINGS)
    for case in CASES:
        assert case.shape.experts_per_rank(case.ranks) * case.ranks == case.shape.experts
        assert case.tier in ("cpu", "gpu")


def values_of(case: Case) -> dict[str, object]:
    """The axes' values of a case of a pairwise table, read from the case itself."""
    spreads = [name for name, tokens in SPREADS.items() if tokens[: case.ranks] == case.tokens]
    plain = case.recipe.replace(clamp=RECIPES["default"].clamp, silu=RECIPES["default"].silu)
    recipes = [name for name in cases.AXES["recipe"] if RECIPES[name] == plain]
    assert len(spreads) == len(recipes) == 1, case.id
    own = {"shape": case.shape.name, "ranks": case.ranks, "routing": case.routing, "masked": case.masked}
    own |= {"clamp": case.recipe.clamp, "silu": case.recipe.silu, "family": case.family}
    return own | {"tokens": spreads[0], "recipe": recipes[0]}


@pytest.mark.parametrize("name", ["SMALL", "FULL"])
def test_every_two_values_meet(name: str) -> None:
    """In a case in which both have an effect, counted without the code that made the table."""
    axes = {"SMALL": cases.SMALL_AXES, "FULL": cases.FULL_AXES}[name]
    seen = set()
    for case in {"SMALL": SMALL, "FULL": FULL}[name]:
        values = values_of(case)
        idle = {("tokens", "0")} & {("tokens", values["tokens"])} | {("masked", 100)} & {("masked", values["masked"])}
        for pair in combinations([(axis, values[axis]) for axis in axes], 2):
            if not idle or idle & set(pair):
                seen.add(frozenset(pair))
    wanted = {
        frozenset([(a, left), (b, right)]) for a, b in combinations(axes, 2) for left in axes[a] for right in axes[b]
    } - {frozenset(pair) for pair in IMPOSSIBLE}
    assert sorted(map(str, wanted - seen)) == []


def test_named_extremes() -> None:
    full = [case for case in EXTREMES if case.shape.name == "dsv4_flash" and case.ranks == 8]
    assert {tokens for case in full for tokens in case.tokens} >= {0, 1, 7, 64, 65, 127, 128, 129, 1024}
    assert all(case.tier == "gpu" for case in EXTREMES)
    assert {case.shape.name for case in EXTREMES} == set(SHAPES) - {"smoke"}
    assert {case.recipe for case in SMOKE} >= set(RECIPES.values())


def test_the_table_is_the_same_each_time() -> None:
    assert table(cases.SMALL_AXES, cases.allowed, cases.INERT) == table(cases.SMALL_AXES, cases.allowed, cases.INERT)


AXES = {"a": (1, 2, 3), "b": ("x", "y"), "c": (None, 0.5, 7)}


def test_a_table_meets_all_pairs_and_only_allowed_ones() -> None:
    def allowed(row: dict[str, object]) -> bool:
        return not (row.get("a") == 3 and row.get("b") == "y")

    rows = table(AXES, allowed)
    pairs = {(a, row[a], b, row[b]) for row in rows for a, b in combinations(AXES, 2)}
    assert len(pairs) == len(possible_pairs(AXES, allowed)) == 3 * 2 + 3 * 3 + 2 * 3 - 1
    assert ("a", 3, "b", "y") not in pairs
    assert len(rows) < 3 * 2 * 3


def test_an_inert_value_covers_only_its_own_pairs() -> None:
    assert met({"a": 1, "b": "x", "c": None}, AXES, [("a", 1)]) == {
        (("a", 1), ("b", "x")),
        (("a", 1), ("c", None)),
    }
    rows = table(AXES, inert=[("a", 1)])
    assert {(row["b"], row["c"]) for row in rows if row["a"] != 1} == {(b, c) for b in "xy" for c in AXES["c"]}


def test_a_rule_that_leaves_no_way_on_is_named() -> None:
    with pytest.raises(ValueError, match="no value of c is allowed beside"):
        table(AXES, lambda row: not (row.get("a") == 1 and "c" in row and "b" in row))


def test_an_unknown_id_names_its_neighbours() -> None:
    with pytest.raises(KeyError, match=GATE[0].id):
        cases.find(GATE[0].id + "x")
    assert all(cases.find(case.id) is case for case in CASES)
