"""Every case of the matrix, proven in every way that it can be; those of dsv4_flash at 8 ranks are the gate.

What a case proves: its stages equal the golden (tier cpu); the kernel behind `--kernel` equals the reference in every
stage that it shows; the compiled twin equals the readable reference on a sample of every stage; y lies inside the FP64
oracle's bound; y of lattice cases, the kernel's as the reference's, equals int64 arithmetic; statistics equal a count
by hand; y does not depend on batch, token order and number of ranks. Cases of tier gpu are skipped without one.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megaproof.cases import inputs
from megaproof.cases.cases import CASES, Case
from megaproof.cases.compare import hold, same
from megaproof.cases.run import CaseRun, default_device, run_case
from megaproof.golden import store
from megaproof.proof import adapters, bundle, exact, memory
from megaproof.proof.adapters import taken
from megaproof.proof.prove import LAUNCHES, Convicted, prove
from megaproof.quant import atoms
from megaproof.quant.cast import BLOCK
from megaproof.reference import combine, dispatch, gemm, oracle, scatter, swiglu
from megaproof.reference.layer import moe_layer
from megaproof.reference.operands import plain
from megaproof.reference.remembering import Remembering

SAMPLE_EXPERTS, SAMPLE_ROWS = 3, 4
"""Experts of a case whose rooms are computed again by the readable atoms, and rows of each."""
COMBINED_TOKENS = 16
"""Tokens whose y is combined again by the readable atoms."""
SAMPLE_TOKENS, SAMPLE_COLUMNS = 2, 96
"""Tokens and columns of y that the oracles compute; at full size, which costs most, half the tokens."""


class SampledRun(CaseRun):
    """A case that is computed once for all of its proofs, and the samples that each proof takes of it."""

    def random(self, proof: str) -> random.Random:
        """A generator of samples: the same for a case, a proof and a seed, on every machine."""
        return random.Random(f"{self.case.id} {proof} {self.case.seed}")

    def tokens(self, proof: str, count: int) -> list[tuple[int, int]]:
        """A sample of (rank, token), those with an active slot first."""
        places = [(rank, token) for rank, tokens in enumerate(self.case.tokens) for token in range(tokens)]
        self.random(proof).shuffle(places)
        active = {tuple(row[:2].tolist()) for row in self.trace["rows"]}
        return sorted(places, key=lambda place: place not in active)[:count]

    def oracle_tokens(self, proof: str) -> list[tuple[int, int]]:
        """The tokens that an oracle computes."""
        return self.tokens(proof, SAMPLE_TOKENS if self.case.shape.name == "smoke" else SAMPLE_TOKENS // 2)

    def columns(self, proof: str) -> Tensor:
        """A sample of columns of y."""
        return torch.tensor(sorted(self.random(proof).sample(range(self.case.shape.hidden), SAMPLE_COLUMNS)))

    @functools.cached_property
    def integers(self) -> exact.Exact | None:
        """y of a lattice case by int64 arithmetic alone, where it is small nearly all, else a sample."""
        return exact.of_case(self.case, self.inputs) if exact.on_lattice(self.case) else None


@pytest.fixture(scope="module")
def run(case: Case) -> Iterator[SampledRun]:
    """A case with its inputs and its traced result, made once for all of its proofs."""
    made = inputs.make(case, default_device())
    if case.tier == "cpu":  # what launches repeat is not computed again; a large batch would fill the memory
        made = dataclasses.replace(made, weights=Remembering(made.weights))
    found = SampledRun(**vars(run_case(case, made=made)))
    yield found
    vars(found).clear()  # pytest holds it until after this
    memory.free(0)


ON_CPU = tuple(case for case in CASES if case.tier == "cpu")
IN_ORDER = ON_CPU + tuple(case for case in CASES if case.tier != "cpu")
"""Those with a golden first: pytest groups the proofs of a case by its place in the list."""
on_cases = pytest.mark.parametrize("case", IN_ORDER, ids=lambda case: case.id, scope="module")


@pytest.mark.parametrize("case", ON_CPU, ids=lambda case: case.id, scope="module")
class TestGolden:
    """Cases of tier cpu against their goldens."""

    def test_stages_equal_the_golden(self, run: SampledRun, pytestconfig: pytest.Config) -> None:
        if pytestconfig.getoption("--seed") or pytestconfig.getoption("--recipe"):
            pytest.skip("goldens belong to --seed 0 and to the case's own recipe")
        compared = store.check(run.case, store.read(run.case), run.sha256, run.trace)
        hold(compared > 0, f"{run.case.id}: the golden compared nothing")


@on_cases
class TestCase:
    """The other six proofs of a case."""

    def test_the_kernel_equals_the_reference(
        self, run: SampledRun, pytestconfig: pytest.Config, record_property: pytest.RecordProperty
    ) -> None:
        """All launches of a proof of the kernel behind --kernel; of ours on a CPU at full size, or over gloo, one."""
        world, spec = pytestconfig.getoption("--world"), pytestconfig.getoption("--kernel")
        adapter = adapters.make(spec)
        try:
            if world not in getattr(adapter, "worlds", adapters.WORLDS[:1]):
                pytest.skip(f"not claimed by {adapter.name}: world {world}")
            if reason := taken.claims(adapter, run.case.recipe):
                pytest.skip(f"not claimed by {adapter.name}: {reason}")
            device = run.inputs.x[0].device
            quick = world != "gloo" and (run.case.shape.name == "smoke" or device.type == "cuda")
            prepared = adapters.Prepared(run.case, run.inputs, device, world)
            every = quick or spec != adapters.DEFAULT
            proof = prove(adapter, prepared, run.result, len(LAUNCHES) if every else 1, run.integers)
        except Convicted as error:
            if error.of_case and error.divergence and error.divergence.place:
                error.add_note(bundle.note(error.divergence, run.case))
            raise
        finally:
            taken.asked(adapter.close)
        record_property("kernel", f"{adapter.name}: {proof}")
        print(f"{run.case.id}: {adapter.name}: {proof}")
        hold(proof.elements > 0, f"{run.case.id}: no element of the kernel was compared")
        wanted = run.integers is not None and any(run.case.tokens)
        hold(bool(proof.by_integers) == wanted, f"{run.case.id}: {proof.by_integers} elements by integers")

    def test_the_twin_equals_the_readable_reference(self, run: SampledRun) -> None:
        check_dispatch(run)
        compared = check_rooms(run)
        check_combine(run)
        hold(compared > 0 or not len(run.trace["rows"]), f"{run.case.id}: no element of a room was compared")

    def test_y_is_inside_the_fp64_bound(self, run: SampledRun, record_property: pytest.RecordProperty) -> None:
        recipe, columns, used = run.case.recipe, run.columns("fp64"), 0.0
        for rank, token in run.oracle_tokens("fp64"):
            y64, bound = oracle.fp64_layer(
                *rank_arguments(run, rank),
                plain(run.inputs.weights),
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
        hold(used <= 1.0, f"{run.case.id}: y lies outside the FP64 bound, at {used:.3f} of it")

    def test_statistics_equal_a_count_by_hand(self, run: SampledRun) -> None:
        counts = Counter(e for idx in run.inputs.topk_idx for token in idx.tolist() for e in token if e >= 0)
        local = run.case.shape.experts_per_rank(run.case.ranks)
        expected = [[counts[rank * local + e] for e in range(local)] for rank in range(run.case.ranks)]
        found, rows = [stats.tolist() for stats in run.result.stats], len(run.trace["rows"])
        hold(found == expected, f"{run.case.id}: statistics {found}, by hand {expected}")
        hold(sum(map(sum, expected)) == rows, f"{run.case.id}: {rows} rows, by hand {sum(map(sum, expected))}")

    def test_y_does_not_depend_on_batch_order_and_ranks(self, run: SampledRun) -> None:
        """Three tokens alone, in another order, on another number of ranks: the same bits as in the whole batch."""
        places = run.tokens("invariance", 3)
        if not places:
            shapes = [tuple(y.shape) for y in run.result.y]
            hold(set(shapes) == {(0, run.case.shape.hidden)}, f"{run.case.id}: y of no token has shapes {shapes}")
            return
        ranks = 2 if run.case.ranks != 2 else 1
        arguments = [torch.cat([t[rank][[token]] for rank, token in places]) for t in run.inputs.arguments()[:4]]
        first = len(places) // ranks
        by_rank = [[part[:first], part[first:]] if ranks == 2 else [part] for part in arguments]
        weights = run.inputs.weights
        fresh = weights.fresh if isinstance(weights, Remembering) else weights
        alone = moe_layer(run.case.recipe, *by_rank, fresh, experts=run.case.shape.experts)
        expected = [run.result.y[rank][token] for rank, token in places]
        same("y", torch.stack(expected), torch.cat(alone.y))

    def test_lattice_y_equals_integers(self, run: SampledRun) -> None:
        """The integer oracle refuses where a step rounds: random data always, a lattice never; it never disagrees.

        The kernel's y is held against the same integers in its own proof.
        """
        if run.integers:
            compared = run.integers.compare(run.result.y)
            print(f"{run.case.id}: {compared:,} elements of y by int64 arithmetic")
            hold(compared > 0 or not any(run.case.tokens), f"{run.case.id}: the integers compared nothing")
            return
        recipe, columns = run.case.recipe, run.columns("lattice")
        rounding = run.case.family in ("mixed", "gaussian", "heavy_tail")  # no scale is a power of two everywhere
        for rank, token in run.oracle_tokens("lattice"):
            active = bool((run.inputs.topk_idx[rank][token] >= 0).any())
            try:
                y = oracle.lattice_y(
                    *rank_arguments(run, rank),
                    plain(run.inputs.weights),
                    torch.tensor([token]),
                    columns,
                    recipe.clamp,
                    recipe.activation_granularity,
                )
            except oracle.NotLattice:
                continue
            hold(not (rounding and active), "the integer oracle took an input on which steps round")
            if exact.modelled(run.case):
                same("y", y, run.result.y[rank][[token]][:, columns].contiguous().view(torch.int16).cpu())


def rank_arguments(run: SampledRun, rank: int) -> tuple[Tensor, ...]:
    """x, x_sf, topk_idx and topk_weights of one rank."""
    return tuple(tensors[rank] for tensors in run.inputs.arguments()[:4])


def check_dispatch(run: SampledRun) -> None:
    """Every routed row is the bytes of its source token, found without the reference's own indexing."""
    made, trace = run.inputs, run.trace
    expected = [
        (rank, token, slot)
        for rank, idx in enumerate(made.topk_idx)
        for token, experts in enumerate(idx.tolist())
        for slot, e in enumerate(experts)
        if e >= 0
    ]
    found = [tuple(row) for row in trace["rows"].tolist()]
    hold(found == expected, f"{run.case.id}: routed rows {found}, by hand {expected}")
    if expected:
        for stage, source in (("l1_acts", made.x), ("l1_acts_sf", made.x_sf)):
            copied = torch.stack([source[rank][token] for rank, token, _ in expected])
            same(stage, copied, trace[stage], trace["rows"])


