"""Tensors that are no memory, or share it: what a launch would read or write elsewhere."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from megaproof.kernel import api
from megaproof.kernel.host.memory import check_apart
from megaproof.kernel.host.sizes import ConfigError
from megaproof.tests.support.fake_call import BF16, EXPERTS, HIDDEN, FakeLibrary, call, installed
from megaproof.tests.support.hostile import WITHOUT_MEMORY

STATS = "cumulative_local_expert_recv_stats"
PLACES = ["y", "l1_weights codes", "l1_weights scales", "l2_weights codes", "l2_weights scales", STATS]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return installed(monkeypatch)


def held(arguments: dict[str, Any], place: str) -> Tensor:
    argument, _, part = place.partition(" ")
    return getattr(arguments[argument], part) if part else arguments[argument]


def put(arguments: dict[str, Any], place: str, tensor: Tensor) -> dict[str, Any]:
    """The arguments with this tensor in a place."""
    argument, _, part = place.partition(" ")
    return arguments | {argument: arguments[argument]._replace(**{part: tensor}) if part else tensor}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_tensors_without_memory_are_refused_by_name(library: FakeLibrary, kind: str, place: str) -> None:
    good, argument = call(), place.split()[0]
    api.fp8_mega_moe(**good)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of some kinds that they are young or old
        wrong = WITHOUT_MEMORY[kind](held(good, place))
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"^{argument}.*; (it|its memory) must .*$"):
            api.fp8_mega_moe(**put(good, place, wrong))
    assert len(library.launches) == 1


@pytest.mark.parametrize("place", ["y", "l1_weights scales", "l2_weights scales"])
def test_a_lazy_negation_is_refused(library: FakeLibrary, place: str) -> None:
    """At the address and of the form of a tensor that is in order."""
    good = call()
    api.fp8_mega_moe(**good)
    with pytest.raises(ConfigError, match=f"{place.removesuffix(' codes')} is a lazy negation .* resolve_neg"):
        api.fp8_mega_moe(**put(good, place, torch._neg_view(held(good, place))))
    l1, l2 = (tuple(good[name]) for name in ("l1_weights", "l2_weights"))
    with pytest.raises(ConfigError, match="l1 scales is a lazy negation"):
        api.transform_weights_for_mega_moe_sm90((l1[0], torch._neg_view(l1[1])), l2)


@pytest.mark.parametrize("transform", ["vmap", "functionalize", "jvp", "grad"])
def test_tensors_inside_a_function_transform_are_refused(library: FakeLibrary, transform: str) -> None:
    good = call()
    said = []

    def layer(y: Tensor) -> Tensor:
        with pytest.raises(ConfigError) as error:
            api.fp8_mega_moe(**good | {"y": y})
        said.append(str(error.value))
        return y.sum()

    ys = torch.zeros(2, 3, HIDDEN, dtype=BF16)
    if transform == "vmap":
        torch.func.vmap(layer)(ys)
    elif transform == "functionalize":
        torch.func.functionalize(layer)(ys[0])
    elif transform == "jvp":
        torch.func.jvp(layer, (ys[0],), (ys[1],))
    else:
        torch.func.grad(layer)(ys[0])
    assert len(said) == 1
    assert said[0].startswith("y ")
    assert not library.launches


def test_y_that_requires_grad_is_refused(library: FakeLibrary) -> None:
    """A new one, and one that was in order before it did."""
    good = call()
    api.fp8_mega_moe(**good)
    leaf = torch.zeros(3, HIDDEN, dtype=BF16, requires_grad=True)
    for y in (leaf, 1 * leaf, torch.nn.Parameter(good["y"]), good["y"].requires_grad_()):
        with pytest.raises(ConfigError, match="y requires grad; it must not"), torch.no_grad():
            api.fp8_mega_moe(**good | {"y": y})
    assert len(library.launches) == 1


def test_weights_and_scales_may_be_parameters(library: FakeLibrary) -> None:
    """With requires_grad as they come: no gradient is recorded of anything."""
    good = call()
    for place in PLACES[1:5]:
        good = put(good, place, torch.nn.Parameter(held(good, place)))
    api.fp8_mega_moe(**good)
    assert library.launches[0][1].ranks[0].weights.w1_sf_ptr == good["l1_weights"].scales.data_ptr()
    assert not good["y"].requires_grad


# --- memory that is shared --------------------------------------------------------------------------------------------


def within(memory: Tensor, like: Tensor) -> Tensor:
    """The first bytes of contiguous memory as a tensor of this form."""
    return memory.flatten().view(torch.uint8)[: like.nbytes].view(like.dtype).view(like.shape)


@pytest.mark.parametrize("inside", PLACES[1:])
def test_y_in_what_is_read_or_written_is_refused(library: FakeLibrary, inside: str) -> None:
    good = call()
    room = torch.zeros(1 << 19, dtype=torch.uint8)
    good = put(good, inside, within(room, held(good, inside)).copy_(held(good, inside)))
    overlap = "|".join({inside.removesuffix(" codes"), "y"})
    for tokens in (1, 8):
        y = room[: 2 * tokens * HIDDEN].view(BF16).view(tokens, HIDDEN)
        with pytest.raises(ConfigError, match=f"^({overlap}) overlaps ({overlap}); what a launch writes"):
            api.fp8_mega_moe(**good | {"y": y})
    behind = room[1 << 18 :][: 2 * HIDDEN].view(BF16).view(1, HIDDEN)
    api.fp8_mega_moe(**good | {"y": behind})
    assert len(library.launches) == 1


@pytest.mark.parametrize("inside", PLACES[1:5])
def test_statistics_in_the_weights_are_refused(library: FakeLibrary, inside: str) -> None:
    good = call()
    counts = within(held(good, inside), good[STATS])
    with pytest.raises(ConfigError, match=f"{STATS} overlaps {inside.removesuffix(' codes')}; what a launch writes"):
        api.fp8_mega_moe(**good | {STATS: counts})
    assert not library.launches


def test_outputs_in_the_status_are_refused(library: FakeLibrary) -> None:
    good = call()
    counts = good["sym_buffer"].status[:EXPERTS]
    with pytest.raises(ConfigError, match=f"{STATS} overlaps sym_buffer's status; what a launch writes"):
        api.fp8_mega_moe(**good | {STATS: counts})
    assert not library.launches


@pytest.mark.parametrize("place", PLACES[2:5])
@pytest.mark.parametrize("field", ["slots", "l1_acts", "x"])
def test_weights_in_the_buffer_are_refused(library: FakeLibrary, place: str, field: str) -> None:
    """Whatever field it is: they would be written by the launch, or are in the way of the inputs."""
    good = call()
    buffer = good["sym_buffer"]
    like = held(good, place)
    begin = min(buffer.size.offsets()[0][field], buffer.bytes_per_rank - like.nbytes) // 16 * 16
    memory = buffer.storage[begin:]
    with pytest.raises(ConfigError, match=f"{place.removesuffix(' codes')} overlaps sym_buffer's memory of rank 0"):
        api.fp8_mega_moe(**put(good, place, within(memory, like)))
    assert not library.launches


def test_ranks_may_share_weights(library: FakeLibrary) -> None:
    good = call(2)
    api.fp8_mega_moe(**good | {name: [good[name][0]] * 2 for name in ("l1_weights", "l2_weights")})
    first, second = library.launches[0][1].ranks[:2]
    assert bytes(first.weights) == bytes(second.weights)


def test_apart() -> None:
    """Each pair of intervals [a, b) of a few bytes: refused where they share one and one of the two is written."""
    memory = torch.zeros(8, dtype=torch.uint8)
    parts = [(a, b) for a in range(6) for b in range(a, 6)]
    for a, b in parts:
        for c, d in parts:
            shared = max(a, c) < min(b, d)
            one, other = [("one", memory[a:b])], [("other", memory[c:d])]
            check_apart([], one + other)
            for written, read in ((one, other), (other, one), (one + other, [])):
                if shared:
                    with pytest.raises(ConfigError, match=r"(one|other) overlaps (one|other)"):
                        check_apart(written, read)
                else:
                    check_apart(written, read)


def test_an_overlap_behind_a_longer_neighbour_is_seen() -> None:
    """The one that is written begins inside the first, behind others that end before."""
    memory = torch.zeros(64, dtype=torch.uint8)
    read = [("long", memory[:60]), ("a", memory[2:4]), ("b", memory[6:8])]
    with pytest.raises(ConfigError, match="y overlaps long"):
        check_apart([("y", memory[50:52])], read)
    check_apart([("y", memory[60:])], read)
