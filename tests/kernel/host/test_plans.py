"""Launch plans of `fp8_mega_moe`: what a repeated call does not do again, and what it must."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from megaproof.kernel import api
from megaproof.kernel.host import checks, plans
from megaproof.kernel.host.sizes import ConfigError
from megaproof.kernel.host.transformed import TransformedWeights
from megaproof.quant.recipe import Recipe
from megaproof.tests.support.fake_call import BF16, CAPACITY, HIDDEN, FakeLibrary, call, installed, weights


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return installed(monkeypatch)


def test_the_same_call_encodes_nothing_again(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    good = call(2)
    api.fp8_mega_moe(**good)
    assert library.encoded == 4
    others = [torch.zeros(t, HIDDEN, dtype=BF16) for t in (0, CAPACITY)]
    monkeypatch.setattr(api, "TIMEOUT_S", 0.5)
    api.fp8_mega_moe(**good | {"y": others, "cumulative_local_expert_recv_stats": None})
    api.fp8_mega_moe(**good)
    assert library.encoded == 4
    assert len(good["sym_buffer"].plans) == 1
    first, second, third = [params for _, params, _ in library.launches]
    assert [own.num_tokens for own in second.ranks[:2]] == [0, CAPACITY]
    assert second.ranks[1].outputs.y_ptr == others[1].data_ptr()
    assert second.ranks[1].outputs.stats_ptr is None
    assert (first.barrier.timeout_ns, second.barrier.timeout_ns) == (10_000_000_000, 500_000_000)
    third.barrier.timeout_ns = first.barrier.timeout_ns
    assert bytes(third) == bytes(first)


def test_other_weights_and_recipes_have_their_own_plan(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    good, (l1, l2) = call(), weights()
    for options in ({}, {"l1_weights": l1}, {"l2_weights": l2}, {}, {"fast_math": False}, {}):
        api.fp8_mega_moe(**good | options)
    assert len(good["sym_buffer"].plans) == 3
    first, second, third, again, precise, last = [params.ranks[0] for _, params, _ in library.launches]
    assert second.weights.w1_ptr == l1[0].data_ptr() != first.weights.w1_ptr
    assert (second.weights.w2_ptr, second.weights.w1_sf_ptr) == (first.weights.w2_ptr, l1[1].data_ptr())
    assert third.weights.w2_ptr == l2[0].data_ptr()
    assert bytes(first) == bytes(again) == bytes(precise) == bytes(last)
    assert [name for name, *_ in library.launches].count("moe_precise") == 1
    kept = good["sym_buffer"].plans
    assert [key[0] for key in kept] == ["fast", "precise", "fast"]
    assert all(l1[0].data_ptr() not in key for key in kept), "the plan that was made first went first"
    assert library.encoded == 2  # of the buffer alone


def test_a_granularity_has_its_own_plan_and_cubin(library: FakeLibrary) -> None:
    good = call()
    for granularity in (64, 128, 64, 128, 128):
        api.fp8_mega_moe(**good, recipe=Recipe(activation_granularity=granularity))
    assert library.granularities == [64, 128, 64, 128, 128]
    assert len(good["sym_buffer"].plans) == 2
    assert len({bytes(params) for _, params, _ in library.launches}) == 1, "all else of a launch is shared"


def test_the_program_is_looked_up_at_every_call(library: FakeLibrary) -> None:
    good, other = call(), FakeLibrary()
    api.fp8_mega_moe(**good)
    good["sym_buffer"].program = other.program
    api.fp8_mega_moe(**good)
    assert (len(library.launches), len(other.launches)) == (1, 1)


def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checks that are made from now on."""
    made: list[str] = []
    for name in ("check_weights", "check_outputs"):
        check = getattr(checks, name)
        monkeypatch.setattr(checks, name, lambda *args, n=name, c=check: (made.append(n), c(*args)))
    return made


def other_object(value: Any) -> Any:
    """The same memory in the same form, nested lists included, as objects that nobody has seen."""
    if isinstance(value, TransformedWeights):
        return type(value)(*map(other_object, value))
    return type(value)(map(other_object, value)) if isinstance(value, list | tuple) else value.view(value.shape)


@pytest.mark.parametrize("ranks", [None, 2])
def test_what_was_judged_is_not_judged_again(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, ranks: int | None
) -> None:
    good, made = call(ranks), judged(monkeypatch)
    api.fp8_mega_moe(**good)
    assert made == ["check_weights", "check_outputs"]
    for argument in good.keys() - {"sym_buffer"}:
        for _ in range(2):
            api.fp8_mega_moe(**good | {argument: other_object(good[argument])})
    api.fp8_mega_moe(**good | {"y": [y[:1] for y in good["y"]] if ranks else good["y"][:1]})
    assert made == ["check_weights", "check_outputs", "check_outputs"]
    assert library.launches[-1][1].ranks[0].num_tokens == 1
    assert bytes(library.launches[0][1]) == bytes(library.launches[-2][1])


