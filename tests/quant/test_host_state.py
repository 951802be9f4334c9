"""What the host has set moves no bit and ends nothing: a table of states x twins and everything above them."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.cases.compare import bits
from megaproof.cases.run import run_case
from megaproof.golden import store
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters.reference import ReferenceAdapter
from megaproof.proof.prove import prove
from megaproof.quant import atoms, cast, host_state, philox, twin
from megaproof.quant.formats import f32_from_bits
from megaproof.quant.host_state import HostStateError, neutral
from megaproof.quant.shapes import Shape
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.ranks import run_ranks

CASE = Case(Shape("tiny", 256, 128, 4, 2), (3, 2))
SHARE = 32768
"""Elements that torch gives to one thread."""

# --- states -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def changed(now: object, set_it: Callable[[object], object], to: object) -> Iterator[None]:
    set_it(to)
    try:
        yield
    finally:
        set_it(now)


@contextlib.contextmanager
def flushing_workers() -> Iterator[None]:
    """torch's worker threads start while this thread flushes, and go on flushing when it does no more."""
    before = torch.get_num_threads()
    torch.set_flush_denormal(True)
    torch.set_num_threads(3)
    shared = torch.ones(SHARE * 3) * 0.5
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_num_threads(2)  # fewer: those that are too many end
        shared * 0.5
        torch.set_num_threads(before)


@contextlib.contextmanager
def rounding_up() -> Iterator[None]:
    """fesetround(FE_UPWARD), as interval arithmetic sets it."""
    libm = ctypes.CDLL(None)
    before = libm.fegetround()
    libm.fesetround(0x800)
    try:
        yield
    finally:
        libm.fesetround(before)


@contextlib.contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Rude(TorchFunctionMode):
    """Doubles what every function of torch returns."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        return out * 2 if isinstance(out, Tensor) and out.is_floating_point() else out


class RudeDispatch(TorchDispatchMode):
    """Refuses every operation."""

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        raise RuntimeError(f"{func} is not for you")


def deterministic(on: bool) -> None:
    torch.use_deterministic_algorithms(on)


STATES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "flush_denormal": lambda: changed(False, torch.set_flush_denormal, True),
    "rounding_up": rounding_up,
    **{
        f"default_{dtype}".replace("torch.", ""): functools.partial(
            changed, torch.float32, torch.set_default_dtype, dtype
        )
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
    },
    "default_device_meta": lambda: changed(None, torch.set_default_device, "meta"),
    "device_context": lambda: torch.device("meta"),
    "deterministic": lambda: changed(False, deterministic, True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "anomaly": lambda: changed(False, torch.autograd.set_detect_anomaly, True),
    "one_thread": lambda: changed(torch.get_num_threads(), torch.set_num_threads, 1),
    "three_threads": lambda: changed(torch.get_num_threads(), torch.set_num_threads, 3),
    "matmul_precision": lambda: changed("highest", torch.set_float32_matmul_precision, "medium"),
    "numpy_raises": lambda: np.errstate(all="raise"),
    "warnings_are_errors": warnings_are_errors,
    "function_mode": Rude,
    "dispatch_mode": RudeDispatch,
}

# --- what runs in them ------------------------------------------------------------------------------------------------


@functools.cache
def problem() -> inputs.Inputs:
    """Routing weights so small that activations, slots and y are subnormal; as a host has them, with gradients."""
    made = inputs.make(CASE)
    tiny = [(weight * 2.0**-124).requires_grad_() for weight in made.topk_weights]
    return dataclasses.replace(made, topk_weights=tiny)


@functools.cache
def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Subnormals, what becomes one, and ordinary numbers."""
    words = philox.words(1, 1, 3 * 4096)
    words[::4] &= 0x80FFFFFF
    return tuple(x.clone().requires_grad_() for x in f32_from_bits(words).view(3, 16, 256))


@functools.cache
def codes() -> tuple[Tensor, Tensor]:
    """E4M3 codes, and BF16 values."""
    flat = philox.codes(3, 3, 32 * 64, torch.arange(256, dtype=torch.uint8))
    return flat.view(32, 64), flat.view(torch.bfloat16)


def layer(function: Callable[..., LayerResult]) -> list[Tensor]:
    made = problem()
    result = function(CASE.recipe, *made.arguments(), trace=True, experts=CASE.shape.experts)
    return [*result.y, *result.stats, *(result.trace or {}).values()]


