"""The cases and their inputs: ids, pinned bytes, routing, and that the inputs reach what they must expose."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant import atoms, twin
from quant.formats import f32_bits
from quant.recipe import RECIPES, SHAPES
from reference import dispatch, gemm, swiglu
from tests.cases import CASES, GATE, SMOKE, Case, find
from tests.inputs import FAMILIES, ROUTINGS, TOKEN_CLASSES, Inputs, make, route

GATE_IDS = [
    "dsv4_flash-r8-t8-clamp10-fast1-uniform",
    "dsv4_flash-r8-t4-clamp10-fast0-zipf",
    "dsv4_flash-r8-t2-clampnone-fast1-one_hot",
    "dsv4_flash-r8-t2-clampnone-fast0-uniform-mask30",
    "dsv4_flash-r8-t9x0x1x7x3x0x2x5-clamp1-fast1-zipf-mask30",
    "dsv4_flash-r8-t16x0x0x0x0x0x0x0-clamp0.5-fast0-one_rank",
    "dsv4_flash-r8-t1x1x1x1x1x1x1x0-clamp10-fast1-few_experts-mask70",
    "dsv4_flash-r8-t1-clamp10-fast1-uniform-mask100",
    "dsv4_flash-r8-t3x2x2x2x2x2x2x1-clampnone-fast1-uniform-lattice",
    "dsv4_flash-r8-t2x1x0x1x1x1x1x1-clamp64-fast0-zipf-mask30-lattice",
]

# Case -> sha256 of its inputs, and of the weights of two of its experts.
PINNED: dict[str, tuple[str, dict[int, str]]] = {
    "dsv4_flash-r8-t8-clamp10-fast1-uniform": (
        "516b2b77af2bcd1da33ad59d13397133dc2adcae829b3f35a77d92364f7acc8f",
        {
            0: "658db26d2a1370386dd9fb1a217553f53e154d162f5daeda247f50c85182c097",
            3: "dcb8271809fa29df52808eb6ab81ad6cef2cc2275ce1c0226d9c05d7c4f1c1ec",
        },
    ),
    "dsv4_flash-r8-t9x0x1x7x3x0x2x5-clamp1-fast1-zipf-mask30": (
        "70abf799efe9e335d938018b3e6d8da5b90bb443e52e058a7a53cfc9854c0a22",
        {
            0: "658db26d2a1370386dd9fb1a217553f53e154d162f5daeda247f50c85182c097",
            3: "dcb8271809fa29df52808eb6ab81ad6cef2cc2275ce1c0226d9c05d7c4f1c1ec",
        },
    ),
    "dsv4_flash-r8-t3x2x2x2x2x2x2x1-clampnone-fast1-uniform-lattice": (
        "8c2794cf56214805bac188de702a3e3f1707fe6a0530afbd5bb97bb1c7d63014",
        {
            0: "4e6e13b969342ab5ac0182325f3aa1d8d8e2c6439329fabd0980aa75ecb6b750",
            3: "c2dd0f5a3a6eae7a5a51f1dda823d2cae8e638185b52c14d8914d643222964bd",
        },
    ),
    "smoke-r1-t5-clamp10-fast1-zipf-mask30": (
        "3bc9bb3af0a0c5f8c0f2b03ee7c7949d6745482064bf9ae2e921b9c78c181a6d",
        {
            0: "f7215042b8f067ecfece9d76715560c62e0ab63d8ce8fb828c0d79d777ea71b8",
            3: "4960bb44d4d001ba12e2985849e8afdc18106b34b65e35b7d7d8abe04bfc1a6f",
        },
    ),
}


MAIN = GATE[0]
"""The gate's clamp-10 case, whose inputs must reach everything below."""


# --- the table of cases -----------------------------------------------------------------------------------------------


def test_ids_are_unique() -> None:
    twice = [case_id for case_id, count in Counter(case.id for case in CASES).items() if count > 1]
    assert twice == []


def test_the_gate_is_the_pinned_one() -> None:
    assert [case.id for case in GATE] == GATE_IDS


def test_counts_of_the_gate_and_of_smoke() -> None:
    """By preset, tier and number of ranks: a case that is lost or added shows here."""
    assert Counter((case.shape.name, case.tier, case.ranks) for case in GATE) == {("dsv4_flash", "cpu", 8): 10}
    assert {(case.shape.name, case.tier) for case in SMOKE} == {("smoke", "cpu")}
    assert Counter(case.ranks for case in SMOKE) == {1: 1, 2: 9, 4: 5, 8: 1}
    assert CASES[: len(GATE + SMOKE)] == GATE + SMOKE


