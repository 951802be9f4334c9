"""What the inputs must reach, asserted by number on real cases; `proof/coverage.py` counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megaproof.cases.cases import GATE, Case
from megaproof.cases.inputs import FAMILIES, make
from megaproof.cases.inputs.families import TOKEN_CLASSES
from megaproof.proof.coverage import Coverage, assert_coverage, count_ties, measure
from megaproof.quant import atoms
from megaproof.quant.formats import f32_bits
from megaproof.quant.recipe import RECIPES
from megaproof.quant.shapes import SHAPES
from megaproof.reference.layer import moe_layer
from megaproof.tests.support.threads import threads

MAIN = GATE[0]
"""The gate's clamp-10 case with 64 tokens."""
RANDOM = tuple(case for case in GATE if case.family == "mixed" and case.masked < 100)
CLAMPS = (None, 0.5, 1.0, 10.0)

SIDES = dict.fromkeys(("gate above c", "gate below -c", "gate within", "up above c", "up below -c", "up within"), 0.01)
"""All four sides of the clamp, and between them; below -c a gate is left alone."""
NEVER = ("x NaN", "w1 NaN", "w2 NaN", "not finite", *(f"{name}_sf not finite and > 0" for name in ("x", "w1", "w2")))
"""A layer of finite numbers, whatever the family."""
NEIGHBOURS = tuple(f"{name}_sf as {where} it" for name in ("x", "w1", "w2") for where in ("beside", "below"))
"""Scale factors equal to the next block's: a kernel that reads its neighbour's would be right there."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def assert_never(coverage: Coverage, *features: str) -> None:
    assert {feature: coverage.counts[feature] for feature in features if coverage.share(feature)} == {}


# --- the gate's random numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RANDOM, ids=lambda case: case.id)
def test_the_clamp_binds_on_all_sides_in_every_case_of_the_gate(case: Case) -> None:
    """At least 1 % of the elements beyond, and within, each side (without a clamp: of 10)."""
    floors = SIDES | {"step with a cut": 0.3, "zero group of a live row": 0.01, "code subnormal": 0.01}
    assert_never(assert_coverage(case, make(case), floors), *NEVER, *NEIGHBOURS)


def test_what_the_gate_reaches_with_random_numbers() -> None:
    coverage = assert_coverage(
        MAIN,
        make(MAIN),
        SIDES
        | {
            "x zero row": 0.1,
            "x all-subnormal row": 0.1,
            "x minus zero": 0.005,
            "x largest": 0.001,
            "x_sf power of two": 0.15,
            "w1 subnormal": 0.005,
            "w1 zero row": 0.01,
            "w1_sf power of two": 0.15,
            "w2_sf power of two": 0.15,
            "weight negative": 0.05,
            "weight zero": 0.02,
            "gate below -90": 0.01,
            "gate -89 to -86": 0.0005,
            "zero group of a live row": 0.02,
            "code subnormal": 0.02,
            "code largest": 0.0001,
            "code minus zero": 0.01,
            "step with a cut": 0.6,
        },
    )
    print(coverage.table())
    assert_never(coverage, "code with the other silu differs", "weight as in the slot before")
    # The first line is a hole, filled by the adversarial family: random numbers do not tell the two forms of silu.


def test_codes_and_classes_of_the_gate() -> None:
    """Every finite magnitude, both signs alike, and as many zero rows as there are tokens of that class."""
    made = make(MAIN)
    x = torch.cat(made.x)
    magnitude = x & 0x7F
    assert set(range(0x7F)) == set(magnitude.unique().tolist())
    assert int((magnitude == 0).all(1).sum()) == sum(TOKEN_CLASSES[t % 8] == "zero" for t in range(64)) == 8
    assert 0.4 < float((x[magnitude > 0] >= 0x80).float().mean()) < 0.6
    for e in (0, 3):
        assert min(len(w.codes.unique()) for w in made.weights(e)) > (150 if e == 3 else 40)
    weight = torch.cat(made.topk_weights).reshape(-1)
    assert len(weight[weight != 0].unique()) == int((weight != 0).sum()), "every slot another weight"


def test_scales_differ_between_experts_and_lines() -> None:
    """No two rows and no two columns of blocks are alike."""
    made = make(MAIN)
    one, other = ([w.scales for w in made.weights(e)] for e in (1, 2))
    for own, others in zip(one, other, strict=True):
        assert float((own == others).float().mean()) < 0.1
    for grid in (torch.cat(made.x_sf), *one):
        for lines in (grid, grid.t()):
            assert len(lines.unique(dim=0)) == len(lines)


def test_sums_reach_the_truncation_of_the_tensor_core() -> None:
    """K = 128 chains of plain tokens: few equal the correctly rounded dot product, so a float32 matmul is caught."""
    made = make(MAIN)
    x, w = torch.cat(made.x)[1::8, :128], made.weights(0).l1.codes[1024:1280, :128]
    chain = atoms.wgmma_chain(x, w)
    exact = atoms.decode_e4m3(x).double() @ atoms.decode_e4m3(w).double().t()
    assert float((chain == exact.float()).float().mean()) < 0.1
    assert float(((chain - exact).abs() <= 2.0**-9 * exact.abs().max()).float().mean()) == 1.0


# --- the edges --------------------------------------------------------------------------------------------------------

EDGES = {
    **SIDES,
    **dict.fromkeys(("x minus zero", "x zero row", "x all-subnormal row", "weight minus zero"), 0.02),
    **dict.fromkeys(("weight negative", "weight zero", "weight power of two", "x zero block"), 0.1),
    **dict.fromkeys(("w1 subnormal", "w2 subnormal", "w1 minus zero", "w2 minus zero", "w1 largest"), 0.0),
    **dict.fromkeys(("gate on c", "gate on -c", "up on c", "up on -c"), 0.002),
    **dict.fromkeys(("gate one ulp beside c", "up one ulp beside c"), 0.001),
    **dict.fromkeys(("gate below -90", "gate -89 to -86"), 0.005),
    **dict.fromkeys(("amax one ulp below the edge", "amax on the edge", "amax one ulp above the edge"), 0.005),
    **dict.fromkeys(("tie to even, down", "tie to even, up", "tie between subnormals"), 0.01),
    **dict.fromkeys(("code subnormal", "code minus zero", "zero group of a live row"), 0.02),
    **dict.fromkeys(("code largest", "code with the other silu differs"), 0.001),
    **dict.fromkeys(("exponent at its floor", "slot subnormal"), 0.005),
    **dict.fromkeys(("slot tie", "slot tie to even, up"), 0.002),
    "step with a cut": 0.1,
    "step that keeps nothing": 0.0005,
}
"""What the adversarial family must reach; 0 asks for one element."""


@pytest.mark.parametrize("silu", ["fast", "precise"])
@pytest.mark.parametrize("clamp", CLAMPS)
def test_the_adversarial_family_stands_on_every_edge(clamp: float | None, silu: str) -> None:
    """All experts of the small shape, y too, under every clamp and both forms of silu."""
    case = Case(
        SHAPES["smoke"], (24, 0, 12, 12), replace(RECIPES["default"], clamp=clamp, silu=silu), family="adversarial"
    )
    made = make(case)
    slots = moe_layer(case.recipe, *made.arguments(), experts=case.shape.experts, trace=True).trace["slots"]
    coverage = measure(case, made, slots, experts=case.shape.experts)
    print(coverage.table())
    sides = {} if clamp is None else SIDES  # without one the exact values end at 16, so few pass 10
    wanted = {name: floor for name, floor in EDGES.items() if name not in SIDES or name in sides}
    if clamp is None:  # c stands for 16 there, and 10 is what the counter takes
        wanted = {name: floor for name, floor in wanted.items() if " c" not in name and " -c" not in name}
    if clamp == 0.5:  # a gate has 24 binary digits from 1 on only
        del wanted["gate one ulp beside c"]
    assert coverage.missing(wanted | {"y tie": 0.01, "y subnormal": 0.01, "y of the slots backwards": 0.001}) == {}
    assert_never(coverage, *NEVER, *NEIGHBOURS, "y not finite")


@pytest.mark.parametrize("clamp", [None, 10.0])
def test_the_adversarial_family_at_full_size(clamp: float | None) -> None:
    case = replace(MAIN, family="adversarial", recipe=replace(MAIN.recipe, clamp=clamp))
    wanted = {name: floor for name, floor in EDGES.items() if clamp or (" c" not in name and " -c" not in name)}
    coverage = assert_coverage(case, make(case), wanted, experts=16)
    print(coverage.table())
    assert_never(coverage, *NEVER, *NEIGHBOURS)


# --- the others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_finite(family: str) -> None:
    """NaN and infinity have tests of their own; here they would hide everything else."""
    case = Case(SHAPES["smoke"], (12, 9), family=family)
    made = make(case)
    slots = moe_layer(case.recipe, *made.arguments(), experts=case.shape.experts, trace=True).trace["slots"]
    coverage = measure(case, made, slots, experts=case.shape.experts)
    assert_never(coverage, *NEVER, "y not finite", *(NEIGHBOURS if family != "lattice" else ()))


def test_a_normal_distribution_is_what_it_is() -> None:
    """As the harnesses of public kernels have it: ten is out of reach, no scale a power of two, no weight below 0."""
    case = replace(MAIN, family="gaussian")
    coverage = assert_coverage(case, make(case), {"gate within": 0.99, "up within": 0.99, "step with a cut": 0.6})
    nothing = ("gate above c", "gate below -c", "up above c", "up below -c", "weight negative", "weight zero")
    assert_never(coverage, *NEVER, *nothing, "zero group of a live row", "x_sf power of two")
    acting = replace(case, recipe=replace(case.recipe, clamp=0.5))
    assert_coverage(acting, make(acting), SIDES)


def test_a_heavy_tail_reaches_both_ends() -> None:
    case = replace(MAIN, family="heavy_tail")
    floors = SIDES | {"gate below -90": 0.001, "code subnormal": 0.01, "x largest": 0.005}
    coverage = assert_coverage(case, make(case), floors | {"step with a cut": 0.6})
    assert_never(coverage, *NEVER, *NEIGHBOURS)
    made = make(case)
    w1_sf, weight = made.weights(0).l1.scales, torch.cat(made.topk_weights)
    for values, binades in ((torch.cat(made.x_sf), 7), (w1_sf, 6), (weight, 8)):
        field = f32_bits(values) >> 23
        assert int(field.max() - field.min()) >= binades


def test_lattice_operands_are_the_exact_ones() -> None:
    """Codes -1, 0, 1; scales and routing weights powers of two."""
    made = make(Case(SHAPES["smoke"], (8, 3), RECIPES["no_clamp"], family="lattice"))
    w1, w1_sf, w2, w2_sf = made.weights(0).tensors()
    for codes in (*made.x, w1, w2):
        assert set(codes.unique().tolist()) <= {0, 0x38, 0xB8}
    for values in (*made.x_sf, w1_sf, w2_sf, *made.topk_weights):
        assert int((f32_bits(values) & 0x7FFFFF).sum()) == 0


# --- the counter itself -----------------------------------------------------------------------------------------------


def test_a_feature_that_is_missing_is_named() -> None:
    case = Case(SHAPES["smoke"], (8,), family="gaussian")
    with pytest.raises(AssertionError, match=r"smoke-r1-t8.*'gate below -90': \(0\.0, 0\.0\)"):
        assert_coverage(case, make(case), {"gate below -90": 0.0, "gate within": 0.5})
    with pytest.raises(KeyError, match="no such feature"):
        assert_coverage(case, make(case), {"no such feature": 0.0})


def test_ties_are_counted_from_both_sides() -> None:
    """Halfway points by hand: 17 between the codes 16 and 18, 19 between 18 and 20, 2^-10 between 0 and 2^-9."""
    coverage = Coverage()
    count_ties(coverage, torch.tensor([17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 16.0, 17.000002, 448.0, 0.0]))
    counts = {name: found for name, (found, _) in coverage.counts.items()}
    assert counts == {"tie": 4, "tie to even, down": 2, "tie to even, up": 2, "tie between subnormals": 2}
