"""The gate: each dsv4_flash case at 8 ranks and full size, proven without a GPU in every way that suite needs.

What a case proves here: its stages equal the golden; the compiled twin equals the readable reference on a sample of
every stage; y lies inside the FP64 oracle's bound; lattice cases equal int64 arithmetic; statistics equal a count by
hand; y does not depend on batch, token order and number of ranks.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from golden import store
from quant import atoms
from quant.cast import BLOCK
from reference import combine, dispatch, gemm, oracle, scatter, swiglu
from reference.layer import LayerResult, moe_layer
from tests import inputs
from tests.cases import GATE, SMOKE, Case
from tests.compare import same

SAMPLE_EXPERTS, SAMPLE_ROWS = 3, 4
"""Experts of a case whose rooms are computed again by the readable atoms, and rows of each."""
SAMPLE_TOKENS, SAMPLE_COLUMNS = 2, 96
"""Tokens and columns of y that the oracles compute."""


@dataclass
class Run:
    """One case, computed once for all its proofs."""

    case: Case
    inputs: inputs.Inputs
    sha256: str
    result: LayerResult

    @property
    def trace(self) -> dict[str, Tensor]:
        assert self.result.trace is not None
        return self.result.trace

    def random(self, proof: str) -> random.Random:
        """A generator of samples: the same for a case, a proof and a seed, on every machine."""
        return random.Random(f"{self.case.id} {proof} {self.case.seed}")

    def tokens(self, proof: str, count: int) -> list[tuple[int, int]]:
        """A sample of (rank, token), those with an active slot first."""
        places = [(rank, token) for rank, tokens in enumerate(self.case.tokens) for token in range(tokens)]
        self.random(proof).shuffle(places)
        active = {tuple(row[:2].tolist()) for row in self.trace["rows"]}
        return sorted(places, key=lambda place: place not in active)[:count]

    def columns(self, proof: str) -> Tensor:
        """A sample of columns of y."""
        return torch.tensor(sorted(self.random(proof).sample(range(self.case.shape.hidden), SAMPLE_COLUMNS)))


@pytest.fixture(scope="module")
def run(case: Case) -> Run:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = inputs.make(case, device)
    before = made.sha256()
    result = moe_layer(case.recipe, *made.arguments(), trace=True, experts=case.shape.experts)
    assert made.sha256() == before, "the layer wrote to its inputs"
    return Run(case, made, before, result)


on_cases = pytest.mark.parametrize("case", GATE + SMOKE, ids=lambda case: case.id, scope="module")


@on_cases
class TestCase:
    def test_stages_equal_the_golden(self, run: Run, pytestconfig: pytest.Config) -> None:
        if pytestconfig.getoption("--seed"):
            pytest.skip("goldens belong to --seed 0")
        assert store.check(run.case, store.read(run.case), run.sha256, run.trace) > 0

    def test_the_twin_equals_the_readable_reference(self, run: Run) -> None:
        check_dispatch(run)
        compared = check_rooms(run)
        check_combine(run)
        assert compared > 0 or not len(run.trace["rows"])

    def test_y_is_inside_the_fp64_bound(self, run: Run, record_property: pytest.RecordProperty) -> None:
        recipe, columns, used = run.case.recipe, run.columns("fp64"), 0.0
        for rank, token in run.tokens("fp64", SAMPLE_TOKENS):
            y64, bound = oracle.fp64_layer(
                *rank_arguments(run, rank),
                run.inputs.weights,
                torch.tensor([token]),
                columns,
                clamp=recipe.clamp,
                silu=recipe.silu,
                granularity=recipe.activation_granularity,
                activation_scale=recipe.activation_scale,
                l1_rounding=recipe.l1_rounding,
                weight_fold=recipe.weight_fold,
            )
            used = max(used, oracle.headroom(run.result.y[rank][[token]][:, columns].cpu(), y64, bound))
        record_property("fp64_bound_used", used)
        print(f"{run.case.id}: {100 * used:.2f} % of the FP64 bound used")
        assert used <= 1.0

    def test_statistics_equal_a_count_by_hand(self, run: Run) -> None:
        counts = Counter(e for idx in run.inputs.topk_idx for token in idx.tolist() for e in token if e >= 0)
        local = run.case.shape.experts_per_rank(run.case.ranks)
        expected = [[counts[rank * local + e] for e in range(local)] for rank in range(run.case.ranks)]
        assert [stats.tolist() for stats in run.result.stats] == expected
        assert sum(map(sum, expected)) == len(run.trace["rows"])

    def test_y_does_not_depend_on_batch_order_and_ranks(self, run: Run) -> None:
        """Three tokens alone, in another order, on another number of ranks: the same bits as in the whole batch."""
        places = run.tokens("invariance", 3)
        if not places:
            assert all(y.shape == (0, run.case.shape.hidden) for y in run.result.y)
            return
        ranks = 2 if run.case.ranks != 2 else 1
        arguments = [torch.cat([t[rank][[token]] for rank, token in places]) for t in run.inputs.arguments()[:4]]
        first = len(places) // ranks
        by_rank = [[part[:first], part[first:]] if ranks == 2 else [part] for part in arguments]
        alone = moe_layer(run.case.recipe, *by_rank, run.inputs.weights, experts=run.case.shape.experts)
        expected = [run.result.y[rank][token] for rank, token in places]
        same("y", torch.stack(expected), torch.cat(alone.y))

    def test_lattice_y_equals_integers(self, run: Run) -> None:
        if run.case.family != "lattice":
            check_not_lattice(run)
            return
        columns = run.columns("lattice")
        for rank, token in run.tokens("lattice", SAMPLE_TOKENS):
            exact = oracle.lattice_y(
                *rank_arguments(run, rank),
                run.inputs.weights,
                torch.tensor([token]),
                columns,
                run.case.recipe.clamp,
                run.case.recipe.activation_granularity,
            )
            same("y", exact, run.result.y[rank][[token]][:, columns].contiguous().view(torch.int16).cpu())


def rank_arguments(run: Run, rank: int) -> tuple[Tensor, ...]:
    """x, x_sf, topk_idx and topk_weights of one rank."""
    return tuple(tensors[rank] for tensors in run.inputs.arguments()[:4])


def check_dispatch(run: Run) -> None:
    """Every routed row is the bytes of its source token, found without the reference's own indexing."""
    made, trace = run.inputs, run.trace
    expected = [
        (rank, token, slot)
        for rank, idx in enumerate(made.topk_idx)
        for token, experts in enumerate(idx.tolist())
        for slot, e in enumerate(experts)
        if e >= 0
    ]
    assert [tuple(row) for row in trace["rows"].tolist()] == expected
    for row, (rank, token, _) in enumerate(expected):
        same("l1_acts", made.x[rank][token], trace["l1_acts"][row])
        same("l1_acts_sf", made.x_sf[rank][token], trace["l1_acts_sf"][row])


