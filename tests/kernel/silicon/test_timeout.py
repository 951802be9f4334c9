"""A role that waits in vain: it gives up within the time limit, says for what it waited, and leaves the GPU usable."""

from __future__ import annotations

import re
import time

import pytest
import torch

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.cases.compare import same
from megaproof.kernel import api
from megaproof.kernel.host.timeout import WAITS
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.megaproof import MegaproofAdapter
from megaproof.proof.faults import delays
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import SHAPES, Shape
from megaproof.reference.layer import moe_layer

LIMIT_S = 0.2
SOON_S = 20.0
"""A launch in which somebody waits in vain ends within LIMIT_S and the two seconds of a late role; the rest is for a
host that is busy. A hundred waits one after the other would take longer."""
MESSAGE = r"rank (\d+), thread block (\d+), ([a-z ]+) waited for ([a-zA-Z0-9 ]+): expected (\d+), saw (\d+)"


@pytest.mark.gpu
def test_a_block_that_comes_too_late_leaves_and_the_buffer_can_be_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have given up by the time that it begins; what is launched before `check` computes nothing."""
    case = Case(SHAPES["smoke"], (40,))
    made = inputs.make(case, "cuda")
    prepared = Prepared(case, made, torch.device("cuda"))
    adapter, late = MegaproofAdapter(), delays.program(delays.ABSENT)
    late.library()  # compiled before the clock starts
    adapter.prepare(prepared)
    assert adapter.buffer is not None
    l1, l2 = zip(*adapter.weights, strict=True)
    with monkeypatch.context() as patch:
        patch.setattr(api, "TIMEOUT_S", LIMIT_S)
        patch.setattr(adapter.buffer, "program", lambda _: late)
        api.fp8_mega_moe(adapter.outputs, l1, l2, adapter.buffer, adapter.counts, recipe=case.recipe)
    torch.cuda.synchronize()
    adapter.fill(0xFF)
    api.fp8_mega_moe(adapter.outputs, l1, l2, adapter.buffer, adapter.counts, recipe=case.recipe)
    torch.cuda.synchronize()
    assert bool((adapter.outputs[0].view(torch.int16) == -1).all()), "a launch after a failure has computed something"
    with pytest.raises(api.KernelTimeout, match="waited for"):
        adapter.buffer.check()
    wanted = moe_layer(case.recipe, *made.arguments(), experts=case.shape.experts)
    adapter.prepare(prepared)
    adapter.launch()
    same("y", wanted.y[0], adapter.y()[0])
    same("stats", wanted.stats[0], adapter.stats()[0])
    adapter.close()


@pytest.mark.clock
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [(40,), (4000,), (500,) * 8], ids=lambda tokens: f"r{len(tokens)}-t{tokens[0]}")
@pytest.mark.parametrize("lost", delays.LOST, ids=lambda lost: lost.id)
def test_who_waits_for_a_copy_that_does_not_come_gives_up(
    lost: delays.Lost, tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hardware has not been seen to lose one; a barrier that expects more bytes than come looks the same."""
    deep = Shape("deep", hidden=1536, intermediate=256, experts=16, topk=2)  # more stages than the ring has
    case = Case(deep, tokens)
    made = inputs.make(case, "cuda")
    prepared = Prepared(case, made, torch.device("cuda"))
    adapter, faulty = MegaproofAdapter(), delays.program(lost)
    faulty.library()  # compiled before the clock starts
    adapter.prepare(prepared)
    with monkeypatch.context() as patch:
        patch.setattr(api, "TIMEOUT_S", LIMIT_S)
        patch.setattr(adapter.buffer, "program", lambda _: faulty)
        start = time.perf_counter()
        with pytest.raises(api.KernelTimeout, match=lost.says) as caught:
            adapter.launch()
    seconds = time.perf_counter() - start
    print(f"after {seconds:.2f} s: {caught.value}")
    assert LIMIT_S < seconds < SOON_S
    adapter.prepare(prepared)
    adapter.launch()
    wanted = moe_layer(case.recipe, *made.arguments(), experts=case.shape.experts)
    for r in range(case.ranks):
        same(f"y of rank {r}", wanted.y[r], adapter.y()[r])
    adapter.close()


@pytest.mark.clock
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("ring_blocks", "granularity"),
    [(None, 64), (48, 64), (None, 128)],
    ids=["full_ring", "small_ring", "full_ring-g128"],
)
@pytest.mark.parametrize("tokens", [(4000,), (500,) * 8], ids=lambda tokens: f"r{len(tokens)}")
def test_who_waits_in_vain_gives_up_and_the_next_launch_is_right(
    tokens: tuple[int, ...], ring_blocks: int | None, granularity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(SHAPES["smoke"], tokens, Recipe(activation_granularity=granularity))
    made = inputs.make(case, "cuda")
    prepared = Prepared(case, made, torch.device("cuda"))
    stuck, fresh = MegaproofAdapter(ring_blocks), MegaproofAdapter(ring_blocks)
    stuck.prepare(prepared)
    assert stuck.buffer is not None
    late = delays.program(delays.STUCK, granularity)
    late.library()  # compiled before the clock starts
    with monkeypatch.context() as patch:
        patch.setattr(api, "TIMEOUT_S", LIMIT_S)
        patch.setattr(stuck.buffer, "program", lambda _: late)
        start = time.perf_counter()
        with pytest.raises(api.KernelTimeout) as caught:
            stuck.launch()
    seconds = time.perf_counter() - start
    print(f"after {seconds:.2f} s: {caught.value}")
    assert LIMIT_S < seconds < SOON_S, "the stuck role ends after two seconds by itself; who waits longer hangs"

    message = re.fullmatch(MESSAGE, str(caught.value))
    assert message, f"{caught.value} names no rank, block, role, counter, expected and seen value"
    rank, _, role, counter, expected, seen = message.groups()
    assert int(rank) < case.ranks
    assert (role, counter) in WAITS.values()
    assert expected != seen
    if case.ranks == 1:
        # Every block begins with a tile of GEMM 1, and nearly every pool block has a row of the stuck block.
        assert counter.removesuffix(" of a pool block") in ("rows", "GEMM 1 half tiles", "GEMM 2 half tiles")
        assert int(seen) < int(expected)
    stuck.buffer.check()  # raised once, then forgotten

    torch.cuda.synchronize()
    wanted = moe_layer(case.recipe, *made.arguments(), experts=case.shape.experts)
    for adapter in (stuck, fresh):  # the buffer of the launch that gave up can be used again
        adapter.prepare(prepared)
        adapter.fill(0xFF)
        adapter.launch()
        for r in range(case.ranks):
            same(f"y of rank {r}", wanted.y[r], adapter.y()[r])
            same(f"stats of rank {r}", wanted.stats[r], adapter.stats()[r])
        adapter.close()
