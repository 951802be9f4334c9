"""What a rank's part of the symmetric buffer holds: a table of its fields, and all that follows from the table.

A field is one row of FIELDS. Offsets and bytes (`BufferSize.offsets`), the views (`RankViews`), `Offsets` of the
kernel's parameters and what is cleared after a failure are derived from it. The reference has a table of its own
(reference/layout.py), and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from megaproof.kernel.host.memory import kind
from megaproof.kernel.host.sizes import (
    BLOCK_K,
    BLOCK_M,
    GROUP,
    MAX_EXPERTS,
    MAX_RANKS,
    RING_BLOCKS,
    WAVE_BLOCKS,
    WORKSPACE_BYTES,
    ConfigError,
    aligned,
)

Region = Literal["inputs", "peers", "workspace", "ring", "pool"]
"""What a field is for: `inputs` are written by the caller and read by all ranks; `peers` are written by other ranks, by
every launch anew; `workspace` are counters, which have to be as the last launch left them and are cleared when it
failed; `ring` holds activations of the pool blocks under way; `pool` says of each pool row where it came from."""


@dataclass(frozen=True)
class BufferSize:
    """What a symmetric buffer is made for.

    Raises:
        ConfigError: naming the argument of `get_symm_buffer_for_mega_moe`, its value and the rule that it breaks.
    """

    ranks: int
    experts: int
    topk: int
    hidden: int
    intermediate: int
    capacity: int
    """Tokens of a rank at most."""
    ring: int | None = None
    """Pool blocks that activations have memory for; None: RING_BLOCKS, or fewer where fewer can fill."""

    def __post_init__(self) -> None:
        for name, value in (("hidden", self.hidden), ("intermediate_hidden", self.intermediate)):
            if not 0 < value < 1 << 31 or value % 128:
                raise ConfigError(f"{name} = {value} must be a positive multiple of 128, below 2^31")
        if not 1 <= self.ranks <= MAX_RANKS:
            raise ConfigError(f"ranks = {self.ranks} must be in [1, {MAX_RANKS}]")
        if not 0 < self.experts <= MAX_EXPERTS or self.experts % self.ranks:
            rule = f"a multiple of ranks = {self.ranks}, at most {MAX_EXPERTS}"
            raise ConfigError(f"num_experts = {self.experts} must be {rule}")
        if not 1 <= self.topk <= 32:
            raise ConfigError(f"num_topk = {self.topk} must be in [1, 32]")
        if self.capacity <= 0 or self.capacity * self.topk >= 1 << 31:
            raise ConfigError(f"num_max_tokens_per_rank = {self.capacity} must be positive, times topk below 2^31")
        if self.pool_blocks * BLOCK_M >= 1 << 32:
            raise ConfigError(f"num_max_tokens_per_rank = {self.capacity}: the ranks' slots must be below 2^32")
        if self.ring is not None and self.ring < min(2 * WAVE_BLOCKS, self.pool_blocks):
            least = min(2 * WAVE_BLOCKS, self.pool_blocks)
            raise ConfigError(f"ring_blocks = {self.ring} must be at least {least}")

    def check_fits(self, memory: int) -> None:
        """Raises ConfigError where a device with so many bytes can't hold the buffer of all ranks."""
        total = self.ranks * self.offsets()[1]
        if total > memory:
            rule = f"the device has {memory}; they must fit"
            raise ConfigError(f"num_max_tokens_per_rank = {self.capacity}: a buffer of {total} bytes, and {rule}")

    @property
    def experts_local(self) -> int:
        return self.experts // self.ranks

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool: every slot of every rank may come here, each expert's last block may be part-filled."""
        slots = self.ranks * self.capacity * self.topk
        return (slots + self.experts_local * (BLOCK_M - 1)) // BLOCK_M

    @property
    def pool_rows(self) -> int:
        return self.pool_blocks * BLOCK_M

    @property
    def ring_blocks(self) -> int:
        """Blocks that activations have memory for."""
        return min(self.pool_blocks, RING_BLOCKS if self.ring is None else self.ring)

    @property
    def ring_rows(self) -> int:
        return self.ring_blocks * BLOCK_M

    def offsets(self) -> tuple[dict[str, int], int]:
        """(name -> byte offset of each field in a rank's memory, total bytes); each begins at a multiple of 1,024."""
        offsets, end = {}, 0
        for field in FIELDS:
            offsets[field.name], end = end, aligned(end + field.bytes(self))
        return offsets, end