def test_outputs_that_come_again_are_not_judged_again(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several y in turn, as an allocator gives them; the ones that were judged longest ago are forgotten."""
    monkeypatch.setattr(plans, "MAX_OUTPUTS", 3)
    good, made = call(), judged(monkeypatch)
    ys = [torch.zeros(3, HIDDEN, dtype=BF16) for _ in range(4)]
    for step in (0, 1, 2, 1, 0, 0, 2):
        api.fp8_mega_moe(**good | {"y": ys[step]})
        assert library.launches[-1][1].ranks[0].outputs.y_ptr == ys[step].data_ptr()
    assert made.count("check_outputs") == 3
    for step in (3, 0, 0):
        api.fp8_mega_moe(**good | {"y": ys[step]})
    assert made.count("check_outputs") == 5
    (plan,) = good["sym_buffer"].plans.values()
    assert len(plan.outputs) == 3
    narrow = ys[0].view(torch.int16)
    with pytest.raises(ConfigError, match=r"y is torch.int16 \[3, 256\]"):
        api.fp8_mega_moe(**good | {"y": narrow})


@pytest.mark.parametrize("part", [0, 1], ids=["codes", "scales"])
@pytest.mark.parametrize("argument", ["l1_weights", "l2_weights"])
def test_another_tensor_at_the_same_address_is_judged(library: FakeLibrary, argument: str, part: int) -> None:
    """Memory that was freed and given to other sizes looks like this: the address of a plan, another object."""
    good = call()
    api.fp8_mega_moe(**good)
    pair = list(good[argument])
    shape = pair[part].shape
    for wrong in (pair[part][1:].new_empty(0).set_(pair[part][:3]), pair[part].view(torch.int8).view(shape[0], -1)):
        assert wrong.data_ptr() == pair[part].data_ptr()
        changed_pair = TransformedWeights(*pair[:part], wrong, *pair[part + 1 :])
        with pytest.raises(ConfigError, match=f"{argument}.* is torch"):
            api.fp8_mega_moe(**good | {argument: changed_pair})
    assert len(library.launches) == 1


def test_weights_that_are_freed_are_not_kept(library: FakeLibrary) -> None:
    good = call(2)
    api.fp8_mega_moe(**good)
    watched = [weakref.ref(tensor) for name in ("l1_weights", "l2_weights") for pair in good[name] for tensor in pair]
    watched += [weakref.ref(tensor) for tensor in (*good["y"], *good["cumulative_local_expert_recv_stats"])]
    buffer = good.pop("sym_buffer")
    good.clear()
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)
    for _ in range(3):  # whatever the allocator gives now
        fresh = call(2) | {"sym_buffer": buffer}
        api.fp8_mega_moe(**fresh)
        own, (w1, w1_sf) = library.launches[-1][1].ranks[1], fresh["l1_weights"][1]
        assert (own.weights.w1_ptr, own.weights.w1_sf_ptr) == (w1.data_ptr(), w1_sf.data_ptr())
        assert own.outputs.y_ptr == fresh["y"][1].data_ptr()
        del fresh


def test_tensors_that_change_in_place_are_seen(library: FakeLibrary) -> None:
    good = call()
    y, (w1, w1_sf), stats = good["y"], good["l1_weights"], good["cumulative_local_expert_recv_stats"]
    api.fp8_mega_moe(**good)
    address = y.data_ptr()
    y.resize_(2, HIDDEN)
    api.fp8_mega_moe(**good)
    assert y.data_ptr() == address
    for tensor in (w1, w1_sf, y, stats):
        tensor.data = tensor.clone()
        api.fp8_mega_moe(**good)
    own = library.launches[-1][1].ranks[0]
    assert [params.ranks[0].num_tokens for _, params, _ in library.launches] == [3, *[2] * 5]
    assert (own.weights.w1_ptr, own.weights.w1_sf_ptr) == (w1.data_ptr(), w1_sf.data_ptr())
    assert (own.outputs.y_ptr, own.outputs.stats_ptr) == (y.data_ptr(), stats.data_ptr())
    for tensor, argument in ((w1, "l1_weights"), (y, "y"), (stats, "cumulative_local_expert_recv_stats")):
        before = tensor.data
        tensor.data = before.new_zeros(before.shape[0] + 9, *before.shape[1:])
        with pytest.raises(ConfigError, match=f"{argument} (is|has) "):
            api.fp8_mega_moe(**good)
        tensor.data = before
        api.fp8_mega_moe(**good)
    y.resize_(2, HIDDEN // 2)
    with pytest.raises(ConfigError, match=r"y is torch.bfloat16 \[2, 128\]"):
        api.fp8_mega_moe(**good)


def test_stats_come_and_go(library: FakeLibrary) -> None:
    good = call(2)
    name = "cumulative_local_expert_recv_stats"
    first, second = good[name]
    for stats in ([first, second], None, [None, second], [first, None], [second, first], [None, None], None):
        api.fp8_mega_moe(**good | {name: stats})
        wanted = [None if counts is None else counts.data_ptr() for counts in stats or [None, None]]
        assert [own.outputs.stats_ptr for own in library.launches[-1][1].ranks[:2]] == wanted
    with pytest.raises(ConfigError, match="recv_stats has 0 entries"):
        api.fp8_mega_moe(**good | {name: []})


def test_the_current_device_must_be_the_buffers(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    good = call()
    api.fp8_mega_moe(**good)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(ConfigError, match="sym_buffer is on cuda:0; it must be on the current device, cuda:1"):
        api.fp8_mega_moe(**good)