def check_rooms(run: Run) -> int:
    """Sampled rows and one 128-wide block of columns of each GEMM, by the readable atoms; returns elements compared."""
    case, recipe, made, trace = run.case, run.case.recipe, run.inputs, run.trace
    chance, compared = run.random("rooms"), 0
    where = dispatch.routes(made.topk_idx)
    busy = where.expert.unique().tolist()
    for e in sorted(chance.sample(busy, min(SAMPLE_EXPERTS, len(busy)))):
        rows = where.of_expert(e)
        rows = rows[torch.tensor(sorted(chance.sample(range(len(rows)), min(SAMPLE_ROWS, len(rows)))))]
        triples = trace["rows"][rows]
        weight = torch.cat(made.topk_weights)[where.row[rows], where.slot[rows]]
        w1, w1_sf, w2, w2_sf = made.weights(e)

        block = chance.randrange(case.shape.intermediate // BLOCK)  # gate rows and up rows of one block
        gate_up = [block, block + case.shape.intermediate // BLOCK]
        part = w1.unflatten(0, (-1, BLOCK))[gate_up].flatten(0, 1)
        gate, up = gemm.l1(
            recipe, trace["l1_acts"][rows], trace["l1_acts_sf"][rows], part, w1_sf[gate_up].contiguous(), atoms
        )
        q, q_sf = swiglu.requantise(recipe, swiglu.activate(recipe, gate, up, weight, atoms))
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        groups = slice(columns.start // recipe.activation_granularity, columns.stop // recipe.activation_granularity)
        compared += same("l2_acts", q, trace["l2_acts"][rows][:, columns], triples, columns.start)
        compared += same("l2_acts_sf", q_sf, trace["l2_acts_sf"][rows][:, groups], triples, groups.start)

        block = chance.randrange(case.shape.hidden // BLOCK)
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        acts, acts_sf = trace["l2_acts"][rows], trace["l2_acts_sf"][rows]
        out = gemm.l2(recipe, acts, acts_sf, w2[columns], w2_sf[[block]], atoms)
        slots = trace["slots"][rows][:, columns]
        compared += same("slots", scatter.to_slot(out, atoms), slots, triples, columns.start)
    return compared


def check_combine(run: Run) -> None:
    """All of y again from the slots, by the readable atoms."""
    where = dispatch.routes(run.inputs.topk_idx)
    weight = torch.cat(run.inputs.topk_weights)[where.row, where.slot]
    shape = run.case.shape
    y = combine.combine(run.case.recipe, run.trace["slots"], where, weight, run.case.tokens, shape.topk, atoms)
    same("y", torch.cat(y), run.trace["y"])


def check_not_lattice(run: Run) -> None:
    """The integer oracle refuses an input on which a step rounds: it can't agree by accident."""
    active = [place for place in run.tokens("lattice", 1) if (run.inputs.topk_idx[place[0]][place[1]] >= 0).any()]
    for rank, token in active:
        with pytest.raises(oracle.NotLattice):
            oracle.lattice_y(
                *rank_arguments(run, rank),
                run.inputs.weights,
                torch.tensor([token]),
                run.columns("lattice"),
                run.case.recipe.clamp,
                run.case.recipe.activation_granularity,
            )