@dataclass(frozen=True)
class Field:
    """A row of the table."""

    name: str
    """Also the name of its offset in `Offsets` of params.cuh, and of its view."""
    dtype: torch.dtype
    shape: Callable[[BufferSize], tuple[int, ...]]
    """As it lies in memory, contiguous."""
    region: Region
    transposed: bool = False
    """Whether the view shows its two dimensions exchanged."""

    def bytes(self, size: BufferSize) -> int:
        """Bytes of a rank."""
        return self.dtype.itemsize * torch.Size(self.shape(size)).numel()


FP8, F32, U32 = torch.float8_e4m3fn, torch.float32, torch.int32
FIELDS = (
    Field("x", FP8, lambda s: (s.capacity, s.hidden), "inputs"),
    Field("x_sf", F32, lambda s: (s.capacity, s.hidden // BLOCK_K), "inputs"),
    Field("topk_idx", torch.int64, lambda s: (s.capacity, s.topk), "inputs"),
    Field("topk_weights", F32, lambda s: (s.capacity, s.topk), "inputs"),
    Field("slots", torch.bfloat16, lambda s: (s.topk, s.capacity, s.hidden), "peers"),
    Field("recv_count", U32, lambda s: (s.ranks, s.experts_local), "peers"),
    Field("recv_list", U32, lambda s: (s.ranks, s.experts_local, s.capacity * s.topk), "peers"),
    Field("rank_counter", U32, lambda s: (1,), "workspace"),
    Field("workspace", U32, lambda s: (WORKSPACE_BYTES // 4 + 3 * s.pool_blocks,), "workspace"),
    Field("l1_acts", FP8, lambda s: (s.ring_rows, s.hidden), "ring"),
    Field("l1_acts_sf", F32, lambda s: (s.hidden // BLOCK_K, s.ring_rows), "ring", transposed=True),
    Field("l2_acts", FP8, lambda s: (s.ring_rows, s.intermediate), "ring"),
    Field("l2_acts_sf", F32, lambda s: (s.intermediate // GROUP, s.ring_rows), "ring", transposed=True),
    Field("pool_source", U32, lambda s: (s.pool_rows, 2), "pool"),
    Field("pool_weight", F32, lambda s: (s.pool_rows,), "pool"),
)
"""In the order in which they lie, which is that of `Offsets` in params.cuh too."""


def names_of(region: Region) -> tuple[str, ...]:
    """The fields of a region, in order."""
    return tuple(field.name for field in FIELDS if field.region == region)


VIEWS = frozenset({"storage", *(field.name for field in FIELDS)})
MADE_FOR = frozenset({"group", "size", "device", "bytes_per_rank"})
"""Attributes that say what a buffer is."""


class Fixed:
    """An object whose views are written to and never exchanged, and of which there is one."""

    called: ClassVar[str]
    """What errors call it."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises ConfigError for a view, which the kernel would not see, and for what the memory was made for."""
        if name in VIEWS and value is not self.__dict__.get(name, self):  # `views.x_sf *= 2` sets what it is already
            raise ConfigError(
                f"{self.called}.{name} = {kind(value)}: a view can't be exchanged, the kernel would not see it; "
                f"{self.called}.{name}[:] = ... must be used, which writes"
            )
        if name in MADE_FOR and name in self.__dict__:
            raise ConfigError(f"{self.called}.{name} must stay as it was made; make another buffer")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise ConfigError(f"{self.called}.{name} can't be deleted; sym_buffer.destroy() frees the memory")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """`copy`, `deepcopy` and `pickle` come here. Raises ConfigError."""
        raise ConfigError(
            f"{self.called} can't be copied or pickled: launches go to its own memory; get_symm_buffer_for_mega_moe "
            "must make another one"
        )


class RankViews(Fixed):
    """Views of one rank's part of the symmetric buffer, one a field of FIELDS, under its name.

    A caller writes x, x_sf, topk_idx and topk_weights; README says what each holds. Of the others, which a launch
    leaves behind, these can be of use to a caller: l1_acts, l1_acts_sf [ring rows, H/128], l2_acts,
    l2_acts_sf [ring rows, I/64] and slots bfloat16 [K, capacity, H]. l2_acts_sf has a column for 64 activations; after
    a launch of granularity 128 its first I/128 columns are valid.
    """

    called = "sym_buffer.rank(r)"
    storage: Tensor
    """uint8 [bytes of a rank]: all of it."""

    def __init__(self, size: BufferSize, storage: Tensor) -> None:
        offsets, _ = size.offsets()
        views = {"storage": storage}
        for field in FIELDS:
            start = offsets[field.name]
            view = storage[start : start + field.bytes(size)].view(field.dtype).view(field.shape(size))
            views[field.name] = view.t() if field.transposed else view
        self.__dict__.update(views)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...
