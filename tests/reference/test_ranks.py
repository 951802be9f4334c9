"""The layer as ranks that see only their own tensors: the same bits as `moe_layer`, and no way to hang."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.quant.recipe import RECIPES, Recipe
from megaproof.quant.shapes import SHAPES, Shape
from megaproof.reference.arguments import ArgumentError, Dimensions
from megaproof.reference.exchange import Exchange, ExchangeError, lockstep, pack, unpack
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.operands import ExpertWeights
from megaproof.reference.ranks import RankResult, gather, rank_layer, run_ranks
from megaproof.reference.stages import STAGES
from megaproof.tests.support import tiny
from megaproof.tests.support.bit_patterns import assert_same

TINY_EXPERTS = 8


def assert_same_result(actual: LayerResult, expected: LayerResult) -> None:
    for ours, theirs in ((actual.y, expected.y), (actual.stats, expected.stats)):
        assert len(ours) == len(theirs)
        for left, right in zip(ours, theirs, strict=True):
            assert_same(left, right)
    assert (actual.trace is None) == (expected.trace is None)
    if actual.trace is not None and expected.trace is not None:
        assert list(actual.trace) == list(expected.trace) == [*STAGES, "rows"]
        for stage in actual.trace:
            assert_same(actual.trace[stage], expected.trace[stage])


def compare(case: Case, stats: list[Tensor] | None = None) -> None:
    made = inputs.make(case)
    expected, actual = (
        layer(case.recipe, *made.arguments(), stats, trace=True, experts=case.shape.experts)
        for layer in (moe_layer, run_ranks)
    )
    assert_same_result(actual, expected)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [0, 70])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_number_of_ranks(ranks: int, masked: int) -> None:
    compare(Case(SHAPES["smoke"], (5, 0, 9, 1, 0, 3, 2, 12)[:ranks], routing="zipf", masked=masked))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name: str) -> None:
    compare(Case(SHAPES["smoke"], (4, 0, 7, 1), RECIPES[name], masked=30))


@pytest.mark.parametrize(
    ("tokens", "axes"),
    [
        ((0, 0, 0, 0), {}),
        ((0, 0, 6, 0), {"routing": "one_rank"}),
        ((6, 2, 0, 5), {"routing": "one_rank"}),
        ((5, 1), {"masked": 100}),
        ((8, 0, 3, 1), {"family": "lattice", "recipe": Recipe(clamp=None)}),
    ],
    ids=["no_tokens", "one_source", "one_target", "all_masked", "lattice"],
)
def test_idle_ranks(tokens: tuple[int, ...], axes: dict[str, object]) -> None:
    compare(Case(SHAPES["smoke"], tokens, **axes))


def test_statistics_go_on_from_the_caller_s() -> None:
    case = Case(SHAPES["smoke"], (3, 2))
    compare(case, [torch.arange(8, dtype=torch.int32), torch.full((8,), 100, dtype=torch.int32)])


def test_without_a_trace() -> None:
    case = Case(SHAPES["smoke"], (3, 2))
    made = inputs.make(case)
    expected, actual = (f(case.recipe, *made.arguments(), experts=16) for f in (moe_layer, run_ranks))
    assert actual.trace is None
    assert_same_result(actual, expected)


@st.composite
def routings(draw: st.DrawFn) -> list[list[list[int]]]:
    """rank -> token -> slot: any expert, the same one twice, masked, for 1, 2, 4 or 8 ranks with 0 to 3 tokens."""
    ranks, slots = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 4))
    token = st.lists(st.integers(-1, TINY_EXPERTS - 1), min_size=slots, max_size=slots)
    tokens = st.lists(token, max_size=3)
    by_rank = draw(st.lists(tokens, min_size=ranks, max_size=ranks))
    return by_rank if any(by_rank) else [[draw(token)], *by_rank[1:]]


@settings(max_examples=40)
@given(routings())
def test_any_routing(topk_idx: list[list[list[int]]]) -> None:
    """By hand too: an output of the tiny layer tells token, expert and slot apart."""
    weights = [
        [[(-1.0) ** k * 2.0 ** ((t + k) % 4 - 1) for k in range(len(token))] for t, token in enumerate(tokens)]
        for tokens in topk_idx
    ]
    arguments = tiny.layer(topk_idx, weights).arguments()
    expected, actual = (f(tiny.RECIPE, *arguments, trace=True, experts=TINY_EXPERTS) for f in (moe_layer, run_ranks))
    assert_same_result(actual, expected)
    assert [y.float().tolist() for y in actual.y] == tiny.naive(topk_idx, weights)


# --- a rank sees its own ----------------------------------------------------------------------------------------------

SMALL = Shape("small", hidden=128, intermediate=128, experts=8, topk=3)
CASE = Case(SMALL, (4, 0, 3, 2), masked=30)
DIMENSIONS = Dimensions(4, 128, 3, 8, CASE.tokens, torch.device("cpu"))


class Changing:
    """An exchange that changes what a rank sends in one of its exchanges."""

    def __init__(self, exchange: Exchange, call: int, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.exchange, self.call, self.change = exchange, call, change

    def all_to_all(self, messages: list[Tensor]) -> list[Tensor]:
        self.call -= 1
        return self.exchange.all_to_all(self.change(messages) if self.call == 0 else messages)


def results(
    call: int = 0, change: Callable[[list[Tensor]], list[Tensor]] | None = None, weights: object = None
) -> list[RankResult]:
    """CASE, with rank 2's messages of one exchange changed."""
    made = inputs.make(CASE)

    def work(exchange: Exchange, rank: int) -> RankResult:
        if change and rank == 2:
            exchange = Changing(exchange, call, change)
        own = [tensors[rank] for tensors in made.arguments()[:4]]
        return rank_layer(exchange, rank, DIMENSIONS, CASE.recipe, *own, weights or made.weights, trace=True)

    return lockstep(4, work)


