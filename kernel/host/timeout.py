"""What a launch leaves behind when one of its roles waited in vain: `Status` of params.cuh, in words."""

from __future__ import annotations

from torch import Tensor

STATUS_WORDS = 8
"""u32 that a buffer keeps for `Status`, which has six: flag, rank, thread block, counter, expected, seen."""
WAITS = {
    1: ("all roles", "thread blocks of the rank"),
    2: ("all roles", "ranks"),
    3: ("scout", "rows of a pool block"),
    4: ("scout or dispatch", "GEMM 1 half tiles of a pool block"),
    5: ("scout", "GEMM 2 half tiles of a pool block"),
    6: ("dispatch", "the copy of a row"),
    7: ("scout", "tasks of its thread block"),
}
"""`Counter` of barrier.cuh, in words: who waits for what.

All roles wait at the barriers. For half tiles of GEMM 1 either the scout waits, before GEMM 2, or dispatch, until a
place in the ring is free. A scout that waits for the tasks of its thread block waits for whatever its producer and its
math warps wait for.
"""


class KernelTimeout(RuntimeError):
    """A role waited longer than the timeout; the message says who, for what, and what it saw."""


def waited(status: Tensor) -> str | None:
    """What a `Status` says: who waited in vain and for what. Returns None if all roles got what they waited for.

    status: int32 [>= 6], on any device; a device is waited for.
    """
    flag, rank, cta, counter, expected, seen, *_ = (word & 0xFFFFFFFF for word in status.tolist())
    who, what = WAITS.get(counter, ("an unknown role", "an unknown counter"))
    said = f"rank {rank}, thread block {cta}, {who} waited for {what}: expected {expected}, saw {seen}"
    return said if flag else None
