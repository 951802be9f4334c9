"""The API under the states that engines leave a process in: the same launch, or refused by name."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megaproof.kernel import api
from megaproof.kernel.host import values
from megaproof.kernel.host.buffer import BufferSize
from megaproof.tests.support.fake_call import BF16, FakeLibrary, call, installed, weights


@contextlib.contextmanager
def state(change: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.set_deterministic_debug_mode("error")  # as use_deterministic_algorithms(True), without inductor's import
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


LIBM = ctypes.CDLL(None)
STATES: dict[str, Callable[[], AbstractContextManager]] = {
    "as it is": contextlib.nullcontext,
    "flush denormal": lambda: state(torch.set_flush_denormal, True, False),
    "toward zero": lambda: state(LIBM.fesetround, 0xC00, 0),
    "default dtype bf16": lambda: state(torch.set_default_dtype, BF16, torch.float32),
    "default dtype fp64": lambda: state(torch.set_default_dtype, torch.float64, torch.float32),
    "default device meta": lambda: state(torch.set_default_device, "meta", None),
    "in a device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", BF16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "one thread": lambda: state(torch.set_num_threads, 1, torch.get_num_threads()),
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return installed(monkeypatch)


def pairs() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weights whose bytes are all different from their neighbours'."""
    (w1, w1_sf), (w2, w2_sf) = weights()
    codes = (torch.arange(w.numel()).remainder(251).to(torch.uint8).view(w.shape).view(w.dtype) for w in (w1, w2))
    return (next(codes), w1_sf), (next(codes), w2_sf)


def raw(pair: tuple[Tensor, Tensor]) -> list[bytes]:
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in pair]


@pytest.mark.parametrize("name", [name for name in STATES if name != "fake tensors"])
def test_weights_are_transformed_to_the_same_bytes(name: str) -> None:
    given = pairs()
    wanted = [raw(pair) for pair in api.transform_weights_for_mega_moe_sm90(*given)]
    with STATES[name]():
        found = api.transform_weights_for_mega_moe_sm90(*given)
    assert [raw(pair) for pair in found] == wanted


def test_weights_are_not_transformed_to_no_bytes() -> None:
    given = pairs()
    for allowed in (True, False):
        with (
            FakeTensorMode(allow_non_fake_inputs=allowed),
            pytest.raises(api.ConfigError, match=r"l1 .* FakeTensorMode"),
        ):
            api.transform_weights_for_mega_moe_sm90(*given)


@pytest.mark.parametrize("name", [name for name in STATES if name != "fake tensors"])
def test_a_buffer_is_zero_and_can_be_written_in_any_state(library: FakeLibrary, name: str) -> None:
    size = BufferSize(1, 4, 2, 256, 128, 8)
    with STATES[name]():
        buffer = api.SymmBuffer(None, size, torch.device("cpu"))
        buffer.topk_weights[:1] = 1.0
    buffer.topk_weights[1:2] = 1.0
    with torch.inference_mode():
        buffer.topk_weights[2:3] = 1.0
    views = [buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights]
    assert [view.dtype for view in views] == [torch.float8_e4m3fn, torch.float32, torch.int64, torch.float32]
    assert int(buffer.storage.count_nonzero()) == 2 * buffer.topk_weights[:3].numel()


CLAMPS = (None, 10.0, 0.1, 1e-40, 1e-45, 1e-320)
"""The last three are denormal: as float32 and as float64."""


@pytest.mark.parametrize("name", ["as it is", "flush denormal", "toward zero"])
def test_a_negative_clamp_is_refused_however_small(name: str) -> None:
    values._resolved.cache_clear()
    with STATES[name](), pytest.raises(api.ConfigError, match="activation_clamp = -1e-320 must be"):
        values.resolve(values.BLOCKS, -1e-320, None)


@pytest.mark.parametrize("name", STATES)
def test_a_launch_is_the_same(library: FakeLibrary, name: str) -> None:
    """First ones, whose plan is made in that state, and later ones; with indices read back where that can be."""
    check = name != "fake tensors"
    for clamp in CLAMPS:
        good = call(2)
        api.fp8_mega_moe(**good, activation_clamp=clamp)
        good["sym_buffer"].plans.clear()
        with STATES[name]():
            for _ in range(2):
                api.fp8_mega_moe(**good, activation_clamp=clamp, check=check)
        first, *others = [bytes(params) for _, params, _ in library.launches]
        assert others == [first, first], f"clamp {clamp}"
        library.launches.clear()


def test_wrong_indices_are_seen_in_any_state(library: FakeLibrary) -> None:
    for name in STATES.keys() - {"fake tensors"}:
        good = call()
        good["sym_buffer"].topk_idx[2, 1] = 4
        with STATES[name](), pytest.raises(api.ConfigError, match=r"token 2, slot 1 = 4 must be in \[-1, 4\)"):
            api.fp8_mega_moe(**good, check=True)


def test_a_compiled_function_calls_the_kernel_as_it_is(library: FakeLibrary) -> None:
    """torch.compile breaks its graph there; with fullgraph it says so."""
    good = call()
    rest = {name: value for name, value in good.items() if name != "y"}

    def step(y: Tensor) -> Tensor:
        api.fp8_mega_moe(y, **rest)
        return y + 1

    compiled = torch.compile(step, backend="eager")
    for y in (good["y"], good["y"][:2], good["y"].clone()):
        assert torch.equal(compiled(y), y + 1)
        own = library.launches[-1][1].ranks[0]
        assert (own.outputs.y_ptr, own.num_tokens) == (y.data_ptr(), len(y))
    assert len(library.launches) == 3