def check_rooms(run: SampledRun) -> int:
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
        w = made.weights(e)

        block = chance.randrange(case.shape.intermediate // BLOCK)  # gate rows and up rows of one block
        gate_up = [block, block + case.shape.intermediate // BLOCK]
        acts, acts_sf = trace["l1_acts"][rows], trace["l1_acts_sf"][rows]
        gate, up = gemm.gemm1(recipe, acts, acts_sf, w.l1.of_blocks(gate_up), atoms)
        q, q_sf = swiglu.requantise(recipe, swiglu.activate(recipe, gate, up, weight, atoms))
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        groups = slice(columns.start // recipe.activation_granularity, columns.stop // recipe.activation_granularity)
        compared += same("l2_acts", q, trace["l2_acts"][rows][:, columns], triples, columns.start)
        compared += same("l2_acts_sf", q_sf, trace["l2_acts_sf"][rows][:, groups], triples, groups.start)

        block = chance.randrange(case.shape.hidden // BLOCK)
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        acts, acts_sf = trace["l2_acts"][rows], trace["l2_acts_sf"][rows]
        out = gemm.gemm2(recipe, acts, acts_sf, w.l2.of_blocks([block]), atoms)
        slots = trace["slots"][rows][:, columns]
        compared += same("slots", scatter.to_slot(out, atoms), slots, triples, columns.start)
    return compared


def check_combine(run: SampledRun) -> None:
    """y of sampled tokens again from their slots, by the readable atoms."""
    made, chosen = run.inputs, run.tokens("combine", COMBINED_TOKENS)
    by_rank = [sorted(token for rank, token in chosen if rank == r) for r in range(run.case.ranks)]
    where = dispatch.routes([idx[tokens] for idx, tokens in zip(made.topk_idx, by_rank, strict=True)])
    weight = torch.cat([w[tokens] for w, tokens in zip(made.topk_weights, by_rank, strict=True)])
    rows = [i for i, row in enumerate(run.trace["rows"][:, :2].tolist()) if tuple(row) in set(chosen)]
    y = combine.combine(
        run.case.recipe,
        run.trace["slots"][rows],
        where,
        weight[where.row, where.slot],
        tuple(map(len, by_rank)),
        run.case.shape.topk,
        atoms,
    )
    for rank, tokens in enumerate(by_rank):
        same(f"y of rank {rank}", y[rank], run.result.y[rank][tokens])
