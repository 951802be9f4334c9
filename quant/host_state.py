"""What the process around us has set, and what it would do to our numbers: all of it is put aside while we compute.

An engine may flush subnormals, round toward zero, have another default dtype or device, run under autocast or in
inference mode, treat warnings of numpy as errors. None of it may move a bit or end in a crash. `neutral` sets each of
these to what a fresh process has and puts it back at the end, in the thread that asks; `guarded` does so around a
function. What one thread sets for all of them comes back when the last thread has left.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")

_LIBM = ctypes.CDLL(None) if sys.platform == "linux" else None
_DEFAULT_ENVIRONMENT = ctypes.c_void_p(-1)
"""FE_DFL_ENV of Linux's <fenv.h>: nearest even, subnormals kept, no traps."""
_ENVIRONMENT_BYTES = 64
"""More than any fenv_t has."""
_GRAIN = 32768
"""Elements from which on torch gives an elementwise operation to one more thread."""


class HostStateError(RuntimeError):
    """A state of the host that moves bits and cannot be put aside; one sentence, before anything is computed."""


class _Thread(threading.local):
    """How many guards this thread is in."""

    depth = 0


class _Shared:
    """What belongs to the process: set by the first thread that enters, put back by the last one that leaves."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.saved: tuple[torch.dtype, bool, bool] | None = None

    def enter(self) -> None:
        with self.lock:
            if self.inside == 0:
                deterministic = torch.are_deterministic_algorithms_enabled()
                warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
                self.saved = torch.get_default_dtype(), deterministic, warn_only
                torch.set_default_dtype(torch.float32)
                if deterministic:
                    torch.use_deterministic_algorithms(False)
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                dtype, deterministic, warn_only = self.saved  # type: ignore[misc]
                torch.set_default_dtype(dtype)
                if deterministic:
                    torch.use_deterministic_algorithms(True, warn_only=warn_only)


_thread, _shared = _Thread(), _Shared()


@contextlib.contextmanager
def neutral(elements: int = _GRAIN) -> Iterator[None]:
    """Everything inside computes as in a fresh process, in this thread; a thread that it starts asks for its own.

    elements: the most that one operation inside has; so few that torch does not share them out save a look at its
    worker threads. Inside another one it costs next to nothing. Raises HostStateError where this machine cannot do it.
    """
    if _thread.depth:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_float_environment())
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())  # modes too: a default device is one of them
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_without_autocast())
        _shared.enter()
        stack.callback(_shared.leave)
        if elements >= _GRAIN:
            stack.enter_context(_clean_workers())
        _thread.depth = 1
        try:
            yield
        finally:
            _thread.depth = 0


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run in `neutral`. Its tensors lose what only the host's autograd knows of them: see `plain`."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with neutral():
            return function(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return inside


def guarded_atom(function: Callable[P, R]) -> Callable[P, R]:
    """`guarded` for a function of a few tensors that broadcast, which is called often and mostly on small ones."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        if _thread.depth:
            return function(*args, **kwargs)
        most = math.prod(max(1, x.numel()) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with neutral(most):
            return function(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return inside


def plain(value: Any) -> Any:
    """A tensor without its gradient and with its lazy sign carried out, lists and tuples of them too; else value."""
    if isinstance(value, Tensor):
        value = value.detach() if value.requires_grad else value
        return value.resolve_neg() if value.is_neg() else value
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


@contextlib.contextmanager
def _float_environment() -> Iterator[None]:
    """The thread's rounding and subnormals are those of IEEE 754; Linux keeps them in fenv_t, each thread its own."""
    saved = (ctypes.c_byte * _ENVIRONMENT_BYTES)()
    is_set = _LIBM is not None and _LIBM.fegetenv(saved) == 0 and _LIBM.fesetenv(_DEFAULT_ENVIRONMENT) == 0
    try:
        if not _is_ieee():
            raise HostStateError("this thread flushes subnormals or rounds another way, and it cannot be switched off")
        yield
    finally:
        if is_set:
            _LIBM.fesetenv(saved)  # type: ignore[union-attr]


def _is_ieee() -> bool:
    """Whether subnormals survive and a sum is rounded to nearest even."""
    least, one, half_ulp = sys.float_info.min, 1.0, sys.float_info.epsilon / 2
    return least * 0.5 > 0 and one + half_ulp == 1.0 and one + 1.5 * half_ulp > 1.0 and -one - half_ulp == -1.0


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)


@contextlib.contextmanager
def _clean_workers() -> Iterator[None]:
    """torch's worker threads keep the float environment of whoever started them; where one flushes, none is used."""
    count = torch.get_num_threads()
    if count == 1 or _workers_are_ieee(count):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@functools.lru_cache(maxsize=4)
def _ties(count: int) -> tuple[Tensor, np.ndarray]:
    """Numbers whose halves are subnormal ties, a share for each of `count` threads, and the bits of those halves."""
    bits = torch.tensor([0x00800001, 0x80800001 - (1 << 32), 0x00800003], dtype=torch.int32, device="cpu")
    halves = np.array([0x00400000, 0x80400000, 0x00400002], dtype=np.uint32)
    return bits.repeat(_GRAIN * count // 3 + 1).view(torch.float32), np.tile(halves, _GRAIN * count // 3 + 1)


def _workers_are_ieee(count: int) -> bool:
    """Whether `count` threads of torch keep subnormals and round to nearest even: one multiplication in all of them."""
    numbers, halves = _ties(count)
    return bool(((numbers * 0.5).numpy().view(np.uint32) == halves).all())
