"""Position-encoded inputs: a row of y says which token of which rank came to which expert, and every mix-up shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaproof.cases.cases import DEFAULT_SEED, Case
from megaproof.cases.compare import Differs, same
from megaproof.cases.inputs import Inputs, make
from megaproof.cases.inputs.position import Arrival, decode_position, decode_token, encode_place
from megaproof.quant import atoms
from megaproof.quant.recipe import RECIPES
from megaproof.quant.shapes import SHAPES
from megaproof.reference import combine, dispatch
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.operands import ExpertWeights, e4m3
from megaproof.tests.support.threads import threads

CASE = Case(SHAPES["smoke"], (5, 0, 19, 2), family="position", masked=30)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def run(case: Case, made: Inputs) -> LayerResult:
    return moe_layer(case.recipe, *made.arguments(), experts=case.shape.experts, trace=True)


def arrivals(made: Inputs, rank: int, token: int) -> list[Arrival]:
    """What y's row must say, from the routing alone."""
    experts = made.topk_idx[rank][token].tolist()
    busy = sorted({e for e in experts if e >= 0})
    return [Arrival(e, tuple(k for k, own in enumerate(experts) if own == e), (rank, token)) for e in busy]


@pytest.mark.parametrize("clamp", [None, 0.5, 1.0, 10.0, 3.7])
@pytest.mark.parametrize("name", RECIPES)
def test_y_says_what_arrived(name: str, clamp: float | None) -> None:
    """Under every recipe, without an error allowance for its roundings."""
    case = replace(CASE, recipe=RECIPES[name].replace(clamp=clamp))
    made = make(case)
    y = run(case, made).y
    for rank, tokens in enumerate(case.tokens):
        for token in range(tokens):
            assert decode_position(y[rank][token], case) == arrivals(made, rank, token)


def test_rows_and_slots_say_where_they_come_from() -> None:
    """The dispatched rows, and the slots: one arrival each."""
    made = make(CASE)
    trace = run(CASE, made).trace
    for i, (rank, token, slot) in enumerate(trace["rows"].tolist()):
        assert decode_token(trace["l1_acts"][i], trace["l1_acts_sf"][i]) == (rank, token)
        expert = int(made.topk_idx[rank][token, slot])
        assert decode_position(trace["slots"][i], CASE) == [Arrival(expert, (slot,), (rank, token))]


def test_a_full_size_row() -> None:
    case = Case(SHAPES["dsv4_flash"], (0, 0, 0, 0, 0, 1, 0, 1), family="position")
    made = make(case)
    y = run(case, made).y
    assert decode_position(y[5][0], case) == arrivals(made, 5, 0)
    assert decode_position(y[7][0], case) == arrivals(made, 7, 0)


def test_every_place_is_another() -> None:
    places = [tuple(row) for rank in (0, 1, 7, 71, 255) for row in encode_place(rank, torch.arange(2048)).tolist()]
    assert len(set(places)) == len(places)
    assert max(map(max, places)) == 3
    assert {place[0] for place in places} == {0}


def test_an_expert_named_twice_and_a_masked_token() -> None:
    case = Case(SHAPES["smoke"], (2,), family="position")
    made = make(case)
    made.topk_idx[0][0] = torch.tensor([9, 4, 9, -1])
    made.topk_idx[0][1] = -1
    y = run(case, made).y[0]
    assert decode_position(y[0], case) == [Arrival(4, (1,), (0, 0)), Arrival(9, (0, 2), (0, 0))]
    assert decode_position(y[1], case) == []


# --- mix-ups ----------------------------------------------------------------------------------------------------------


def again(case: Case, made: Inputs, slots: Tensor) -> list[Tensor]:
    """y from slots that a broken kernel might have left."""
    where = dispatch.routes(made.topk_idx)
    weight = torch.cat(made.topk_weights)[where.row, where.slot]
    return combine.combine(case.recipe, slots, where, weight, case.tokens, case.shape.topk, atoms)


@pytest.fixture(scope="module")
def whole() -> tuple[Inputs, LayerResult]:
    made = make(replace(CASE, masked=0))
    return made, run(CASE, made)


