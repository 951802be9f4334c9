"""Eq. (1): tokens travel to the ranks of their experts as they are; there is no arithmetic.

Predicts kernel/dispatch.cuh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """Every active slot of every token, in (rank, token, slot) order; int64 [n] each."""

    rank: Tensor
    token: Tensor
    slot: Tensor
    expert: Tensor
    row: Tensor
    """The token's row in the concatenation of all ranks' tokens, in rank order."""

    def __len__(self) -> int:
        return self.rank.shape[0]

    def triples(self) -> Tensor:
        """Returns int64 [n, 3]: (source rank, token, slot) of each row, in the canonical order of every stage."""
        return torch.stack([self.rank, self.token, self.slot], dim=1)

    def of_expert(self, e: int) -> Tensor:
        """Returns int64 [m]: the indices of the rows that expert e receives, ascending."""
        return (self.expert == e).nonzero().squeeze(1)


def routes(topk_idx: Sequence[Tensor]) -> Routes:
    """Returns the active slots of all ranks.

    topk_idx: int64 [T_r, K] by rank, the expert of each slot; a slot with -1 is empty.
    """
    parts, first = [], 0
    for rank, idx in enumerate(topk_idx):
        token, slot = (idx >= 0).nonzero(as_tuple=True)
        parts.append((torch.full_like(token, rank), token, slot, idx[token, slot], first + token))
        first += idx.shape[0]
    return Routes(*(torch.cat(column) for column in zip(*parts, strict=True)))


def pull(x: Sequence[Tensor], x_sf: Sequence[Tensor], where: Routes) -> tuple[Tensor, Tensor]:
    """Eq. (1): returns the routed rows, copied from their source ranks: codes uint8 [n, H], scales float32 [n, H/128].

    x: uint8 [T_r, H] by rank. x_sf: float32 [T_r, H/128] by rank.
    """
    return torch.cat(list(x))[where.row], torch.cat(list(x_sf))[where.row]
