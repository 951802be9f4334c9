"""The whole layer: routing and combination by hand, both arithmetics, masks, NaN, and what belongs to the caller.

Invariances are in `test_invariance.py`, the fields of the recipe in `test_recipe_fields.py`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.cases.inputs import make
from megaproof.quant import atoms, twin
from megaproof.quant.recipe import RECIPES, Recipe
from megaproof.quant.shapes import SHAPES, Shape
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.stages import SHOWN, STAGES
from megaproof.tests.support import tiny
from megaproof.tests.support.bit_patterns import assert_same

SMALL = Shape("small", hidden=256, intermediate=128, experts=8, topk=3)


def run(case: Case, **options: Any) -> LayerResult:
    return moe_layer(case.recipe, *make(case).arguments(), experts=case.shape.experts, trace=True, **options)


def assert_same_trace(actual: LayerResult, expected: LayerResult) -> None:
    assert actual.trace is not None
    assert expected.trace is not None
    assert list(actual.trace) == list(expected.trace) == [*STAGES, "rows"]
    for stage in actual.trace:
        assert_same(actual.trace[stage], expected.trace[stage])


def digest(tensors: list[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


# --- by hand ----------------------------------------------------------------------------------------------------------

IDX = [
    [[0, 3, 1], [2, -1, 0], [-1, -1, -1]],  # the third token has no expert
    [],  # an idle rank
    [[3, 3, 3]],  # one expert three times
    [[-1, 2, -1], [1, 0, 3], [0, 0, 2], [7, 6, 5]],
]
WEIGHTS = [
    [[1.0, 0.5, -0.25], [2.0, 99.0, 0.125], [1.0, 1.0, 1.0]],
    [],
    [[0.5, 0.25, -2.0]],
    [[7.0, -1.0, 7.0], [0.0, 4.0, 1.0], [1.0, -1.0, 0.5], [0.0625, 8.0, -1.0]],
]
EXPERTS = 8


def by_hand(**options: Any) -> LayerResult:
    return moe_layer(tiny.RECIPE, *tiny.layer(IDX, WEIGHTS).arguments(), experts=EXPERTS, trace=True, **options)


@pytest.mark.parametrize("arith", [None, atoms], ids=["twin", "atoms"])
def test_routing_and_combination_by_hand(arith: Any) -> None:
    result = by_hand(arith=arith)
    assert [y.float().tolist() for y in result.y] == tiny.naive(IDX, WEIGHTS)
    assert [tuple(y.shape) for y in result.y] == [(3, 128), (0, 128), (1, 128), (4, 128)]
    assert [s.tolist() for s in result.stats] == [[5, 2], [3, 5], [0, 1], [1, 1]]


def test_one_row_in_full() -> None:
    """Token 1 is number 2 = 0b10 plus the sentinel: slots 0 and 2, experts 2 and 0, weights 2 and 1/8."""
    y = by_hand().y[0][1].float()
    expected = torch.zeros(128)
    expected[(1 - 3) % 128] = 64 * 2 * 0.25  # column 1, seen by row h with h + 2 + 1 = 1
    expected[96 - 3] = 64 * 2 * 0.25
    expected[1 - 1] = 64 * 0.125
    expected[96 - 1] = 64 * 0.125
    assert y.tolist() == expected.tolist()


def test_trace_of_the_layer_by_hand() -> None:
    trace = by_hand().trace
    assert trace is not None
    rows = [
        (rank, token, slot)
        for rank, tokens in enumerate(IDX)
        for token, experts in enumerate(tokens)
        for slot, e in enumerate(experts)
        if e >= 0
    ]
    assert trace["rows"].tolist() == [list(row) for row in rows], "(rank, token, slot) order, active slots only"
    first = [0, 3, 3, 4]
    numbers = [first[rank] + token for rank, token, _ in rows]
    assert torch.equal(trace["l1_acts"], torch.stack([tiny.codes(tiny.token(n)) for n in numbers]))
    weights = torch.tensor([WEIGHTS[rank][token][slot] for rank, token, slot in rows])
    # The amax of a 64-group that holds a bit is 64 |w|; 64 / 448 rounds up to 2^-2, and 64 / 2^-2 = 256.
    held = weights.abs() / 4
    empty = torch.tensor(2.0**-126)
    expected = torch.where(weights == 0, empty, held)[:, None].expand(-1, 2)
    assert torch.equal(trace["l2_acts_sf"], expected)
    ups = torch.stack([tiny.token(n) for n in numbers])
    assert torch.equal(atoms.decode_e4m3(trace["l2_acts"]), 256 * ups * weights.sign()[:, None])
    experts = [IDX[rank][token][slot] for rank, token, slot in rows]
    for row, e in enumerate(experts):
        assert torch.equal(trace["slots"][row].float(), (64 * weights[row] * ups[row] * 2.0**-e).roll(-(e + 1)))
    assert trace["y"].float().tolist() == [row for rank in tiny.naive(IDX, WEIGHTS) for row in rank]
    assert trace["stats"].tolist() == [5, 2, 3, 5, 0, 1, 1, 1]
    assert {name: tensor.dtype for name, tensor in trace.items()} == {
        "l1_acts": torch.uint8,
        "l1_acts_sf": torch.float32,
        "l2_acts": torch.uint8,
        "l2_acts_sf": torch.float32,
        "slots": torch.bfloat16,
        "y": torch.bfloat16,
        "stats": torch.int32,
        "rows": torch.int64,
    }


# --- two arithmetics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_twin_equals_readable_atoms_in_every_stage(name: str) -> None:
    """At smoke size, all stages of every named recipe: a zero row, a zero group, hot and subnormal tokens."""
    case = Case(SHAPES["smoke"], (3, 2), RECIPES[name], masked=30, routing="zipf")
    assert_same_trace(run(case), run(case, arith=atoms))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_gpu_equals_cpu_in_every_stage(name: str) -> None:
    case = Case(SHAPES["smoke"], (7, 0, 5, 12), RECIPES[name], masked=30, routing="zipf")
    on_gpu = moe_layer(case.recipe, *make(case, "cuda").arguments(), experts=case.shape.experts, trace=True)
    assert_same_trace(on_gpu, run(case))


def test_repeated_calls_give_the_same_bits() -> None:
    case = Case(SMALL, (5, 3))
    assert_same_trace(run(case), run(case))
    assert moe_layer(case.recipe, *make(case).arguments()).trace is None


# --- masks, nothing at all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_masked_gives_plus_zero(ranks: int) -> None:
    case = Case(SMALL, (4,) * ranks, masked=100)
    result = run(case)
    for y, stats in zip(result.y, result.stats, strict=True):
        assert y.view(torch.int16).tolist() == [[0] * 256] * 4
        assert stats.tolist() == [0] * (8 // ranks)
    assert result.trace is not None
    assert result.trace["rows"].shape == (0, 3)
    assert {len(result.trace[stage]) for stage in SHOWN} == {0}


def test_no_token_anywhere() -> None:
    result = run(Case(SMALL, (0, 0)))
    assert [tuple(y.shape) for y in result.y] == [(0, 256)] * 2
    assert [s.tolist() for s in result.stats] == [[0] * 4] * 2


def test_a_duplicate_expert_counts_twice() -> None:
    made = make(Case(SMALL, (4,)))
    made.topk_idx[0][:] = 5
    made.topk_weights[0][:] = 0.25
    result = moe_layer(Recipe(), *made.arguments(), experts=8, trace=True)
    assert result.stats[0].tolist() == [0, 0, 0, 0, 0, 12, 0, 0]
    assert result.trace is not None
    slots = atoms.decode_bf16(result.trace["slots"]).reshape(4, 3, 256)
    assert torch.equal(slots[:, 0], slots[:, 1])
    assert_same(result.y[0], atoms.encode_bf16(slots[:, 0] + slots[:, 1] + slots[:, 2]))


# --- inputs, statistics, progress -------------------------------------------------------------------------------------


def test_inputs_are_not_written() -> None:
    made = make(Case(SMALL, (5, 2), masked=30))
    kept = {e: made.weights(e) for e in range(8)}
    everything = [t for part in made.arguments()[:4] for t in part] + [t for w in kept.values() for t in w.tensors()]
    stats = [torch.full((4,), 7, dtype=torch.int32) for _ in range(2)]
    before = digest(everything + stats)
    moe_layer(Recipe(), *made.arguments()[:4], kept.__getitem__, stats=stats, trace=True)
    assert digest(everything + stats) == before


def test_statistics_accumulate() -> None:
    made = make(Case(SMALL, (5, 2), masked=30))
    once = moe_layer(Recipe(), *made.arguments(), experts=8)
    routed = torch.cat([idx.reshape(-1) for idx in made.topk_idx])
    assert torch.equal(torch.cat(once.stats), torch.bincount(routed[routed >= 0], minlength=8).int())
    twice = moe_layer(Recipe(), *made.arguments(), stats=once.stats)
    assert [s.tolist() for s in twice.stats] == [(2 * s).tolist() for s in once.stats]
    assert all(s.dtype == torch.int32 for s in once.stats + twice.stats)


def test_the_trace_belongs_to_the_caller() -> None:
    """Writing to a result changes no other result."""
    made = make(Case(SMALL, (3,)))
    one, other = (moe_layer(Recipe(), *made.arguments(), experts=8, trace=True) for _ in range(2))
    assert one.trace is not None
    for tensor in one.trace.values():
        tensor.zero_()
    assert_same(one.y[0], other.y[0])
    assert made.sha256() == make(Case(SMALL, (3,))).sha256()


def test_progress_counts_the_busy_experts() -> None:
    made = make(Case(SMALL, (6,)))
    made.topk_idx[0].clamp_(max=4)
    busy = len(made.topk_idx[0].unique())
    seen: list[tuple[int, int]] = []
    moe_layer(Recipe(), *made.arguments(), experts=8, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, busy) for done in range(1, busy + 1)]
    asked: list[int] = []
    moe_layer(Recipe(), *made.arguments()[:4], lambda e: (asked.append(e), made.weights(e))[1], experts=8)
    assert sorted(asked) == made.topk_idx[0].unique().tolist(), "weights of each busy expert once, of no other"


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["x", "x_sf", "topk_weights"])
@pytest.mark.parametrize("arith", [None, atoms], ids=["twin", "atoms"])
def test_nan_reaches_exactly_its_token(where: str, arith: Any) -> None:
    """Without a clamp: 0x7fff in every column of that token's y, and no other bit changes."""
    made = make(Case(SMALL, (5, 3), RECIPES["no_clamp"]))
    clean = moe_layer(RECIPES["no_clamp"], *made.arguments(), experts=8, arith=arith)
    if where == "x":
        made.x[1][2, 37] = 0xFF
    else:
        getattr(made, where)[1][2, 0] = torch.nan
    y = moe_layer(RECIPES["no_clamp"], *made.arguments(), experts=8, arith=arith).y
    assert y[1][2].view(torch.int16).tolist() == [0x7FFF] * 256
    assert_same(y[0], clean.y[0])
    assert_same(y[1][:2], clean.y[1][:2])


