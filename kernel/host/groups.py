"""Groups of ranks, and which of them this version runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megaproof.kernel.host.sizes import MAX_RANKS, ConfigError
from megaproof.kernel.host.values import integer
from megaproof.toolchain.errors import shown


@dataclass(frozen=True)
class VirtualGroup:
    """R ranks on one GPU, which run in one cooperative launch.

    Args:
        size: R, an int in [1, 8].

    Raises:
        ConfigError: size is anything else.
    """

    size: int

    def __post_init__(self) -> None:
        size = integer("group: VirtualGroup size", self.size)
        if not 1 <= size <= MAX_RANKS:
            raise ConfigError(f"group: VirtualGroup size = {size} must be an int in [1, {MAX_RANKS}]")
        object.__setattr__(self, "size", size)


def local_group(group: Any) -> VirtualGroup | None:
    """The group as this version runs it: a process group of one rank is None. Raises ConfigError naming `group`."""
    if group is None or isinstance(group, VirtualGroup):
        return group
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ConfigError(f"group = {shown(group)} must be None, a VirtualGroup or a torch.distributed ProcessGroup")
    if group.size() != 1:
        raise ConfigError(
            f"group = a ProcessGroup of {group.size()} ranks; it must have 1: ranks as processes over NVLink are not "
            "available in this version (VirtualGroup runs up to 8 ranks on one GPU)"
        )
    return None
