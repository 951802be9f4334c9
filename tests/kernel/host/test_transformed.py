"""Weights say their order: what does not is refused, and the order outlives what engines do with weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from megaproof.kernel import api
from megaproof.kernel.api import TransformedWeights
from megaproof.kernel.host.sizes import ConfigError
from megaproof.tests.support.fake_call import HIDDEN, INTER, FakeLibrary, call, installed, weights

NAMES = ("l1_weights", "l2_weights")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return installed(monkeypatch)


def transformed() -> tuple[TransformedWeights, TransformedWeights]:
    l1, l2 = weights()
    return api.transform_weights_for_mega_moe_sm90(tuple(l1), tuple(l2))


def launched(library: FakeLibrary, l1: Any, l2: Any, ranks: int | None = None) -> None:
    """A call, after which the launch has the addresses of these."""
    api.fp8_mega_moe(**call(ranks) | dict(zip(NAMES, (l1, l2), strict=True)))
    held = library.launches[-1][1].ranks[0].weights
    assert (held.w1_ptr, held.w1_sf_ptr, held.w2_ptr, held.w2_sf_ptr) == tuple(t.data_ptr() for t in (*l1, *l2))


def test_what_the_transform_returns_is_taken(library: FakeLibrary) -> None:
    l1, l2 = transformed()
    (codes, scales), (also_codes, _) = l1, l2
    assert (l1.codes, l1.scales, l2.codes) == (codes, scales, also_codes)
    assert (l1.matrix, l2.matrix) == ("l1", "l2")
    launched(library, l1, l2)


@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize("as_passed", [tuple, list], ids=["tuple", "list"])
@pytest.mark.parametrize("argument", NAMES)
def test_weights_that_do_not_say_their_order_are_refused(
    library: FakeLibrary, argument: str, as_passed: type, ranks: int | None
) -> None:
    """Before and after a call with the very same tensors."""
    good = call(ranks)
    for _ in range(2):
        value = good[argument]
        plain = as_passed(value) if ranks is None else [value[0], as_passed(value[1])]
        with pytest.raises(ConfigError, match=rf"^{argument}.* TransformedWeights\.adopt\(codes, scales\) .*$"):
            api.fp8_mega_moe(**good | {argument: plain})
        api.fp8_mega_moe(**good)
    assert len(library.launches) == 2


def test_transformed_weights_are_not_transformed_again() -> None:
    l1, l2 = transformed()
    raw = tuple(weights()[0]), tuple(weights()[1])
    adopted = TransformedWeights.adopt(*l2)
    for pair, name in (((l1, raw[1]), "l1"), ((raw[0], l2), "l2"), ((raw[0], adopted), "l2")):
        with pytest.raises(ConfigError, match=f"{name} is transformed already"):
            api.transform_weights_for_mega_moe_sm90(*pair)


def test_one_matrix_is_not_taken_for_the_other(library: FakeLibrary) -> None:
    """Of the same layer the shapes tell; of layers of other sizes, whose shapes are alike, the order does."""
    l1, l2 = transformed()
    with pytest.raises(ConfigError, match="l1_weights is what the transform made of l2; it must be made of l1"):
        launched(library, l2, l1)
    with pytest.raises(ConfigError, match=r"l1_weights is torch.float8_e4m3fn \[4, 256, 128\]; it must be"):
        launched(library, TransformedWeights.adopt(*l2), TransformedWeights.adopt(*l1))
    alike = type(l2)(*l1)
    assert alike.codes.shape == (4, 2 * INTER, HIDDEN)
    with pytest.raises(ConfigError, match="l1_weights is what the transform made of l2"):
        launched(library, alike, l2)
    assert not library.launches


def through_parameters(pair: TransformedWeights) -> TransformedWeights:
    module = nn.Module()
    module.codes, module.scales = nn.Parameter(pair.codes, requires_grad=False), nn.Parameter(pair.scales)
    return TransformedWeights.adopt(module.codes, module.scales)


def through_a_state_dict(pair: TransformedWeights) -> TransformedWeights:
    module, other = nn.Module(), nn.Module()
    for each in (module, other):
        for name, tensor in pair._asdict().items():
            each.register_buffer(name, tensor if each is module else torch.empty_like(tensor))
    other.load_state_dict(module.state_dict())
    return TransformedWeights.adopt(other.codes, other.scales)


def moved(pair: TransformedWeights) -> TransformedWeights:
    away = TransformedWeights(*(tensor.to("cpu", copy=True) for tensor in pair))
    return TransformedWeights.adopt(away.codes.to("cpu"), away.scales.to("cpu"))


TRIPS: dict[str, Callable[[TransformedWeights], TransformedWeights]] = {
    "Parameter": through_parameters,
    "state_dict": through_a_state_dict,
    "to": moved,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pytree": lambda pair: pytree.tree_map(Tensor.clone, pair),
    "_replace": lambda pair: pair._replace(scales=pair.scales.clone()),
}


@pytest.mark.parametrize("trip", TRIPS)
def test_the_order_outlives_a_round_trip(library: FakeLibrary, trip: str) -> None:
    pairs = [TRIPS[trip](pair) for pair in transformed()]
    for found, given in zip(pairs, transformed(), strict=True):
        assert isinstance(found, TransformedWeights)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, given, strict=True))
    launched(library, *pairs)


def test_weights_come_back_from_safetensors(library: FakeLibrary, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    l1, l2 = transformed()
    save_file(
        {f"{name}.{part}": t for name, pair in (("l1", l1), ("l2", l2)) for part, t in pair._asdict().items()}, path
    )
    loaded = load_file(path)
    with pytest.raises(ConfigError, match="adopt"):
        launched(library, *((loaded[f"{name}.codes"], loaded[f"{name}.scales"]) for name in ("l1", "l2")))
    pairs = [TransformedWeights.adopt(loaded[f"{name}.codes"], loaded[f"{name}.scales"]) for name in ("l1", "l2")]
    launched(library, *pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"codes": torch.zeros(4, 256, 256)},
            r"codes is torch.float32 \[4, 256, 256\]; it must be torch.float8_e4m3fn",
        ),
        ({"codes": torch.zeros(4, 256, 200).to(torch.float8_e4m3fn)}, "codes has 256 rows and 200 columns; both must"),
        ({"codes": torch.zeros(0, 256, 256).to(torch.float8_e4m3fn)}, "codes has 0 experts; it must have at least one"),
        ({"scales": torch.ones(4, 2, 1)}, r"scales are torch.float32 \[4, 2, 1\]; they must be .* \[4, 2, 2\]"),
        ({"scales": torch.ones(4, 2, 2, device="meta")}, "scales is on meta; it must be on a device with memory"),
    ],
    ids=["dtype", "columns", "experts", "scales", "meta"],
)
def test_what_cannot_be_adopted(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformedWeights.adopt(**transformed()[0]._asdict() | changes)


def test_what_an_engine_has_is_transformed() -> None:
    """Parameters, scales in another order of memory, codes that are a part: the same bytes, and contiguous."""
    (w1, w1_sf), (w2, w2_sf) = weights()
    w1 = torch.randint(0, 255, w1.shape, dtype=torch.uint8).view(w1.dtype)
    wanted = api.transform_weights_for_mega_moe_sm90((w1, w1_sf), (w2, w2_sf))
    other_order = w1_sf.mT.contiguous().mT
    part = torch.cat([w1.view(torch.uint8)] * 2, dim=2).view(w1.dtype)[:, :, : w1.shape[2]]
    assert [tensor.is_contiguous() for tensor in (other_order, part)] == [False, False]
    for l1 in ((nn.Parameter(w1), nn.Parameter(w1_sf)), (w1, other_order), [part, w1_sf]):
        found = api.transform_weights_for_mega_moe_sm90(l1, (w2, w2_sf))
        for pair, given in zip(found, wanted, strict=True):
            assert all(tensor.is_contiguous() for tensor in pair)
            assert torch.equal(pair.codes.view(torch.uint8), given.codes.view(torch.uint8))
            assert torch.equal(pair.scales, given.scales)
