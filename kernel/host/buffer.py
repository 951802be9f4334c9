"""Groups and the symmetric buffer: memory, its views by rank, and what stays with it between launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaproof.kernel.host.sizes import MAX_RANKS, ConfigError, Problem

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


def waited(status: Tensor) -> str | None:
    """What a `Status` of params.cuh says: who waited in vain and for what; None where nobody did."""
    flag, rank, block, counter, expected, seen, *_ = (word & 0xFFFFFFFF for word in status.tolist())
    who, what = WAITS.get(counter, ("nobody known", "nothing known"))
    return f"rank {rank}, block {block}, {who} waited for {what}: expected {expected}, saw {seen}" if flag else None


class KernelTimeout(RuntimeError):
    """A role waited longer than the timeout; the message says who, for what, and what it saw."""


@dataclass(frozen=True)
class VirtualGroup:
    """R ranks on one GPU, in one cooperative launch. Raises ConfigError unless size is an int in [1, 8]."""

    size: int

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= MAX_RANKS:
            raise ConfigError(f"group: VirtualGroup size = {self.size!r} must be an int in [1, {MAX_RANKS}]")


def local_group(group: Any) -> VirtualGroup | None:
    """The group as this version runs it: a process group of one rank is None. Raises ConfigError naming `group`."""
    if group is None or isinstance(group, VirtualGroup):
        return group
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ConfigError(f"group = {group!r} must be None, a VirtualGroup or a torch.distributed ProcessGroup")
    if group.size() != 1:
        raise ConfigError(
            f"group = a ProcessGroup of {group.size()} ranks; it must have 1: ranks as processes over NVLink are not "
            "available in this version (VirtualGroup runs up to 8 ranks on one GPU)"
        )
    return None


class RankViews:
    """Views of one rank's part of the symmetric buffer; x, x_sf, topk_idx and topk_weights are the inputs.

    l2_acts_sf has a column for 64 activations; after a launch of granularity 128 its first I/128 columns are valid.
    """

    def __init__(self, problem: Problem, storage: Tensor) -> None:
        self.storage = storage
        offsets, _ = problem.offsets()

        def view(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
            count = torch.Size(shape).numel() * dtype.itemsize
            return storage[offsets[name] : offsets[name] + count].view(dtype).view(shape)

        t, k, h, i = problem.capacity, problem.topk, problem.hidden, problem.intermediate
        rows, ring = problem.pool_rows, problem.ring_rows
        self.x = view("x", torch.float8_e4m3fn, t, h)
        self.x_sf = view("x_sf", torch.float32, t, h // 128)
        self.topk_idx = view("topk_idx", torch.int64, t, k)
        self.topk_weights = view("topk_weights", torch.float32, t, k)
        self.l1_acts = view("l1_acts", torch.float8_e4m3fn, ring, h)
        self.l1_acts_sf = view("l1_acts_sf", torch.float32, h // 128, ring).t()
        self.l2_acts = view("l2_acts", torch.float8_e4m3fn, ring, i)
        self.l2_acts_sf = view("l2_acts_sf", torch.float32, i // 64, ring).t()
        self.slots = view("slots", torch.bfloat16, k, t, h)
        self.pool_source = view("pool_source", torch.int32, rows, 2)


class SymmBuffer:
    """Symmetric memory of a group: `.rank(r)` for each rank of a virtual group; with one rank, the views themselves."""

    def __init__(self, group: VirtualGroup | None, problem: Problem, device: torch.device) -> None:
        self.group, self.problem, self.device = group, problem, device
        self.offsets, self.bytes_per_rank = problem.offsets()
        storage = torch.zeros(problem.ranks, self.bytes_per_rank, dtype=torch.uint8, device=device)
        self._ranks: list[RankViews] = [RankViews(problem, part) for part in storage]
        self.status = torch.zeros(8, dtype=torch.int32, device=device)
        self.template: Any = None
        """Params of every launch on this buffer, but for weights, outputs and recipe; the first launch makes them."""
        self.plans: dict[tuple, Any] = {}
        """Launch plans of `fp8_mega_moe`, by recipe and weights; the oldest first."""
        if group is None:
            self.__dict__.update(vars(self._ranks[0]))

    def require(self) -> None:
        """Raises ConfigError when the buffer was destroyed."""
        if not self._ranks:
            raise ConfigError("sym_buffer was destroyed; it must be alive: make a new one")

    def rank(self, r: int) -> RankViews:
        """The views of rank r. Raises ConfigError."""
        self.require()
        if not 0 <= r < self.problem.ranks:
            raise ConfigError(f"rank = {r} must be in [0, {self.problem.ranks})")
        return self._ranks[r]

    def destroy(self) -> None:
        """Frees the memory; the views and the launch plans are gone. A second call does nothing."""
        if self.group is None and self._ranks:
            for name in vars(self._ranks[0]):
                del self.__dict__[name]
        self._ranks.clear()
        self.plans.clear()
        self.template = None

    def check(self) -> None:
        """Waits for the launches so far, on whatever stream. Raises KernelTimeout when a role gave up waiting.

        All roles have left the launch by then; its counters are made zero, so that the buffer can be used again. What
        is launched between a failure and this call computes nothing.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if said := waited(self.status):
            for views in self._ranks:
                views.storage[self.offsets["rank_counter"] : self.offsets["l1_acts"]].zero_()
            self.status.zero_()  # last: a launch that comes between computes nothing either
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the next launch may be on another stream
            raise KernelTimeout(said)
