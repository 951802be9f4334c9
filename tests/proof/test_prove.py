"""The proof of a kernel itself: what it counts, and that a mistake which the reference shares is seen by integers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megaproof.cases import inputs
from megaproof.cases.cases import SMOKE, Case
from megaproof.cases.compare import Differs
from megaproof.kernel import emulator
from megaproof.proof import exact
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.emulated import EmulatedAdapter
from megaproof.proof.adapters.reference import ReferenceAdapter
from megaproof.proof.faults import catalogue
from megaproof.proof.prove import Convicted, prove, turned
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.oracle import NotLattice
from megaproof.reference.stages import STAGES

LATTICE = next(case for case in SMOKE if case.family == "lattice")


def lattice(granularity: int = 64, tokens: tuple[int, ...] = (5, 0, 3)) -> Case:
    shape = Shape("narrow", hidden=128, intermediate=128, experts=6, topk=2)
    return Case(shape, tokens, Recipe(clamp=None, activation_granularity=granularity), family="lattice", masked=30)


def solved(case: Case) -> tuple[Prepared, LayerResult, exact.Exact]:
    """The problem, the reference's result, the integers'."""
    made = inputs.make(case)
    expected = moe_layer(case.recipe, *made.arguments(), trace=True, experts=case.shape.experts)
    return Prepared(case, made, torch.device("cpu")), expected, exact.of_case(case, made)


# --- what it counts ---------------------------------------------------------------------------------------------------


def test_elements_are_counted_by_stage() -> None:
    problem, expected, integers = solved(LATTICE)
    proof = prove(ReferenceAdapter(), problem, expected, launches=2, integers=integers)
    assert proof.compared == {name: 2 * expected.trace[name].numel() for name in STAGES}
    assert proof.elements == sum(proof.compared.values())
    assert proof.by_integers == proof.compared["y"] > 0, "all of y: the case is small"
    assert str(proof).startswith(f"{proof.elements:,} elements in 2 launches: l1_acts {proof.compared['l1_acts']:,}, ")
    assert f"; {proof.by_integers:,} of y by int64 arithmetic too" in str(proof)


def test_stages_that_are_not_shown_are_not_counted() -> None:
    class Silent(ReferenceAdapter):
        def stages(self) -> dict[str, Tensor]:
            return {"slots": super().stages()["slots"]}

    problem, expected, _ = solved(LATTICE)
    proof = prove(Silent(), problem, expected)
    assert list(proof.compared) == ["slots", "y", "stats"]
    assert proof.by_integers == 0
    assert "not shown: l1_acts, l1_acts_sf, l2_acts, l2_acts_sf;" in str(proof)
    assert "int64" not in str(proof)


# --- y by integers ----------------------------------------------------------------------------------------------------


def test_who_is_asked_for_integers() -> None:
    assert exact.on_lattice(LATTICE)
    with_clamp = dataclasses.replace(LATTICE, recipe=Recipe(clamp=10.0))
    assert not exact.on_lattice(with_clamp)
    with pytest.raises(NotLattice):
        exact.of_case(with_clamp, inputs.make(with_clamp))
    assert not exact.on_lattice(dataclasses.replace(LATTICE, recipe=Recipe(clamp=None, weight_fold="in_combine")))
    assert not exact.on_lattice(dataclasses.replace(LATTICE, family="mixed"))


def test_of_a_small_layer_all_is_computed_of_a_large_one_a_sample() -> None:
    made = inputs.make(LATTICE)
    places, columns = exact.sample(LATTICE, made.topk_idx)
    assert len(places) == sum(LATTICE.tokens)
    assert columns.tolist() == list(range(512))
    large = dataclasses.replace(LATTICE, shape=dataclasses.replace(LATTICE.shape, hidden=4096, intermediate=2048))
    masked = [torch.full_like(idx, -1) for idx in made.topk_idx]
    masked[3][0, 2] = 5
    places, columns = exact.sample(large, masked)
    assert len(places) == exact.FEW
    assert places[0] == (3, 0), "who has an active slot comes first"
    assert len(columns) == exact.COLUMNS
    assert columns.tolist() == sorted(columns.tolist())


@pytest.mark.parametrize("granularity", [64, 128])
def test_integers_follow_the_tokens_of_the_third_launch(granularity: int) -> None:
    problem, expected, integers = solved(lattice(granularity))
    proof = prove(ReferenceAdapter(), problem, expected, integers=integers)
    assert proof.by_integers == (8 + 8 + 2 + 4) * 128, "one token fewer of each rank that has two"
    assert [row.tolist() for row in integers.moved(turned).row] == [[6, 5], [3, 2, 1, 0], []]


def test_one_bit_of_one_token_is_placed() -> None:
    _, expected, integers = solved(lattice())
    assert integers.compare(expected.y) == 8 * 128
    y = [part.clone() for part in expected.y]
    y[2].view(torch.int16)[1, 77] ^= 1
    with pytest.raises(Differs, match=r"y at \(rank, token\) \(2, 1\), column 77: 0x\w{4} = .* by integers, 0x\w{4}"):
        integers.compare(y)


def test_a_rule_that_kernel_and_reference_misread_alike_is_seen() -> None:
    """Both clamp at 32 where there is no clamp: every stage of theirs agrees, and only the integers do not."""
    case = lattice()
    problem, _, integers = solved(case)
    misread = dataclasses.replace(problem, case=dataclasses.replace(case, recipe=Recipe(clamp=32.0)))
    expected = moe_layer(misread.case.recipe, *problem.inputs.arguments(), trace=True, experts=6)
    assert prove(ReferenceAdapter(), misread, expected).launches == 3
    with pytest.raises(Convicted, match="y is the reference's, and both are wrong") as caught:
        prove(ReferenceAdapter(), misread, expected, integers=integers)
    assert caught.value.check == "integers"
    assert caught.value.of_case


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler is on PATH (g++ or clang++)")
@pytest.mark.parametrize("granularity", [64, 128])
def test_a_fault_in_the_sources_that_the_reference_shares_is_seen(granularity: int) -> None:
    """Routing weights of 1 in the kernel's own sources, and in what the reference was given."""
    weights_of_one = catalogue.find("source", "weight-slot").change.change
    problem, expected, integers = solved(lattice(granularity))
    proof = prove(EmulatedAdapter(), problem, expected, integers=integers)
    assert proof.by_integers > 0
    x, x_sf, topk_idx, topk_weights, weights = problem.inputs.arguments()
    ones = [torch.ones_like(weight) for weight in topk_weights]
    misled = moe_layer(problem.case.recipe, x, x_sf, topk_idx, ones, weights, trace=True, experts=6)
    faulty = EmulatedAdapter(run=emulator.Run(change=weights_of_one))
    assert prove(faulty, problem, misled).launches == 3, "the reference agrees in every stage"
    with pytest.raises(Convicted) as caught:
        prove(faulty, problem, misled, integers=integers)
    assert caught.value.check == "integers"
