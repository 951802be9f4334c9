"""Eq. (7): an output row becomes BF16 before it leaves for slot (token, k) of its source rank.

Predicts kernel/scatter.cuh.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def to_slot(rows: Tensor, arith: ModuleType) -> Tensor:
    """Eq. (7): returns rows, float32 [m, H], as bfloat16 [m, H], rounded to nearest even."""
    return arith.encode_bf16(rows)
