"""Eq. (9): how many (rank, token, slot) each local expert received; int32, accumulated over calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaproof.reference.dispatch import Routes


def accumulate(stats: Sequence[Tensor] | None, where: Routes, ranks: int, experts_per_rank: int) -> list[Tensor]:
    """Eq. (9): new int32 [E_loc] by rank; the old counts are not written. Masked slots do not count."""
    received = torch.bincount(where.expert, minlength=ranks * experts_per_rank).to(torch.int32)
    counts = received.split(experts_per_rank)
    return [count.clone() if stats is None else stats[rank] + count for rank, count in enumerate(counts)]