def test_the_gate_stays_small_and_covers_its_axes() -> None:
    assert all(case.shape == SHAPES["dsv4_flash"] and case.ranks == 8 and sum(case.tokens) <= 64 for case in GATE)
    assert {case.recipe.silu for case in GATE} == {"fast", "precise"}
    assert {case.recipe.clamp for case in GATE} >= {None, 0.5, 1.0, 10.0}
    assert {case.routing for case in GATE} == set(ROUTINGS)
    assert {case.masked for case in GATE} == {0, 30, 70, 100}
    assert {case.family for case in GATE} == {"mixed", "lattice"} <= set(FAMILIES)
    assert any(0 in case.tokens for case in GATE), "an idle rank"
    assert any(len(set(case.tokens)) > 3 for case in GATE), "uneven ranks"


def test_every_named_recipe_has_a_smoke_case() -> None:
    run = {case.recipe.recipe_id for case in SMOKE}
    assert [name for name, recipe in RECIPES.items() if recipe.recipe_id not in run] == []


@pytest.mark.parametrize(
    ("change", "suffix"),
    [
        ({"tokens": (3, 0)}, "smoke-r2-t3x0-clamp10-fast1-uniform"),
        ({"recipe": RECIPES["no_clamp"]}, "smoke-r2-t5-clampnone-fast1-uniform"),
        ({"recipe": RECIPES["default"].replace(clamp=0.5, silu="precise")}, "smoke-r2-t5-clamp0.5-fast0-uniform"),
        ({"routing": "zipf", "masked": 30}, "smoke-r2-t5-clamp10-fast1-zipf-mask30"),
        ({"family": "lattice"}, "smoke-r2-t5-clamp10-fast1-uniform-lattice"),
        ({"recipe": RECIPES["pr323_small"]}, "smoke-r2-t5-clamp10-fast1-uniform-zero_group_public"),
    ],
)
def test_an_id_names_every_axis(change: dict, suffix: str) -> None:
    assert replace(Case(SHAPES["smoke"], (5, 5)), **change).id == suffix


@pytest.mark.parametrize("case_id", GATE_IDS)
def test_a_case_is_found_by_its_id(case_id: str) -> None:
    assert find(case_id).id == case_id


def test_a_wrong_id_names_close_ones() -> None:
    with pytest.raises(KeyError, match=r"no case 'dsv4_flash-r8-t8'; closest: .*dsv4_flash-r8-"):
        find("dsv4_flash-r8-t8")


# --- bytes ------------------------------------------------------------------------------------------------------------


def weights_sha256(made: Inputs, e: int) -> str:
    digest = hashlib.sha256()
    for tensor in made.weights(e):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case_id", PINNED)
def test_bytes_are_pinned(case_id: str, device: str) -> None:
    """The same on every machine, device and version of a library: goldens keep seed and hash only."""
    made, (inputs, weights) = make(find(case_id), device), PINNED[case_id]
    assert made.sha256() == inputs
    assert {e: weights_sha256(made, e) for e in weights} == weights


def test_the_readable_generator_gives_the_same_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    case_id = SMOKE[0].id
    monkeypatch.setattr(twin, "arith", lambda device="cpu": atoms)
    made, (inputs, weights) = make(find(case_id)), PINNED[case_id]
    assert made.sha256() == inputs
    assert weights_sha256(made, 3) == weights[3]


def test_the_seed_changes_every_tensor() -> None:
    case = Case(SHAPES["smoke"], (8,), masked=30)
    one, other = make(case), make(replace(case, seed=case.seed + 1))
    for name in ("x", "x_sf", "topk_idx", "topk_weights"):
        assert not torch.equal(getattr(one, name)[0], getattr(other, name)[0]), name
    for a, b in zip(one.weights(2), other.weights(2), strict=True):
        assert not torch.equal(a, b)


def test_weights_do_not_depend_on_when_they_are_asked_for() -> None:
    made = make(SMOKE[0])
    before = weights_sha256(made, 5)
    made.weights(6)[0].zero_()
    made.weights(5)[0].zero_()
    assert weights_sha256(made, 5) == before
    assert weights_sha256(made, 6) != before


def test_the_digest_sees_every_input() -> None:
    for name in ("x", "x_sf", "topk_idx", "topk_weights"):
        made = make(SMOKE[0])
        before = made.sha256()
        getattr(made, name)[0].view(torch.uint8)[-1, -1] ^= 1
        assert made.sha256() != before, name


# --- routing ----------------------------------------------------------------------------------------------------------


