"""The plain bulk read from torch: the time in which this card reads so many bytes, beside which a kernel's is put."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from megaproof.toolchain import build
from megaproof.toolchain.launch import Library, require_device

SOURCES = ("programs/stream.cu",)
ENTRIES = ("stream_read",)
PIECE, STAGES, THREADS = 32 * 1024, 6, 64
"""Bytes of one copy, copies in flight of a block, threads of a block."""
SHARED_BYTES = -(-(STAGES * PIECE + 2 * 8 * STAGES) // 128) * 128
"""sizeof(StreamStorage): the ring, then its barriers."""
GRAIN = 16
"""Bytes: what a bulk copy moves, and how it must be aligned."""


class StreamParams(ctypes.Structure):
    """`StreamParams` of stream.cu."""

    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


def compile_stream() -> build.Built:
    """The gated cubin; needs NVRTC but no GPU."""
    built = build.build(SOURCES, ENTRIES, defines={"SHARED_BYTES": SHARED_BYTES})
    build.gate(built)
    return built


@cache
def _library() -> Library:
    return Library(compile_stream().cubin)


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
    _library().kernel("stream_read")(StreamParams(data.data_ptr(), size), grid, THREADS, SHARED_BYTES)
