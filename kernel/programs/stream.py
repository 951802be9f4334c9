"""The plain bulk read from torch: the time in which this card reads so many bytes, beside which a kernel's is put."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megaproof import HOME
from megaproof.toolchain.launch import require_device
from megaproof.toolchain.program import Program

PIECE, STAGES, THREADS = 32 * 1024, 6, 64
"""Bytes of one copy, copies in flight of a block, threads of a block."""
SHARED_BYTES = -(-(STAGES * PIECE + 2 * 8 * STAGES) // 128) * 128
"""sizeof(StreamStorage): the ring, then its barriers."""
GRAIN = 16
"""Bytes: what a bulk copy moves, and how it must be aligned."""
PROGRAM = Program(
    name="stream",
    sources=(HOME / "kernel" / "programs" / "stream.cu",),
    entries=("stream_read",),
    defines={"SHARED_BYTES": SHARED_BYTES},
    shared=SHARED_BYTES,
)


class StreamParams(ctypes.Structure):
    """`StreamParams` of stream.cu."""

    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


def stream_read(data: Tensor) -> None:
    """Reads all of `data` once, into shared memory, and returns before it is done; nothing is written.

    data: contiguous uint8 [n], n a positive multiple of 16. Raises ValueError naming what does not fit.
    """
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
        raise ValueError(f"data is {data.dtype} {list(data.shape)}; it must be contiguous torch.uint8 [n]")
    size = data.numel()
    if size <= 0 or size % GRAIN:
        raise ValueError(f"data has {size} bytes; it must have a positive multiple of {GRAIN}")
    if data.data_ptr() % GRAIN:
        raise ValueError(f"data begins at {data.data_ptr():#x}; it must be aligned to {GRAIN} bytes")
    grid = min(-(-size // PIECE), require_device().sms)
    PROGRAM.library().kernel("stream_read")(StreamParams(data.data_ptr(), size), grid, THREADS, SHARED_BYTES)