def routed(routing: str, masked: int = 0, tokens: int = 200) -> list[Tensor]:
    case = Case(SHAPES["smoke"], (tokens, 0, tokens, 3), routing=routing, masked=masked)
    return [route(case, rank) for rank in range(4)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("masked", [0, 30, 70, 100])
def test_routing_is_in_range_and_distinct(routing: str, masked: int) -> None:
    for idx, tokens in zip(routed(routing, masked), (200, 0, 200, 3), strict=True):
        assert (idx.dtype, tuple(idx.shape)) == (torch.int64, (tokens, 4))
        assert bool(((idx >= -1) & (idx < 16)).all())
        active = idx.sort(1).values
        assert not bool(((active[:, 1:] == active[:, :-1]) & (active[:, 1:] >= 0)).any()), "no expert twice"
    share = 100 * float((torch.cat(routed(routing, masked)) == -1).float().mean())
    assert share == masked if masked in (0, 100) else abs(share - masked) < 5


def loads(routing: str) -> Tensor:
    """Rows of each of the 16 experts."""
    return torch.bincount(torch.cat(routed(routing)).reshape(-1), minlength=16)


def test_uniform_routing_is_flat() -> None:
    assert int(loads("uniform").min()) > 70
    assert int(loads("uniform").max()) < 135


def test_zipf_routing_is_steep_and_reaches_every_expert() -> None:
    count = loads("zipf").sort(descending=True).values
    assert int(count[0]) > 5 * int(count[-1])
    assert int(count[-1]) > 0


def test_one_hot_routing_takes_one_expert_for_all() -> None:
    count = loads("one_hot")
    assert int((count == 403).sum()) == 1
    assert int(count.min()) > 0


def test_one_rank_gets_everything() -> None:
    count = loads("one_rank")
    assert count.reshape(4, 4).sum(1).tolist() == [0, 0, 4 * 403, 0]


def test_few_experts_leave_the_rest_empty() -> None:
    assert int((loads("few_experts") > 0).sum()) == 8, "twice top-k"


def test_slots_are_not_sorted_by_expert() -> None:
    idx = torch.cat(routed("uniform"))
    assert 0.4 < float((idx[:, 0] < idx[:, 1]).float().mean()) < 0.6


# --- coverage of the gate's clamp-10 case -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make(MAIN)


@pytest.fixture(scope="module")
def activations(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """gate and up before the clamp, [n, 256] each: columns 0..127 and 640..767 of every sixth busy expert."""
    where = dispatch.routes(inputs.topk_idx)
    acts, acts_sf = dispatch.pull(inputs.x, inputs.x_sf, where)
    inter, gates, ups = MAIN.shape.intermediate, [], []
    for e in where.expert.unique().tolist()[::6]:
        rows = where.of_expert(e)
        w1, w1_sf, _, _ = inputs.weights(e)
        halves = []
        for block in (0, 5):
            columns, up = slice(128 * block, 128 * (block + 1)), inter // 128 + block
            w = torch.cat([w1[columns], w1[inter:][columns]])
            w_sf = torch.cat([w1_sf[block : block + 1], w1_sf[up : up + 1]])
            halves.append(gemm.l1(MAIN.recipe, acts[rows], acts_sf[rows], w, w_sf, twin.arith("cpu")))
        gates.append(torch.cat([half[0] for half in halves], 1))
        ups.append(torch.cat([half[1] for half in halves], 1))
    return torch.cat(gates), torch.cat(ups)


def test_the_case_is_the_clamp_10_one() -> None:
    assert (MAIN.recipe, sum(MAIN.tokens)) == (RECIPES["default"], 64)


def test_the_clamp_binds_on_all_sides(activations: tuple[Tensor, Tensor]) -> None:
    """At least 1 % of the elements beyond, and within, each of the sides; below -10 a gate is left alone."""
    gate, up = activations
    assert gate.numel() > 10_000
    sides = {
        "gate above": gate > 10,
        "gate within": gate.abs() < 10,
        "gate below": gate < -10,
        "up above": up > 10,
        "up within": up.abs() < 10,
        "up below": up < -10,
    }
    shares = {name: float(side.float().mean()) for name, side in sides.items()}
    assert min(shares.values()) >= 0.01, shares


def test_gates_below_minus_90_exist(activations: tuple[Tensor, Tensor]) -> None:
    """Where fast silu gives -0 and precise silu a tiny number or -0."""
    gate, _ = activations
    assert float((gate < -90).float().mean()) > 0.005
    assert int(((gate < -87.4) & (gate > -88.7)).sum()) > 0, "where the two modes differ"


def test_zero_rows_and_zero_groups(inputs: Inputs, activations: tuple[Tensor, Tensor]) -> None:
    """Tokens of zeros, and 64-groups that are zero in other tokens."""
    rows = torch.cat(inputs.x)
    zero = (rows == 0).all(1)
    assert int(zero.sum()) == sum(TOKEN_CLASSES[t % 8] == "zero" for t in range(64)) == 8
    gate, up = activations
    v = swiglu.activate(MAIN.recipe, gate, up, torch.ones(len(gate)), twin.arith("cpu"))
    groups = (v.unflatten(1, (-1, 64)) == 0).all(2)
    live = ~(gate == 0).all(1)
    assert int(groups[live].sum()) > 0
    assert int((~groups[live]).sum()) > 0
    assert int((~live).sum()) > 0


def test_codes_of_the_tokens(inputs: Inputs) -> None:
    x = torch.cat(inputs.x)
    magnitude = x & 0x7F
    assert int((magnitude == 0x7F).sum()) == 0, "no NaN"
    assert set(range(0x7F)) == set(magnitude.unique().tolist()), "every finite magnitude, 448 among them"
    subnormal = ((magnitude < 8).all(1)) & (magnitude != 0).any(1)
    assert int(subnormal.sum()) == 8, "rows of subnormals alone"
    assert int((x == 0x80).sum()) > 0, "a negative zero"
    assert 0.4 < float((x[magnitude > 0] >= 0x80).float().mean()) < 0.6


def test_codes_of_the_weights(inputs: Inputs) -> None:
    for e in (0, 3):
        w1, _, w2, _ = inputs.weights(e)
        for w in (w1, w2):
            assert int(((w & 0x7F) == 0x7F).sum()) == 0, "no NaN"
            assert len(w.unique()) > (150 if e == 3 else 40)


def test_routing_weights(inputs: Inputs) -> None:
    weight = torch.cat(inputs.topk_weights).reshape(-1)
    counts = {"negative": int((weight < 0).sum()), "zero": int((weight == 0).sum()), "all": len(weight)}
    assert counts["all"] == 384
    assert counts["negative"] > 25
    assert counts["zero"] > 10
    other = weight[weight != 0]
    assert len(other.unique()) == len(other), "every slot another weight"
    assert float(other.abs().max()) <= 1


def scale_grids(inputs: Inputs) -> dict[str, Tensor]:
    _, w1_sf, _, w2_sf = inputs.weights(3)
    return {"w1_sf": w1_sf, "w2_sf": w2_sf, "x_sf": torch.cat(inputs.x_sf)}


@pytest.mark.parametrize("name", ["w1_sf", "w2_sf", "x_sf"])
def test_scales_differ_from_block_to_block(inputs: Inputs, name: str) -> None:
    """No two rows and no two columns of blocks are alike, and what is no power of two never comes twice."""
    grid = scale_grids(inputs)[name]
    assert bool((grid > 0).all())
    assert bool(torch.isfinite(grid).all())
    for lines in (grid, grid.t()):
        assert len(lines.unique(dim=0)) == len(lines)
    powers = f32_bits(grid) & 0x7FFFFF == 0
    assert 0.15 < float(powers.float().mean()) < 0.35, "powers of two and others"
    others = grid[~powers]
    assert len(others.unique()) == len(others) or name == "x_sf"  # a hot token's scales are 16 times another's at most


@pytest.mark.parametrize("name", ["w1_sf", "w2_sf", "x_sf"])
def test_neighbouring_blocks_have_different_scales(inputs: Inputs, name: str) -> None:
    """suite.md: scales differ in every block. A kernel that reads its neighbour's must be wrong everywhere."""
    grid = scale_grids(inputs)[name]
    assert int((grid[1:] == grid[:-1]).sum()) == 0, "a block and the one below"
    assert int((grid[:, 1:] == grid[:, :-1]).sum()) == 0, "a block and the one beside"


def test_scales_differ_between_experts(inputs: Inputs) -> None:
    one, other = inputs.weights(1), inputs.weights(2)
    assert float((one[1] == other[1]).float().mean()) < 0.1
    assert float((one[3] == other[3]).float().mean()) < 0.1


def test_sums_reach_the_truncation_of_the_tensor_core(inputs: Inputs) -> None:
    """K = 128 chains of plain tokens: few equal the correctly rounded dot product, so a float32 matmul is caught."""
    x, (w1, *_) = torch.cat(inputs.x)[1::8, :128], inputs.weights(0)
    w = w1[1024:1280, :128]
    chain = atoms.wgmma_chain(x, w)
    exact = atoms.decode_e4m3(x).double() @ atoms.decode_e4m3(w).double().t()
    assert float((chain == exact.float()).float().mean()) < 0.1
    assert float(((chain - exact).abs() <= 2.0**-9 * exact.abs().max()).float().mean()) == 1.0


def test_lattice_operands_are_the_exact_ones() -> None:
    """Codes -1, 0, 1; scales and routing weights powers of two."""
    made = make(next(case for case in SMOKE if case.family == "lattice"))
    w1, w1_sf, w2, w2_sf = made.weights(0)
    for codes in (*made.x, w1, w2):
        assert set(codes.unique().tolist()) <= {0, 0x38, 0xB8}
    for values in (*made.x_sf, w1_sf, w2_sf, *made.topk_weights):
        assert int((f32_bits(values) & 0x7FFFFF).sum()) == 0
