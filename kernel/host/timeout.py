"""What a launch leaves behind when one of its roles waited in vain: `Status` of params.cuh, in words."""

from __future__ import annotations

from torch import Tensor

STATUS_WORDS = 8
"""u32 that a buffer keeps for `Status`, which has six: flag, rank, block, counter, expected, seen."""
WAITS = {
    1: ("all roles", "blocks of the rank"),
    2: ("all roles", "ranks"),
    3: ("scout", "rows of a pool block"),
    4: ("scout or dispatch", "L1 turns of a pool block"),
    5: ("scout", "L2 turns of a pool block"),
    6: ("dispatch", "the copy of a row"),
    7: ("scout", "tasks of its block"),
}
"""`Counter` of barrier.cuh, in words: who waits for what.

All roles wait at the meetings; for L1 turns the scout does (GEMM 2), or dispatch (a free place in the ring). Waiting
for the tasks of its block the scout waits for all that producer and math warps wait for inside it.
"""


class KernelTimeout(RuntimeError):
    """A role waited longer than the timeout; the message says who, for what, and what it saw."""


def waited(status: Tensor) -> str | None:
    """What a `Status` says: who waited in vain and for what. Returns None if all roles got what they waited for.

    status: int32 [>= 6], on any device; a device is waited for.
    """
    flag, rank, block, counter, expected, seen, *_ = (word & 0xFFFFFFFF for word in status.tolist())
    who, what = WAITS.get(counter, ("an unknown role", "an unknown counter"))
    return f"rank {rank}, block {block}, {who} waited for {what}: expected {expected}, saw {seen}" if flag else None
