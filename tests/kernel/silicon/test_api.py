"""The host side of `fp8_mega_moe` on a GPU: cost of a call, plans that follow arguments, order, CUDA graphs."""

from __future__ import annotations

import math
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaproof.cases import inputs
from megaproof.cases.cases import SMOKE
from megaproof.kernel import api
from megaproof.kernel.host.sizes import ConfigError
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.megaproof import MegaproofAdapter
from megaproof.reference.layer import moe_layer


def ready(smoke: int) -> tuple[MegaproofAdapter, dict[str, Any], list[Tensor]]:
    """(adapter, arguments of the call, expected y by rank) of a smoke case."""
    case = SMOKE[smoke]
    made = inputs.make(case, "cuda")
    expected = moe_layer(case.recipe, *made.arguments(), experts=case.shape.experts).y
    adapter = MegaproofAdapter()
    adapter.prepare(Prepared(case, made, torch.device("cuda")))
    l1s, l2s = map(list, zip(*adapter.weights, strict=True))
    names = {"y": adapter.outputs, "l1_weights": l1s, "l2_weights": l2s, "sym_buffer": adapter.buffer}
    return adapter, names | {"recipe": case.recipe}, expected


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a.view(torch.int16), b.to(a.device).view(torch.int16)) for a, b in pairs)


@pytest.mark.clock
@pytest.mark.gpu
@pytest.mark.parametrize("smoke", [0, 3], ids=["one_rank", "eight_ranks"])
def test_host_cost(smoke: int) -> None:
    _, arguments, _ = ready(smoke)
    calls = [arguments, arguments | {"y": [y.clone() for y in arguments["y"]]}]
    costs = []  # of the quietest 50 calls, since a host has neighbours
    for what, step in (("the same y", 0), ("another y", 1)):
        batches = []
        for _ in range(42):
            torch.cuda.synchronize()  # or the host waits for room in the queue
            batch = []
            for turn in range(50):
                passed = calls[turn * step % 2]
                start = time.perf_counter_ns()
                api.fp8_mega_moe(**passed)
                batch.append((time.perf_counter_ns() - start) / 1e3)
            batches.append(batch)
        kept = batches[2:]
        every = statistics.median(us for batch in kept for us in batch)
        costs.append(min(map(statistics.median, kept)))
        print(f"host cost of a call with {what}: {every:.1f} us; of the quietest 50 calls {costs[-1]:.1f}")
    arguments["sym_buffer"].check()
    assert smoke or max(costs) < 15


@pytest.mark.gpu
@pytest.mark.parametrize("smoke", [0, 3], ids=["one_rank", "eight_ranks"])
def test_plans_follow_their_arguments(smoke: int) -> None:
    _, arguments, expected = ready(smoke)
    buffer, first = arguments["sym_buffer"], arguments["y"]

    def launched(**changes: Any) -> list[Tensor]:
        y = changes.pop("y", None) or [torch.full_like(y, math.nan) for y in first]
        api.fp8_mega_moe(**arguments | {"y": y} | changes)
        buffer.check()
        return y

    assert equal(launched(y=first), expected)
    assert equal(launched(), expected)
    fewer = launched(y=[torch.full_like(y[:-1], math.nan) for y in first])
    assert equal(fewer, [y[:-1] for y in expected])
    copies = [api.TransformedWeights.adopt(w2.clone(), 2 * w2_sf) for w2, w2_sf in arguments["l2_weights"]]
    doubled = [2 * y for y in expected]
    assert equal(launched(l2_weights=copies), doubled)
    assert equal(launched(), expected)
    for _, w2_sf in copies:
        w2_sf.mul_(0.5)
    assert equal(launched(l2_weights=copies), expected)
    assert len(buffer.plans) == 2


@pytest.mark.gpu
def test_a_thread_that_never_used_the_device() -> None:
    _, arguments, expected = ready(0)
    api.fp8_mega_moe(**arguments)
    torch.cuda.synchronize()
    arguments["y"][0].fill_(math.nan)
    torch.cuda.synchronize()
    thread = threading.Thread(target=api.fp8_mega_moe, kwargs=arguments)
    thread.start()
    thread.join()
    arguments["sym_buffer"].check()
    assert equal(arguments["y"], expected)


def blank(ys: list[Tensor]) -> list[Tensor]:
    return [torch.full_like(y, math.nan) for y in ys]


