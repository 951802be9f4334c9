"""The symmetric buffer of a group: its memory, and what is kept with it between launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaproof.kernel.host.buffer import BufferSize, Fixed, RankViews, names_of
from megaproof.kernel.host.groups import VirtualGroup
from megaproof.kernel.host.memory import check_real
from megaproof.kernel.host.sizes import ConfigError
from megaproof.kernel.host.streams import StreamOrder, Turn
from megaproof.kernel.host.timeout import STATUS_WORDS, KernelTimeout, waited
from megaproof.kernel.host.values import integer
from megaproof.kernel.programs.moe import moe

if TYPE_CHECKING:
    from collections.abc import Callable

    from megaproof.kernel.host.params import Params
    from megaproof.kernel.host.plans import LaunchPlan
    from megaproof.toolchain.program import Program


class SymmBuffer(Fixed):
    """Symmetric memory of a group: `.rank(r)` for each rank of a virtual group; with one rank, the views themselves.

    `get_symm_buffer_for_mega_moe` makes it. `group` and `device` are those that it was made for, `size` is its
    BufferSize. Threads may share it: a call, `check` and `destroy` each have it to themselves.
    """

    called = "sym_buffer"
    _ranks: list[RankViews]

    def __init__(self, group: VirtualGroup | None, size: BufferSize, device: torch.device) -> None:
        self.group, self.size, self.device = group, size, device
        self.bytes_per_rank = size.offsets()[1]
        check_real("sym_buffer can't be made")
        with torch.inference_mode(False):  # or only inference could write to the views
            storage = torch.zeros(size.ranks, self.bytes_per_rank, dtype=torch.uint8, device=device)
            self._ranks = [RankViews(size, part) for part in storage]
            self.status = torch.zeros(STATUS_WORDS, dtype=torch.int32, device=device)
        self.lock = Turn()
        """Held by whoever reads or changes what follows, and until a launch is on its stream."""
        self.order = StreamOrder()
        self.program: Callable[[int], Program] = moe
        """Granularity -> what is launched on this buffer. It is looked up at every launch: a test or a measurement puts
        the same kernel, changed, in its place, such as `lambda granularity: moe(granularity).edited(...)`."""
        self.template: Params | None = None
        """Params of every launch on this buffer, but for weights, outputs and recipe; the first launch makes them."""
        self.plans: dict[tuple[Any, ...], LaunchPlan] = {}
        """Launch plans of `fp8_mega_moe`, by recipe and weights; the oldest first."""
        if group is None:
            self.__dict__.update(vars(self._ranks[0]))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    def require(self) -> None:
        """Raises ConfigError when the buffer was destroyed."""
        if not self._ranks:
            raise ConfigError("sym_buffer was destroyed; it must be alive: make a new one")

    def rank(self, r: int) -> RankViews:
        """The views of one rank.

        Args:
            r: the rank, in [0, R).

        Raises:
            ConfigError: there is no such rank, or the buffer was destroyed.
        """
        self.require()
        r = integer("rank", r)
        if not 0 <= r < self.size.ranks:
            raise ConfigError(f"rank = {r} must be in [0, {self.size.ranks})")
        return self._ranks[r]

    def destroy(self) -> None:
        """Frees the memory; the views and the launch plans are gone. A second call does nothing.

        Launches on other streams than the one on which the buffer was made have to have ended.
        """
        with self.lock:
            if self.group is None and self._ranks:
                for name in vars(self._ranks[0]):
                    del self.__dict__[name]
            self._ranks.clear()
            self.plans.clear()
            self.template = None

    def check(self) -> None:
        """Waits for the launches so far, on whatever stream, and says whether one of them failed.

        All roles have left a failed launch by then; the counters are cleared, so that the buffer can be used again.
        What is launched between a failure and this call computes nothing.

        Raises:
            KernelTimeout: a role gave up waiting; the message says which, for what, and what it saw.
        """
        self._synchronize()
        with self.lock:
            self._synchronize()  # for what came meanwhile
            if said := waited(self.status):
                for views in self._ranks:
                    for name in names_of("workspace"):
                        getattr(views, name).zero_()
                self.status.zero_()  # last: a replayed graph that comes between computes nothing either
                self._synchronize()  # the next launch may be on another stream
                raise KernelTimeout(said)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
