"""Weights in the order in which the kernel reads them: tile after tile, each as it will lie in shared memory.

A half tile is 128 rows x 128 bytes of K: 16 KB that one copy brings. `half_tile` of layout.cuh says where it stands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernel.config import BLOCK_K, BLOCK_N, TURN_N

CHUNK, CHUNKS = 16, 8
"""The 128-byte swizzle: chunk c of a row r of a half tile stands at c ^ (r mod 8)."""


def tiled(codes: Tensor, order: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """uint8 [E, N, K] -> the same bytes as [E][N / 256][K / 128][2][128][128], the half tiles swizzled.

    Where N is an odd multiple of 128 the last 128 rows follow as [K / 128][128][128]. The shape stays [E, N, K].
    order: of the rows of an expert [1, N, K], before. Beside the result there is memory for one expert only.
    Raises ValueError.
    """
    experts, _, _ = _sizes(codes)
    out = torch.empty_like(codes, memory_format=torch.contiguous_format)
    for expert in range(experts):
        one = codes[expert : expert + 1]
        out[expert] = _tiled(order(one) if order else one)[0]
    return out


def _tiled(codes: Tensor) -> Tensor:
    experts, n, k = codes.shape
    halves = _swizzled(codes.reshape(experts, n // TURN_N, TURN_N, k // BLOCK_K, CHUNKS, CHUNK))
    pairs = n // BLOCK_N
    whole = halves[:, : 2 * pairs].unflatten(1, (pairs, 2)).permute(0, 1, 4, 2, 3, 5, 6)
    rest = halves[:, 2 * pairs :].permute(0, 1, 3, 2, 4, 5)
    return torch.cat([whole.flatten(1), rest.flatten(1)], dim=1).view(experts, n, k)


def untiled(codes: Tensor) -> Tensor:
    """Inverse of `tiled`. Raises ValueError."""
    experts, n, k = _sizes(codes)
    pairs, blocks = n // BLOCK_N, k // BLOCK_K
    flat = codes.view(experts, n * k)
    whole = flat[:, : pairs * BLOCK_N * k].view(experts, pairs, blocks, 2, TURN_N, CHUNKS, CHUNK)
    rest = flat[:, pairs * BLOCK_N * k :].view(experts, n // TURN_N - 2 * pairs, blocks, TURN_N, CHUNKS, CHUNK)
    halves = torch.cat([whole.permute(0, 1, 3, 4, 2, 5, 6).flatten(1, 2), rest.permute(0, 1, 3, 2, 4, 5)], dim=1)
    return _swizzled(halves).view(experts, n, k)


def _sizes(codes: Tensor) -> tuple[int, int, int]:
    experts, n, k = codes.shape
    for name, size, part in (("weight rows", n, TURN_N), ("weight columns", k, BLOCK_K)):
        if size % part:
            raise ValueError(f"{name} = {size} must be a multiple of {part}")
    return experts, n, k


def _swizzled(halves: Tensor) -> Tensor:
    """Half tiles [E, N / 128, row, K / 128, chunk, byte] with the chunks of each row exchanged; its own inverse."""
    out = torch.empty_like(halves, memory_format=torch.contiguous_format)
    for residue in range(CHUNKS):
        order = torch.arange(CHUNKS, device=halves.device) ^ residue
        out[:, :, residue::CHUNKS] = halves[:, :, residue::CHUNKS].index_select(4, order)
    return out
