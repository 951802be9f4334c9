"""The inputs of every family: pinned bytes, the same from any device and arithmetic; routing; the ids of cases."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.cases.inputs import FAMILIES, ROUTINGS, Inputs, make, route
from megaproof.quant import atoms, twin
from megaproof.quant.recipe import RECIPES
from megaproof.quant.shapes import SHAPES, Shape
from megaproof.tests.support.threads import threads

SMOKE, FULL = SHAPES["smoke"], SHAPES["dsv4_flash"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def small(family: str) -> Case:
    return Case(SMOKE, (14, 0, 3), family=family, masked=30)


def full(family: str) -> Case:
    return Case(FULL, (2,) * 8, family=family)


# Family -> sha256 of inputs and of expert 3's weights, at smoke size and at full size.
PINNED: dict[str, tuple[str, str, str, str]] = {
    "mixed": (
        "4be89e6172b8f53cd20fbd10e46dd2560329c06b9ac625f1d50fc5397fc737a0",
        "b65b7f1e7fc66bf5dc5026cc958d719800b9e86b90c8b9ad97eda5683a60aec4",
        "b15e703e14ac4b4d87ff131c249dbee0245c97f36ea439f4f5f97c509d85767b",
        "7048b5fe99a9498de898ebc609cda16699a15e99dba05b785c6f6a2a018d22ad",
    ),
    "lattice": (
        "c24b7ba12652d3c5ae05432cdb1e0263c5daffe0bf886a081eb3a093aa0b67ab",
        "4a70182d1ba419a7dfcee1967a2f05ee433f79b723438bc5964411d865dd4e73",
        "ac70261406faf4cc32caa2aac7074242e669aa06294241ff9c6bbeef87f8e4cd",
        "c2dd0f5a3a6eae7a5a51f1dda823d2cae8e638185b52c14d8914d643222964bd",
    ),
    "gaussian": (
        "b9aba375b850bbdbfb5907419c41395c48868dd09decd9c93de72f8ecb7ca45e",
        "083ea9ceb5be3644545b2e067010615fde988f0a3859534583d1631bdff032e5",
        "c9da274262451aa96ab99b41254cba801779df7e19872ff0374b048fae607e4e",
        "70ae3207bc31b6cce6f37c277f3c9ac82f64fa46e2f774697bdaa69b695210bd",
    ),
    "heavy_tail": (
        "23bcbbabd11409ce02ee2190c2d48637700ddafb7db4f3644008cb74cbde80d5",
        "c2bee77c7dbbad6dcee07a098f51ec820cdab8cd30e023a46929cf8278708667",
        "e24350c02f3e65e8274dde6e2f84629f6e076b0ca1d3cb4d543e6921e8fc6c05",
        "5b4b90429e96b5b1ab72a843dc380a9cea5e0f2ce6078bd12eef864f8681d57d",
    ),
    "adversarial": (
        "ec63581cdfcd10355f9f53f6d4063ac2a26574d237df42736c8c6f19a9be5670",
        "674f0ff544887514dd37dc684a900beff338c25a46e481f1fe6ac54bb969701a",
        "1d651be717fbdf49223a4cdc0ba5683a18e9337d192a28409ce5c92be640eb11",
        "48354b19e8c226aaf36188913419eda40702cef722915b23891334c7f74b5387",
    ),
    "position": (
        "d9427e0ad8cb60bd26179fc52a9cd0d1b213c1b04accfa5c97525b94ab3cfaaf",
        "c582310df86125905f552802524fb68c1e45b778a6a9bcb72a6d2b1f648601c9",
        "691504322570ae8631c3366f76933f59891c0bcadd642a67a1e5e22d298ed41d",
        "33214b2245fd8aab4062e1b0211d0445444a5cc1ef7bdf55c6fdf6b5060e08cc",
    ),
}


# --- bytes ------------------------------------------------------------------------------------------------------------


def weights_sha256(made: Inputs, e: int) -> str:
    digest = hashlib.sha256()
    for tensor in made.weights(e).tensors():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_pinned(family: str, device: str) -> None:
    """The same on every machine, device and version of a library: goldens keep seed and hash only."""
    found: list[str] = []
    for case in (small(family), full(family)):
        made = make(case, device)
        found += [made.sha256(), weights_sha256(made, 3)]
    assert tuple(found) == PINNED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readable_generator_gives_the_same_inputs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "arith", lambda device="cpu": atoms)
    made = make(small(family))
    assert (made.sha256(), weights_sha256(made, 3)) == PINNED[family][:2]


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_what_the_layer_takes(family: str) -> None:
    case = small(family)
    made, shape = make(case), case.shape
    for rank, tokens in enumerate(case.tokens):
        for name, dtype, columns in (
            ("x", torch.uint8, shape.hidden),
            ("x_sf", torch.float32, shape.hidden // 128),
            ("topk_idx", torch.int64, shape.topk),
            ("topk_weights", torch.float32, shape.topk),
        ):
            tensor = getattr(made, name)[rank]
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, (tokens, columns)), name
            assert tensor.is_contiguous(), name
    for tensor in made.weights(0).tensors():
        assert tensor.is_contiguous()


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_rank_and_expert_make_a_difference(family: str) -> None:
    """Position-encoded tokens are the same in every seed but for their scales; their weights are not."""
    case = Case(SMOKE, (9, 9), family=family)
    one, again, other = make(case), make(case), make(replace(case, seed=case.seed + 1))
    names = ["topk_idx", "x", "x_sf"] + ([] if family == "position" else ["topk_weights"])
    for name in names:
        assert torch.equal(getattr(one, name)[1], getattr(again, name)[1]), name
        assert not torch.equal(getattr(one, name)[1], getattr(other, name)[1]), name
        assert not torch.equal(getattr(one, name)[1], getattr(one, name)[0]), name
    own, same, reseeded, neighbour = (m.weights(e).tensors() for m, e in ((one, 2), (again, 2), (other, 2), (one, 3)))
    for i in range(4):
        assert torch.equal(own[i], same[i])
        assert not torch.equal(own[i], reseeded[i])
        if (family, i) != ("lattice", 1):  # two exponents a block of rows: at this size two experts may be alike
            assert not torch.equal(own[i], neighbour[i])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_do_not_depend_on_when_they_are_asked_for(family: str) -> None:
    made = make(small(family))
    before = weights_sha256(made, 5)
    for e in (6, 5):
        for tensor in made.weights(e).tensors():
            tensor.zero_()
    assert weights_sha256(made, 5) == before
    assert weights_sha256(made, 6) != before


def test_the_digest_sees_every_input() -> None:
    for name in ("x", "x_sf", "topk_idx", "topk_weights"):
        made = make(small("mixed"))
        before = made.sha256()
        getattr(made, name)[0].view(torch.uint8)[-1, -1] ^= 1
        assert made.sha256() != before, name


@pytest.mark.parametrize("family", ["adversarial", "position"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": Shape("narrow", hidden=128, intermediate=128, experts=16, topk=2)}, "narrow"),
        ({"tokens": (5000,), "family": "position"}, "too many to encode"),
        ({"recipe": RECIPES["default"].replace(clamp=0.25), "family": "position"}, "clamp 0.25 flattens"),
    ],
)
def test_what_a_family_cannot_hold_is_refused(family: str, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(replace(Case(SMOKE, (1,), family=family), **change))


# --- ids --------------------------------------------------------------------------------------------------------------


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
