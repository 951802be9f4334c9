"""Eq. (7): an output row becomes BF16 before it leaves for slot (token, k) of its source rank."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def to_slot(rows: Tensor, arith: ModuleType) -> Tensor:
    """Eq. (7): float32 [m, H] -> bfloat16 [m, H], nearest even."""
    return arith.encode_bf16(rows)
