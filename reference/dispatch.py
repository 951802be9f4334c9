"""Eq. (1): tokens travel to the ranks of their experts as they are; no arithmetic."""

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
    """The token's row when the ranks' tokens stand one after the other."""

    def __len__(self) -> int:
        return self.rank.shape[0]

    def triples(self) -> Tensor:
        """int64 [n, 3]: (source rank, token, slot), the canonical order of every stage."""
        return torch.stack([self.rank, self.token, self.slot], dim=1)

    def of_expert(self, e: int) -> Tensor:
        """Indices of the rows that expert e receives, ascending: int64 [m]."""
        return (self.expert == e).nonzero().squeeze(1)


def routes(topk_idx: Sequence[Tensor]) -> Routes:
    """The active slots: topk_idx int64 [T_r, K] by rank, -1 = masked."""
    parts, first = [], 0
    for rank, idx in enumerate(topk_idx):
        token, slot = (idx >= 0).nonzero(as_tuple=True)
        parts.append((torch.full_like(token, rank), token, slot, idx[token, slot], first + token))
        first += idx.shape[0]
    return Routes(*(torch.cat(column) for column in zip(*parts, strict=True)))


def pull(x: Sequence[Tensor], x_sf: Sequence[Tensor], where: Routes) -> tuple[Tensor, Tensor]:
    """Eq. (1): the routed rows, (uint8 [n, H], float32 [n, H/128]), copied from their source ranks."""
    return torch.cat(list(x))[where.row], torch.cat(list(x_sf))[where.row]