@pytest.mark.gpu
@pytest.mark.parametrize("smoke", [0, 3], ids=["one_rank", "eight_ranks"])
def test_streams_take_turns_on_one_buffer(smoke: int) -> None:
    """The caller puts nothing in order: the buffer's launches wait for each other, and the host for none of them."""
    _, arguments, expected = ready(smoke)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    api.fp8_mega_moe(**arguments)  # loads the kernel
    torch.cuda.synchronize()
    made = []
    for turn in range(60):
        with torch.cuda.stream(streams[turn % 3]):
            made.append(blank(arguments["y"]))
            api.fp8_mega_moe(**arguments | {"y": made[-1]})
    arguments["sym_buffer"].check()
    assert [turn for turn, ys in enumerate(made) if not equal(ys, expected)] == []


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True], ids=["one stream", "a stream each"])
def test_threads_share_a_buffer(own_stream: bool) -> None:
    """Each thread gets every one of its own y, of its own number of tokens."""
    _, arguments, expected = ready(3)
    torch.cuda.synchronize()
    wrong: list[str] = []

    def launches(thread: int) -> None:
        stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            for turn in range(50):
                keep = [max(0, len(y) - (thread + turn) % 3) for y in expected]
                ys = blank([y[:n] for y, n in zip(arguments["y"], keep, strict=True)])
                api.fp8_mega_moe(**arguments | {"y": ys})
                stream.synchronize()
                if turn % 10 == 0:
                    arguments["sym_buffer"].check()
                if not all(not y.isnan().all() or not y.numel() for y in ys):
                    wrong.append(f"thread {thread}, launch {turn}: a y was not written")

    threads = [threading.Thread(target=launches, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    arguments["sym_buffer"].check()
    api.fp8_mega_moe(**arguments)
    arguments["sym_buffer"].check()
    assert equal(arguments["y"], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("smoke", [0, 3], ids=["one_rank", "eight_ranks"])
def test_launches_of_one_graph_are_in_order(smoke: int) -> None:
    """A capture that forks: launches of both streams are edges of the graph. Eager ones, before and after, go on."""
    _, arguments, expected = ready(smoke)
    buffer, side = arguments["sym_buffer"], torch.cuda.Stream()
    with torch.cuda.stream(side):
        api.fp8_mega_moe(**arguments)
    buffer.check()
    captured = [blank(arguments["y"]) for _ in range(4)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        begun = torch.cuda.current_stream()
        side.wait_stream(begun)
        for turn, ys in enumerate(captured):
            with torch.cuda.stream(side if turn % 2 else begun):
                api.fp8_mega_moe(**arguments | {"y": ys})
        begun.wait_stream(side)
    for _ in range(20):
        for ys in captured:
            for y in ys:
                y.fill_(math.nan)
        graph.replay()
        buffer.check()
        assert all(equal(ys, expected) for ys in captured)
    for stream in (side, torch.cuda.current_stream()):
        with torch.cuda.stream(stream):
            ys = blank(arguments["y"])
            api.fp8_mega_moe(**arguments | {"y": ys})
            buffer.check()
        assert equal(ys, expected)


@pytest.mark.gpu
def test_weights_come_back_from_a_file(tmp_path: Path) -> None:
    _, arguments, expected = ready(0)
    names = ("l1_weights", "l2_weights")
    held = {f"{name}.{part}": t for name in names for part, t in arguments[name][0]._asdict().items()}
    save_file(held, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors", device="cuda")
    adopt = api.TransformedWeights.adopt
    restored = {name: [adopt(loaded[f"{name}.codes"], loaded[f"{name}.scales"])] for name in names}
    ys = blank(arguments["y"])
    api.fp8_mega_moe(**arguments | restored | {"y": ys})
    arguments["sym_buffer"].check()
    assert equal(ys, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("smoke", [0, 3], ids=["one_rank", "eight_ranks"])
def test_a_graph_replays_what_eager_computes(smoke: int) -> None:
    adapter, arguments, expected = ready(smoke)
    buffer, captured = arguments["sym_buffer"], arguments["y"]
    api.fp8_mega_moe(**arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        api.fp8_mega_moe(**arguments)
        with pytest.raises(ConfigError, match="check = True reads indices back"):
            api.fp8_mega_moe(**arguments, check=True)
    eager = [torch.empty_like(y) for y in captured]
    generator = torch.Generator(device="cuda").manual_seed(1)
    for replay in range(100):
        for y in (*captured, *eager):
            y.fill_(math.nan)
        if replay:
            for rank, tokens in enumerate(SMOKE[smoke].tokens):
                views = buffer.rank(rank)
                order = torch.randperm(tokens, device="cuda", generator=generator)
                views.topk_idx[:tokens] = views.topk_idx[:tokens][order].roll(1, 0)
                views.x.view(torch.uint8)[:tokens] = views.x.view(torch.uint8)[:tokens][order]
                views.x_sf[:tokens] = views.x_sf[:tokens][order]
        api.fp8_mega_moe(**arguments | {"y": eager}, check=True)
        graph.replay()
        buffer.check()
        assert equal(captured, eager)
        assert replay or equal(captured, expected)
    adapter.close()
