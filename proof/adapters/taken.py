"""What an adapter answers, taken as plain values: foreign code is asked here and takes no part in a verdict.

Functions of torch that a verdict rests on are held from the import of this module on, before a foreign module is
imported: one that replaces torch.equal or Tensor.__ne__ changes nothing of the comparison of bytes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from megaproof.proof.adapters.protocol import WORLDS, Adapter, AdapterError
from megaproof.quant.recipe import Recipe

T = TypeVar("T")
PLAIN = (torch.Tensor, torch.nn.Parameter)
_BASE = torch._C.TensorBase
_clone, _contiguous, _cpu, _data_ptr, _detach = (
    _BASE.clone,
    _BASE.contiguous,
    _BASE.cpu,
    _BASE.data_ptr,
    _BASE.detach,
)
_is_neg, _is_conj = _BASE.is_neg, _BASE.is_conj
_string_at, _prod = ctypes.string_at, math.prod


class Unfit(ValueError):
    """A result that can't be compared; says what it is and what is wanted."""


def printable(text: str) -> str:
    """The text with every character that could steer a terminal written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def asked(method: Callable[..., T], *arguments: Any) -> T:
    """What a method of an adapter returns.

    Raises AdapterError where it skips, expects a failure or ends the session instead: an adapter has no say in whether
    it is proven, but by `claims`. Other exceptions are its own.
    """
    try:
        return method(*arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        ours = type(error).__module__ in ("_pytest.outcomes", "unittest.case")
        if isinstance(error, Exception) and not ours:
            raise
        name = getattr(method, "__name__", type(method).__name__)
        said = f"{name}() of the adapter raised {type(error).__name__}: {printable(str(error))}"
        raise AdapterError(f"{said}; only claims() says what is not to be proven") from None


def claims(adapter: Adapter, recipe: Recipe) -> str | None:
    """The adapter's claims. Raises AdapterError for anything but None or a reason in words."""
    reason = asked(adapter.claims, recipe)
    if reason is None:
        return None
    if not isinstance(reason, str) or not reason.strip():
        raise AdapterError(f"claims() of the adapter returned {reason!r}: it takes None, or the reason why not")
    return printable(reason)


def attributes(adapter: object) -> list[str]:
    """What is wrong with the attributes of an adapter, as far as they are there."""
    found = []
    name = getattr(adapter, "name", None)
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        found.append(f"name (a str), of printable characters, not {name!a}")
    worlds = getattr(adapter, "worlds", WORLDS[:1])
    if not isinstance(worlds, tuple | list) or not worlds or not set(worlds) <= set(WORLDS):
        found.append(f"worlds (a tuple of some of {', '.join(WORLDS)}, not {worlds!a})")
    if not callable(getattr(adapter, "fill", len)):
        found.append("fill (a method, where there is one)")
    return found


def tensor(what: str, value: object, device: torch.device) -> Tensor:
    """A copy of a result as a plain tensor; its memory is the result's own, and nothing changes it later.

    Raises Unfit for anything but a dense torch.Tensor on the CPU or on `device` whose memory holds what it says.
    """
    if type(value) not in PLAIN:
        raise Unfit(f"{what} is a {type(value).__name__}: a plain torch.Tensor is wanted")
    if value.layout != torch.strided or value.device.type not in ("cpu", device.type):
        raise Unfit(f"{what} is {value.layout} on {value.device}: a dense tensor on {device} is wanted")
    if _is_neg(value) or _is_conj(value):
        raise Unfit(f"{what} is negated or conjugated lazily: its memory holds other bits than it says")
    return _clone(_detach(value))


def tensors(what: str, value: object, device: torch.device) -> list[Tensor]:
    """The same of a list by rank. Raises Unfit."""
    if not isinstance(value, list | tuple):
        raise Unfit(f"{what} is a {type(value).__name__}: a list of tensors is wanted, one a rank")
    return [tensor(f"{what} of rank {rank}", part, device) for rank, part in enumerate(value)]


def stages(value: object, device: torch.device) -> dict[str, Tensor]:
    """The same of stages by name. Raises Unfit."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise Unfit(f"stages() is a {type(value).__name__}: a dict of tensors by name is wanted")
    return {name: tensor(f"stage {printable(name)}", part, device) for name, part in value.items()}


def raw(parts: Tensor | Sequence[Tensor]) -> bytes:
    """The bytes of a tensor, or of several, row after row."""
    if type(parts) not in PLAIN:
        return b"".join(map(raw, parts))
    whole = _contiguous(_cpu(_detach(parts)))
    return _string_at(_data_ptr(whole), _prod(whole.shape) * whole.dtype.itemsize)