def test_a_rank_asks_for_its_own_experts_alone() -> None:
    made, asked = inputs.make(CASE), {rank: set() for rank in range(4)}

    def work(exchange: Exchange, rank: int) -> RankResult:
        def weights(e: int) -> ExpertWeights:
            asked[rank].add(e)
            return made.weights(e)

        own = [tensors[rank] for tensors in made.arguments()[:4]]
        return rank_layer(exchange, rank, DIMENSIONS, CASE.recipe, *own, weights)

    lockstep(4, work)
    used = {int(e) for idx in made.topk_idx for e in idx.flatten() if e >= 0}
    assert asked == {rank: {e for e in used if e // 2 == rank} for rank in range(4)}


def test_bytes_sent_equal_a_count_by_hand() -> None:
    """A row takes H + 4 H/128 + 3 * 4 + 4 bytes there, and 2 H + 2 * 4 back."""
    counts = torch.zeros(4, 4, dtype=torch.int64)  # [from, to]
    for rank, idx in enumerate(inputs.make(CASE).topk_idx):
        for e in idx.flatten().tolist():
            if e >= 0:
                counts[rank, e // 2] += 1
    sent = torch.stack([result.sent for result in results()])
    assert torch.equal(sent[:, 0], counts * (128 + 4 + 12 + 4))
    assert torch.equal(sent[:, 1], counts.T * (256 + 8))


def _first_full(messages: list[Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    full = next(i for i, message in enumerate(messages) if len(message))
    return [change(message) if i == full else message for i, message in enumerate(messages)]


@pytest.mark.parametrize(
    ("call", "change", "words"),
    [
        (1, lambda messages: messages[1:], "3 messages for 4 ranks"),
        (1, lambda messages: [message.float() for message in messages], "not uint8"),
        (1, lambda messages: _first_full(messages, lambda m: m[:-1]), "no number of rows of 148 bytes"),
        (1, lambda messages: messages[1:] + messages[:1], "lives elsewhere"),
        (2, lambda messages: _first_full(messages, lambda m: m[:-264]), "slots, or not one for each"),
        (2, lambda messages: _first_full(messages, lambda m: torch.cat([m, m[:264]])), "slots, or not one for each"),
    ],
    ids=["too_few", "not_bytes", "cut", "wrong_rank", "lost", "twice"],
)
def test_messages_that_do_not_fit(call: int, change: Callable[[list[Tensor]], list[Tensor]], words: str) -> None:
    with pytest.raises(ExchangeError, match=words) as caught:
        results(call, change)
    assert len(caught.value.__notes__) == 1
    assert caught.value.__notes__[0].startswith("in rank ")


def test_rows_that_never_arrived_are_seen_when_results_are_gathered() -> None:
    whole = results()
    assert whole[1].trace is not None
    short = {name: tensor[1:] if name != "slots" else tensor for name, tensor in whole[1].trace.items()}
    with pytest.raises(ExchangeError, match="were routed and"):
        gather(DIMENSIONS, [whole[0], RankResult(whole[1].y, whole[1].stats, whole[1].sent, short), *whole[2:]])


def test_pack_and_unpack() -> None:
    columns = (
        torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        torch.tensor([[1.5], [float("nan")]]),
        torch.tensor([[-1, 2], [3, 4]], dtype=torch.int32),
        torch.tensor([[0.5], [-0.0]], dtype=torch.bfloat16),
    )
    formats = [(column.dtype, column.shape[1]) for column in columns]
    message = pack(*columns)
    assert message.shape == (2 * (3 + 4 + 8 + 2),)
    for column, back in zip(columns, unpack(message, *formats), strict=True):
        assert_same(back, column)
    assert [list(part.shape) for part in unpack(message[:0], *formats)] == [[0, 3], [0, 1], [0, 2], [0, 1]]


# --- a rank that fails ------------------------------------------------------------------------------------------------


def test_a_rank_that_raises_ends_the_others() -> None:
    made = inputs.make(CASE)

    def weights(e: int) -> ExpertWeights:
        if e // 2 == 1:
            raise OSError(f"no weights of expert {e}")
        return made.weights(e)

    before = threading.active_count()
    with pytest.raises(OSError, match="no weights of expert 2") as caught:
        results(weights=weights)
    assert caught.value.__notes__ == ["in rank 1 of 4"]
    assert threading.active_count() == before


@pytest.mark.parametrize("early", [0, 1, 3])
def test_a_rank_that_leaves_early_ends_the_others(early: int) -> None:
    def work(exchange: Exchange, rank: int) -> int:
        if rank != early:
            exchange.all_to_all([torch.empty(0, dtype=torch.uint8)] * 4)
        return rank

    with pytest.raises(ExchangeError, match=f"rank {early} ended before the exchange"):
        lockstep(4, work)


def test_events_have_the_same_order_in_every_run() -> None:
    def events() -> list[tuple[int, int]]:
        seen = []

        def work(exchange: Exchange, rank: int) -> None:
            for step in range(3):
                seen.append((step, rank))
                came = exchange.all_to_all([torch.tensor([rank, to, step], dtype=torch.uint8) for to in range(3)])
                assert [message.tolist() for message in came] == [[source, rank, step] for source in range(3)]

        lockstep(3, work)
        return seen

    assert events() == [(step, rank) for step in range(3) for rank in range(3)]


def test_arguments_are_checked_as_in_the_layer() -> None:
    made = inputs.make(CASE)
    x, x_sf, topk_idx, topk_weights, weights = made.arguments()
    wrong = [*topk_idx[:2], torch.full((3, 3), 8), topk_idx[3]]
    with pytest.raises(ArgumentError, match=r"topk_idx\[2\]\[0, 0\] = 8 must be"):
        run_ranks(CASE.recipe, x, x_sf, wrong, topk_weights, weights, experts=8)
    with pytest.raises(ArgumentError, match="weights = 7 must be a function"):
        run_ranks(CASE.recipe, x, x_sf, topk_idx, topk_weights, 7, experts=8)