def test_a_clamp_drops_nan() -> None:
    """fminf and fmaxf: a NaN gate becomes c and a NaN up becomes -c, so y is finite: silu(c) * -c * weight."""
    layer = tiny.layer([[[0]]], [[[1.0]]])
    layer.x[0][0, 5] = 0x7F
    result = moe_layer(Recipe(clamp=2.0), *layer.arguments(), experts=1, trace=True)
    assert result.trace is not None
    v = atoms.silu(torch.tensor([2.0]), True) * -2.0  # about -3.52
    assert result.trace["l2_acts_sf"].tolist() == [[2.0**-6] * 2], "3.52 / 448 = 2^-6.99"
    assert_same(result.trace["l2_acts"], atoms.encode_e4m3(v * 64).expand(1, 128))


def test_slots_add_up_in_ascending_k() -> None:
    """1 + 2^-24 + 2^-24 in fp32: from the left the small ones are lost, together first they count."""
    case = tiny.layer([[[0, 0, 0]], [[0, 0, 0]]], [[[1.0, 2.0**-24, 2.0**-24]], [[2.0**-24, 2.0**-24, 1.0]]])
    result = moe_layer(tiny.RECIPE, *case.arguments(), experts=2, trace=True)
    assert result.trace is not None
    slots = atoms.decode_bf16(result.trace["slots"]).reshape(2, 3, 128)[:, :, tiny.SENTINEL - 1]
    left, right = ((s[0] + s[1]) + s[2] for s in slots)
    assert (float(left), float(right)) == (64.0, 64.0 + 2.0**-17)


def test_the_layer_runs_on_the_compiled_twin_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.device] = []
    real = twin.arith
    monkeypatch.setattr(
        "megaproof.reference.layer.compiled_arith", lambda device: (calls.append(device), real(device))[1]
    )
    run(Case(SMALL, (2,)))
    assert calls == [torch.device("cpu")]