def test_a_dropped_slot(whole: tuple[Inputs, LayerResult]) -> None:
    made, result = whole
    slots = result.trace["slots"].clone()
    slots[6] = 0  # rank 0, token 1, slot 2
    y = again(CASE, made, slots)
    wanted = [a for a in arrivals(made, 0, 1) if a.slots != (2,)]
    assert decode_position(y[0][1], CASE) == wanted
    with pytest.raises(Differs):
        same("y", result.y[0], y[0])


def test_a_swap_of_two_tokens_slots(whole: tuple[Inputs, LayerResult]) -> None:
    made, result = whole
    rows = result.trace["rows"].tolist()
    own = [a.expert for a in arrivals(made, 0, 1)]
    foreign = next(i for i, (rank, t, k) in enumerate(rows) if rank == 2 and int(made.topk_idx[2][t, k]) not in own)
    _, token, slot = rows[foreign]
    slots = result.trace["slots"].clone()
    slots[[5, foreign]] = slots[[foreign, 5]]  # row 5 is slot 1 of token 1 of rank 0
    found = [a for a in decode_position(again(CASE, made, slots)[0][1], CASE) if a.source != (0, 1)]
    assert found == [Arrival(int(made.topk_idx[2][token, slot]), (slot,), (2, token))], "and its own slot's weight"


def test_a_slot_that_counts_twice(whole: tuple[Inputs, LayerResult]) -> None:
    made, result = whole
    slots = result.trace["slots"].clone()
    slots[4] = slots[5]
    found = decode_position(again(CASE, made, slots)[0][1], CASE)
    doubled = [a for a in found if a not in arrivals(made, 0, 1)]
    assert [(a.source, a.slots) for a in doubled] == [((0, 1), (0,))], "2^-1 twice is 2^0: slot 0's weight"
    assert len(found) == 3


def test_another_token_under_the_same_weight(whole: tuple[Inputs, LayerResult]) -> None:
    """Dispatch fetches the neighbour's row: every expert of the token says so."""
    made, _ = whole
    x = [part.clone() for part in made.x]
    x_sf = [part.clone() for part in made.x_sf]
    x[2][4], x_sf[2][4] = x[2][5], x_sf[2][5]
    y = run(CASE, replace(made, x=x, x_sf=x_sf)).y
    assert {a.source for a in decode_position(y[2][4], CASE)} == {(2, 5)}
    assert decode_position(y[2][5], CASE) == arrivals(made, 2, 5)


def test_half_a_row_and_a_row_with_foreign_scales(whole: tuple[Inputs, LayerResult]) -> None:
    made, result = whole
    x, x_sf = made.x[2][4].clone(), made.x_sf[2][4]
    assert decode_token(x, x_sf) == (2, 4)
    assert decode_token(x, made.x_sf[2][5]) is None, "scales of the next token"
    assert decode_token(x, x_sf.roll(1)) is None, "scales of the next block"
    x[256:] = made.x[2][5][256:]
    assert decode_token(x, x_sf) is None, "the tail of another row"
    row = result.y[2][4].clone()
    first = arrivals(made, 2, 4)[0].expert * 32
    row[first + 1 : first + 5] = row[first + 1 : first + 5] * 4
    assert [a.source for a in decode_position(row, CASE)].count(None) == 1


def test_two_rows_in_one_expert_are_no_token(whole: tuple[Inputs, LayerResult]) -> None:
    made, result = whole
    slots = result.trace["slots"]
    one, other = (row for row in slots[[0, 77]])
    e = arrivals(made, 0, 0)
    mixed = one.float() + one.float().roll(1)
    assert any(a.source is None for a in decode_position(mixed, CASE))
    assert decode_position(other, CASE)[0].source != e[0].source


@pytest.mark.parametrize("place", [1, 3])
def test_a_scale_of_another_block_moves_digits(place: int) -> None:
    """The weights' scales, rolled by one block: nothing decodes as it should."""
    case = replace(CASE, masked=0)
    made = make(case)

    def rolled(e: int) -> ExpertWeights:
        four = list(made.weights(e).tensors())
        four[place] = four[place].roll(1, dims=1)
        return e4m3(*four)

    y = run(case, replace(made, weights=rolled)).y
    wrong = [decode_position(y[2][t], case) != arrivals(made, 2, t) for t in range(19)]
    assert all(wrong)


def test_the_places_do_not_depend_on_the_seed() -> None:
    for seed in (DEFAULT_SEED, 1):
        made = make(replace(CASE, seed=seed))
        assert decode_token(made.x[2][18], made.x_sf[2][18]) == (2, 18)
