"""The plain bulk read: its gate and its refusals without a GPU; with one, that it reads what it says, all of it."""

from __future__ import annotations

import statistics

import pytest
import torch

from megaproof.kernel.programs import stream
from megaproof.toolchain.gate import SHARED_LIMIT


def test_the_cubin_passes_the_gate() -> None:
    report = stream.PROGRAM.compile().report
    assert set(report.entries) == set(stream.PROGRAM.entries)
    assert not report.messages
    assert report.entries["stream_read"].registers <= 64


def test_shared_memory_fits_a_block() -> None:
    assert stream.SHARED_BYTES == 196_736 <= SHARED_LIMIT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, dtype=torch.uint8), "0 bytes; it must have a positive multiple of 16"),
        (torch.zeros(40, dtype=torch.uint8), "40 bytes; it must have a positive multiple of 16"),
        (torch.zeros(32, dtype=torch.int8), r"torch.int8 \[32\]; it must be contiguous torch.uint8"),
        (torch.zeros(4, 16, dtype=torch.uint8), r"\[4, 16\]; it must be contiguous torch.uint8 \[n\]"),
        (torch.zeros(64, dtype=torch.uint8)[::2], "must be contiguous"),
        (torch.zeros(64, dtype=torch.uint8)[8:40], "must be aligned to 16 bytes"),
    ],
    ids=["empty", "odd", "dtype", "2-D", "strided", "unaligned"],
)
def test_what_cannot_be_read_is_refused(data: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream.stream_read(data)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size", [16, stream.PIECE - 16, stream.PIECE, stream.PIECE + 16, 133 * stream.PIECE, 7 * 132 * stream.PIECE + 48]
)
def test_every_size_ends(size: int) -> None:
    """One short piece; a ring that never wraps, one that does; blocks with unequal numbers of pieces."""
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    before = data.clone()
    for _ in range(3):
        stream.stream_read(data)
    torch.cuda.synchronize()
    assert torch.equal(data, before)


@pytest.mark.clock
@pytest.mark.gpu
def test_time_grows_with_bytes_at_a_rate_that_memory_has() -> None:
    """A read that left bytes out would be faster than the memory of any Hopper card: 4.9 TB/s at most."""
    data = torch.randint(0, 256, (2 << 30,), dtype=torch.uint8, device="cuda")

    def microseconds(size: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(7)]
        for before, after in pairs:
            before.record()
            stream.stream_read(data[:size])
            after.record()
        torch.cuda.synchronize()
        return statistics.median(1e3 * before.elapsed_time(after) for before, after in pairs)

    microseconds(1 << 30)  # warm up
    half, whole = microseconds(1 << 30), microseconds(2 << 30)
    rate = (1 << 30) / (whole - half) / 1e3  # GB/s; launch and ramp cancel
    print(f"{rate:.0f} GB/s")
    assert 1000 < rate < 4950
