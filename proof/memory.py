"""GPU memory between tests: several workers may share one GPU, and torch keeps what it has had."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress

import torch

KEPT = 1 << 30
"""Bytes that a process may keep: small tests are not slowed down."""


def free(kept: int = KEPT) -> None:
    """Gives unused memory back to the GPU if torch holds more than `kept` bytes of it; nothing without CUDA."""
    if not torch.cuda.is_initialized() or torch.cuda.memory_reserved() <= kept:
        return
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):  # pytest keeps the last failure, with all
        vars(sys).pop(name, None)  # that stood in its frames
    gc.collect()
    with suppress(RuntimeError):  # a context that an error has broken: the tests say so
        torch.cuda.empty_cache()