def arithmetic(module: object) -> list[Tensor]:
    (x, y, z), (eight, sixteen) = numbers(), codes()
    out = [getattr(module, name)(x) for name in ("rcp_approx", "ex2_approx", "expf", "encode_e4m3", "encode_bf16")]
    out += [module.silu(x, True), module.silu(x, False), module.fma(x, y, z)]
    return [*out, module.wgmma_chain(eight, eight), module.decode_e4m3(eight), module.decode_bf16(sixteen)]


def casts() -> list[Tensor]:
    kinds = (("ue8m0", "clamp"), ("fp32", "public"))
    return [tensor for kind in kinds for tensor in cast.quantise_activation(numbers()[0], 64, *kind)]


def proven() -> list[Tensor]:
    done = prove(ReferenceAdapter(), Prepared(CASE, problem(), torch.device("cpu")), expected())
    assert done.elements
    return []


@functools.cache
def expected() -> LayerResult:
    return moe_layer(CASE.recipe, *problem().arguments(), trace=True, experts=CASE.shape.experts)


def golden() -> list[Tensor]:
    run = run_case(CASE)
    made = store.make_entry(CASE, run.sha256, run.trace, "a test", "")
    store.check(CASE, made, run.sha256, run.trace)
    return [*run.result.y, *made.data.values(), *run.inputs.x, *run.inputs.topk_weights]


SUBJECTS: dict[str, Callable[[], list[Tensor]]] = {
    "reference": lambda: layer(moe_layer),
    "ranks": lambda: layer(run_ranks),
    "twin": lambda: arithmetic(twin.arith("cpu")),
    "atoms": lambda: arithmetic(atoms),
    "casts": casts,
    "prove": proven,
    "golden": golden,
}


@functools.cache
def undisturbed(subject: str) -> list[Tensor]:
    return [bits(tensor) for tensor in SUBJECTS[subject]()]


def what_is_set() -> list[object]:
    tiny = torch.finfo(torch.float32).tiny
    with torch.device("cpu"):
        flushes = bool((torch.tensor([tiny], dtype=torch.float32) * 0.5 == 0)[0])
    return [
        flushes,
        ctypes.CDLL(None).fegetround(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        np.geterr(),
    ]


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("state", STATES)
def test_a_state_of_the_host_moves_no_bit(state: str, subject: str) -> None:
    wanted = undisturbed(subject)
    with STATES[state]():
        before = what_is_set() if state not in ("function_mode", "dispatch_mode") else None
        found = SUBJECTS[subject]()
        assert before is None or what_is_set() == before, "and stays as it was"
    assert len(found) == len(wanted)
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in found)
    for actual, right in zip(found, wanted, strict=True):
        assert torch.equal(bits(actual), right)


def halves() -> list[int]:
    """How many of three threads' halves of the least normal number are kept, as torch has it and as the atoms do."""
    x, half, zero = (torch.full((3 * SHARE,), value) for value in (torch.finfo(torch.float32).tiny, 0.5, 0.0))
    return [int(torch.count_nonzero(y.view(torch.int32))) for y in (x * half, atoms.fma(x, half, zero))]


def test_worker_threads_of_torch_that_flush_compute_nothing() -> None:
    """In a thread of its own, so that no other test gets the workers."""

    def work() -> list[int]:
        with flushing_workers():
            return halves()

    with ThreadPoolExecutor(1) as pool:
        usual, ours = pool.submit(work).result()
    assert usual < 3 * SHARE, "some of torch's threads flush"
    assert ours == 3 * SHARE


def test_the_last_one_to_leave_puts_back_what_belongs_to_all() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with neutral():
            entered.set()
            leave.wait(60)

    with changed(torch.float32, torch.set_default_dtype, torch.float64):
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(60)
        with neutral():
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float32, "the other thread is inside"
        leave.set()
        thread.join()
        assert torch.get_default_dtype() == torch.float64


def test_what_cannot_be_put_aside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose libm sets no float environment."""
    monkeypatch.setattr(host_state, "_LIBM", None)
    with changed(False, torch.set_flush_denormal, True), pytest.raises(HostStateError, match="flushes subnormals"):
        atoms.fma(*(x.detach() for x in numbers()))
    atoms.fma(*(x.detach() for x in numbers()))


def test_the_inputs_are_such_that_flushing_shows() -> None:
    """Else a guard that does nothing would pass."""
    y = torch.cat(expected().y).view(torch.int16)
    assert int(((y & 0x7F80) == 0).sum() - ((y & 0x7FFF) == 0).sum()) > 50, "subnormal outputs"
