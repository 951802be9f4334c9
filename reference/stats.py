"""Eq. (9): how many (rank, token, slot) each local expert has received; int32, added up over calls.

Predicts kernel/stats.cuh.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaproof.reference.dispatch import Routes


def accumulate(stats: Sequence[Tensor] | None, where: Routes, ranks: int, experts_per_rank: int) -> list[Tensor]:
    """Eq. (9): returns the new counts, int32 [E_loc] by rank. Empty slots do not count.

    stats: the counts so far, which are not written; None: zeros.
    """
    received = torch.bincount(where.expert, minlength=ranks * experts_per_rank).to(torch.int32)
    counts = received.split(experts_per_rank)
    return [count.clone() if stats is None else stats[rank] + count for rank, count in enumerate(counts)]
