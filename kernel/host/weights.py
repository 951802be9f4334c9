"""Weights in the order in which the kernel reads them: tile after tile, each as it will lie in shared memory.

A half tile is 128 rows x 128 bytes of K: 16 KB that one copy brings. `half_tile` of layout.cuh says where it stands.
Which row stands where in it is free, since every output has a chain of its own: so that a lane of the tensor core's
accumulators has neighbours, which it stores 16 bytes at a time. Lane q of a quad holds places 8 j + 2 q and + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaproof.kernel.host.sizes import BLOCK_K, BLOCK_N, HALF_N
from megaproof.quant.cast import INTERLEAVE, interleave_gate_up

CHUNK, CHUNKS = 16, 8
"""The 128-byte swizzle: chunk c of a row r of a half tile stands at c ^ (r mod 8)."""


def _gate_up(j: int, q: int, i: int) -> int:
    """Interleaved W1: gates where j is even, ups where it is odd, of 16 neighbouring outputs a lane."""
    group, place = divmod(16 * q + j // 2 * 2 + i, INTERLEAVE)
    return (2 * group + j % 2) * INTERLEAVE + place


def _outputs(j: int, q: int, i: int) -> int:
    """W2: 8 neighbouring outputs a lane in four j, 32 a quad."""
    return j // 4 * 32 + q * 8 + j % 4 * 2 + i


GATE_UP, OUTPUTS = ([row(m // 8, m % 8 // 2, m % 2) for m in range(HALF_N)] for row in (_gate_up, _outputs))
"""Of interleaved W1 and of W2: the row of 128 that stands in each place of a half tile."""


def w1_rows(n: int) -> Tensor:
    """int64 [N]: the row of W1, gate rows then up rows, in each place of its tiles: interleaved by 8, then GATE_UP.

    N a multiple of 128. Raises ValueError.
    """
    return _half_tiles(interleave_gate_up(torch.arange(n, device="cpu")[:, None]))[:, GATE_UP].flatten()


def w2_rows(n: int) -> Tensor:
    """int64 [N]: the row of W2 in each place of its tiles. N a multiple of 128. Raises ValueError."""
    return _half_tiles(torch.arange(n, device="cpu"))[:, OUTPUTS].flatten()


def _half_tiles(rows: Tensor) -> Tensor:
    _check("weight rows", len(rows), HALF_N)
    return rows.view(-1, HALF_N)


def tiled(codes: Tensor, rows: Tensor) -> Tensor:
    """uint8 [E, N, K], rows of [N] -> the same bytes as [E][N / 256][K / 128][2][128][128], the half tiles swizzled.

    Where N is an odd multiple of 128 the last 128 rows follow as [K / 128][128][128]. The shape stays [E, N, K].
    rows: which stands in each place, `w1_rows` or `w2_rows`. Beside the result there is memory for one expert only.
    Raises ValueError.
    """
    experts, _, _ = _sizes(codes)
    out = torch.empty_like(codes, memory_format=torch.contiguous_format)
    rows = rows.to(codes.device)
    for expert in range(experts):
        out[expert] = _tiled(codes[expert].index_select(0, rows)[None])[0]
    return out


def _tiled(codes: Tensor) -> Tensor:
    experts, n, k = codes.shape
    halves = _swizzled(codes.reshape(experts, n // HALF_N, HALF_N, k // BLOCK_K, CHUNKS, CHUNK))
    pairs = n // BLOCK_N
    whole = halves[:, : 2 * pairs].unflatten(1, (pairs, 2)).permute(0, 1, 4, 2, 3, 5, 6)
    rest = halves[:, 2 * pairs :].permute(0, 1, 3, 2, 4, 5)
    return torch.cat([whole.flatten(1), rest.flatten(1)], dim=1).view(experts, n, k)


def untiled(codes: Tensor, rows: Tensor) -> Tensor:
    """Inverse of `tiled`. Raises ValueError."""
    experts, n, k = _sizes(codes)
    pairs, blocks = n // BLOCK_N, k // BLOCK_K
    flat = codes.view(experts, n * k)
    whole = flat[:, : pairs * BLOCK_N * k].view(experts, pairs, blocks, 2, HALF_N, CHUNKS, CHUNK)
    rest = flat[:, pairs * BLOCK_N * k :].view(experts, n // HALF_N - 2 * pairs, blocks, HALF_N, CHUNKS, CHUNK)
    halves = torch.cat([whole.permute(0, 1, 3, 4, 2, 5, 6).flatten(1, 2), rest.permute(0, 1, 3, 2, 4, 5)], dim=1)
    return _swizzled(halves).view(experts, n, k).index_select(1, rows.argsort().to(codes.device))


def _sizes(codes: Tensor) -> tuple[int, int, int]:
    experts, n, k = codes.shape
    _check("weight rows", n, HALF_N)
    _check("weight columns", k, BLOCK_K)
    return experts, n, k


def _check(name: str, size: int, part: int) -> None:
    if size % part:
        raise ValueError(f"{name} = {size} must be a multiple of {part}")


def _swizzled(halves: Tensor) -> Tensor:
    """Half tiles [E, N / 128, row, K / 128, chunk, byte] with the chunks of each row exchanged; its own inverse."""
    out = torch.empty_like(halves, memory_format=torch.contiguous_format)
    for residue in range(CHUNKS):
        order = torch.arange(CHUNKS, device=halves.device) ^ residue
        out[:, :, residue::CHUNKS] = halves[:, :, residue::CHUNKS].index_select(4, order)
    return out
