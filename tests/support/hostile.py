"""Values that an argument is not meant to be: what a caller may pass by mistake, one of each kind."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


class Raising:
    """Whose every use raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")


class Lines:
    """Whose `repr` has lines and a control character."""

    def __repr__(self) -> str:
        return "first\nsecond\x1b[31m" + "x" * 10_000


class Subclassed(Tensor):
    """A tensor with memory that is not plain."""


def round_list() -> list:
    """A list that holds itself."""
    made: list = []
    made.append(made)
    return made


SCALARS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "0": lambda: 0,
    "-1": lambda: -1,
    "3": lambda: 3,
    "2^31": lambda: 1 << 31,
    "2^64": lambda: 1 << 64,
    "10^5000": lambda: 10**5000,
    "-0.5": lambda: -0.5,
    "256.0": lambda: 256.0,
    "nan": lambda: float("nan"),
    "-inf": lambda: -float("inf"),
    "1e39": lambda: 1e39,
    "complex": lambda: 1j,
    "Fraction": lambda: Fraction(10),
    "Decimal": lambda: Decimal(10),
    "text": lambda: "text",
    "lines": lambda: "two\nlines",
    "bytes": lambda: b"\0",
    "int8": lambda: np.int8(-3),
    "int64": lambda: np.int64(128),
    "float32": lambda: np.float32(10),
    "float16 nan": lambda: np.float16("nan"),
    "longdouble": lambda: np.longdouble("1e4000"),
    "bool_": lambda: np.bool_(True),
    "timedelta64": lambda: np.timedelta64(128, "s"),
    "datetime64": lambda: np.datetime64("2026-12-01"),
    "str_": lambda: np.str_("text"),
}
OBJECTS: dict[str, Callable[[], Any]] = {
    "object": object,
    "raising": Raising,
    "lines of repr": Lines,
    "type": lambda: Tensor,
    "function": lambda: len,
    "list": list,
    "tuple": tuple,
    "round list": round_list,
    "lists": lambda: [[1.0, 2.0], [3.0, 4.0]],
    "dict": lambda: {0: torch.zeros(1)},
    "set": lambda: {1},
    "generator": lambda: iter([torch.zeros(1)]),
    "range": lambda: range(2),
    "array": lambda: np.zeros((3, 256), np.float32),
    "array of objects": lambda: np.array([None, "text"], dtype=object),
    "array of one": lambda: np.array(["swiglu"]),
}


def _nested() -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])


def _jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=torch.jagged)


WITHOUT_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "meta": lambda t: t.to("meta"),
    "functional": torch._to_functional_tensor,
    "subclass": lambda t: t.as_subclass(Subclassed),
    "coo": lambda t: t.float().to_sparse(),
    "csr": lambda t: t.float().reshape(len(t), -1).to_sparse_csr(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.qint8),
    "nested": lambda t: _nested(),
    "jagged": lambda t: _jagged(),
    "freed": lambda t: _freed(t.clone()),
}
"""Of a tensor that is legal: the same values, where a launch that reads bytes at an address finds others or none."""


def _freed(tensor: Tensor) -> Tensor:
    """The same tensor after its memory was let go of, as FSDP does."""
    tensor.untyped_storage().resize_(0)
    return tensor


TENSORS: dict[str, Callable[[], Any]] = {
    "0-d": lambda: torch.tensor(10),
    "0-d bool": lambda: torch.tensor(True),
    "empty": lambda: torch.empty(0),
    "float": lambda: torch.zeros(3, 256),
    "requires grad": lambda: torch.zeros(3, 256, dtype=torch.bfloat16, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.zeros(3, 256)),
    "uninitialised": torch.nn.UninitializedParameter,
    "negated": lambda: torch._neg_view(torch.zeros(3, 256, dtype=torch.bfloat16)),
    "conjugate": lambda: torch.zeros(3, 256, dtype=torch.complex64).conj(),
    "expanded": lambda: torch.zeros(1, 256, dtype=torch.bfloat16).expand(3, 256),
    **{
        name: functools.partial(change, torch.zeros(3, 256, dtype=torch.bfloat16))
        for name, change in WITHOUT_MEMORY.items()
    },
}


def values() -> Iterator[tuple[str, Any]]:
    """(name, value) of every kind, made anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of some that they are young or old
        for table in (SCALARS, OBJECTS, TENSORS):
            for name, make in table.items():
                yield name, make()
