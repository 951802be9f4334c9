"""Whether a tensor is memory that a launch can use as it is, and whether two of them share some."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from megaproof.kernel.host.sizes import ConfigError

PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""The types that are taken. Another subclass may have no memory (a FakeTensor), or mean other values than it holds."""
ALIGNED = 16
"""Bytes: TMA reads weights, and y is written, at addresses that are multiples of this."""
Named = tuple[str, Tensor]
"""What errors call a tensor, and the tensor."""


def kind(value: Any) -> str:
    """What errors say of something that is not what it must be."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def wanted(dtype: torch.dtype, shape: tuple[Any, ...]) -> str:
    """What errors say of the tensor that was wanted."""
    return f"contiguous {dtype} [{', '.join(map(str, shape))}]"


def check_plain(name: str, tensor: Any, rule: str) -> None:
    """Raises ConfigError unless the tensor is strided and its bytes, wherever they are, are its values."""
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"{name} is {kind(tensor)}; it must be a tensor, {rule}")
    if type(tensor) not in PLAIN:
        said = f"{name} is a {type(tensor).__name__}; it must be a plain torch.Tensor or nn.Parameter"
        raise ConfigError(f"{said} (pass .data of a subclass of nn.Parameter)")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise ConfigError(f"{name} is {'nested' if tensor.is_nested else tensor.layout}; it must be torch.strided")
    if tensor.is_neg() or tensor.is_conj():
        raise ConfigError(f"{name} is a lazy negation or conjugate; it must hold its values: resolve_neg() gives them")
    if not tensor.is_meta and tensor.numel() and _held(tensor) is None:
        raise ConfigError(f"{name} is a functorch wrapper; it must be a tensor with memory of its own")


def check_real(what: str) -> None:
    """Raises ConfigError under a mode in which new tensors have no memory."""
    if type(made := torch.empty(0, device="cpu")) is not Tensor:
        raise ConfigError(f"{what} under a {type(made).__name__}Mode; it must be outside, where tensors have memory")


def check_tensor(
    name: str, tensor: Any, device: torch.device, dtype: torch.dtype, shape: tuple[Any, ...], align: int = ALIGNED
) -> None:
    """Raises ConfigError unless it is a plain contiguous tensor of this form on this device, and its memory is there.

    A device of type meta takes its tensors without memory.
    """
    check_plain(name, tensor, wanted(dtype, shape))
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        strides = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
        found = f"{tensor.dtype} {list(tensor.shape)}{strides}"
        raise ConfigError(f"{name} is {found}; it must be {wanted(dtype, shape)}")
    if tensor.device != device:
        raise ConfigError(f"{name} is on {tensor.device}; it must be on the buffer's device, {device}")
    if tensor.is_meta or not tensor.numel():
        return
    end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
    if (held := tensor.untyped_storage().nbytes()) < end:
        raise ConfigError(
            f"{name} ends at byte {end} of a storage of {held}; its memory must be there, and was let go of"
        )
    if tensor.data_ptr() == 0:
        raise ConfigError(f"{name} has address 0: a functional tensor, or one without data; its memory must be there")
    if tensor.data_ptr() % align:
        raise ConfigError(f"{name} begins at {tensor.data_ptr():#x}; its address must be a multiple of {align}")


def _held(tensor: Tensor) -> int | None:
    """Bytes of its storage; None where it wraps another tensor and has none."""
    try:
        return tensor.untyped_storage().nbytes()
    except NotImplementedError:
        return None


def check_apart(written: Iterable[Named], read: Iterable[Named]) -> None:
    """Raises ConfigError if one that is written shares memory with any other. Those that are read may share theirs."""
    spans = [(*_span(tensor), True, name) for name, tensor in written]
    spans += [(*_span(tensor), False, name) for name, tensor in read]
    ends: dict[bool, tuple[int, str]] = {True: (0, ""), False: (0, "")}  # written or read: the furthest end so far
    for start, end, is_written, name in sorted(spans, key=itemgetter(0)):
        if start == end:
            continue
        for other_is_written, (other_end, other) in ends.items():
            if (is_written or other_is_written) and start < other_end:
                pair = (not is_written, name), (not other_is_written, other)  # outputs first, the buffer last
                first, second = sorted(pair, key=lambda each: (each[1].startswith("sym_buffer"), each[0]))
                rule = "what a launch writes must have memory of its own"
                raise ConfigError(f"{first[1]} overlaps {second[1]}; {rule}")
        ends[is_written] = max(ends[is_written], (end, name))


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last; none of a tensor without memory."""
    if tensor.is_meta:
        return 0, 0
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
