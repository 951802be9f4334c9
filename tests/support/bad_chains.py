"""Operands that a chain of the tensor core refuses, the readable one and the compiled twins alike."""

from __future__ import annotations

import torch
from torch import Tensor

U8 = {"dtype": torch.uint8}
A, B = torch.zeros(2, 32, **U8), torch.zeros(3, 32, **U8)
BAD_CHAINS: dict[str, tuple[Tensor, Tensor, Tensor | None, type[Exception], str]] = {
    "a-dtype": (torch.zeros(2, 32), B, None, TypeError, "a is torch.float32"),
    "b-dims": (A, torch.zeros(1, 3, 32, **U8), None, TypeError, "b is torch.uint8"),
    "depth": (torch.zeros(2, 48, **U8), torch.zeros(3, 48, **U8), None, ValueError, "depth 48 and 48"),
    "depths": (A, torch.zeros(3, 64, **U8), None, ValueError, "depth 32 and 64"),
    # c larger than needed: a twin that does not look would read the wrong places, never memory that is not its own.
    "c-shape": (A, B, torch.zeros(3, 4), ValueError, "c has shape"),
    "c-float64": (A, B, torch.zeros(2, 3, dtype=torch.float64), TypeError, "c has dtype"),
    "c-int32": (A, B, torch.zeros(2, 3, dtype=torch.int32), TypeError, "c has dtype"),
}
"""Id -> a, b, c, and what is raised with which words."""
