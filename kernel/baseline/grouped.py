"""A grouped FP8 GEMM on the tensor cores, in Triton: Eq. (3), (6) with one promotion for each scaled block.

The rows of a pool stand sorted by expert; a table says which rows of which expert a tile holds, so one launch serves
all experts and no count leaves the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaproof.quant.cast import BLOCK

TILE_ROWS = (64, 128)
"""Rows of a tile: 64 is the least that wgmma takes (less falls back to mma.sync, which sums FP8 otherwise)."""
CONFIGS = [
    triton.Config({"TILE_N": tile_n}, num_warps=warps, num_stages=stages)
    for tile_n, warps, stages in ((64, 4, 5), (128, 4, 4), (128, 8, 4), (128, 8, 3))
]
"""A tile of columns stays inside one 128-wide block of weights, which has one scale factor."""
BAND = 8
"""Tiles of rows that share the weights of a tile of columns before the next columns are taken."""


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile for a pool of this size."""
    return TILE_ROWS[0] if rows <= experts * TILE_ROWS[0] else TILE_ROWS[1]


def tile_table(offsets: Tensor, rows: int, tile: int) -> Tensor:
    """int32 [tiles, 3]: expert, first row and end of each tile; expert -1 where a tile is not needed.

    offsets int64 [E+1]: first pool row of each expert; rows bounds offsets[-1], so that the grid needs no count.
    """
    experts = offsets.shape[0] - 1
    needed = (offsets.diff() + tile - 1) // tile
    last = needed.cumsum(0)
    number = torch.arange(min(-(-rows // tile) + experts, rows), device=offsets.device)
    expert = torch.searchsorted(last, number, right=True)
    known = expert.clamp(max=experts - 1)
    first = offsets[known] + (number - (last - needed)[known]) * tile
    expert = torch.where(expert < experts, expert, -1)
    return torch.stack([expert, first, offsets[known + 1]], dim=1).to(torch.int32)


@triton.autotune(configs=CONFIGS, key=["columns", "depth", "GROUP", "TILE_M"])
@triton.jit
def grouped_kernel(
    a: tl.tensor,  # float8e4nv [rows, depth]
    a_sf: tl.tensor,  # float32 [rows, depth/GROUP]
    w: tl.tensor,  # float8e4nv [E, columns, depth]
    w_sf: tl.tensor,  # float32 [E, columns/128, depth/128]
    out: tl.tensor,  # float32 or bfloat16 [rows, columns]
    tiles: tl.tensor,  # int32 [count, 3]
    count: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    GROUP: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """One tile: total = fma(scale, chain of k32 steps from 0, total) for each GROUP of the depth."""
    band = tl.program_id(0) // (BAND * (columns // TILE_N))
    width = tl.minimum(count - band * BAND, BAND)
    inside = tl.program_id(0) % (BAND * (columns // TILE_N))
    tile, n = band * BAND + inside % width, inside // width
    expert = tl.load(tiles + tile * 3)
    if expert < 0:
        return
    row = tl.load(tiles + tile * 3 + 1) + tl.arange(0, TILE_M)
    valid = row < tl.load(tiles + tile * 3 + 2)
    row = row.to(tl.int64)
    column = n * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, GROUP)

    w_row = expert.to(tl.int64) * columns + column
    a_at = a + row[:, None] * depth + k[None, :]
    w_at = w + w_row[None, :] * depth + k[:, None]
    a_sf_at = a_sf + row * (depth // GROUP)
    w_sf_at = w_sf + (expert.to(tl.int64) * (columns // 128) + n * TILE_N // 128) * (depth // 128)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for block in range(depth // GROUP):
        a_part = tl.load(a_at, mask=valid[:, None], other=0.0)
        w_part = tl.load(w_at)
        scale = tl.load(a_sf_at + block, mask=valid, other=0.0) * tl.load(w_sf_at + block * GROUP // 128)
        acc = tl.dot(a_part, w_part, max_num_imprecise_acc=GROUP)  # no addition outside the tensor core in a block
        total = tl.fma(tl.broadcast_to(scale[:, None], (TILE_M, TILE_N)), acc, total)
        a_at += GROUP
        w_at += GROUP
    tl.store(out + row[:, None] * columns + column[None, :], total.to(out.dtype.element_ty), mask=valid[:, None])


def grouped_gemm(a: Tensor, a_sf: Tensor, w: Tensor, w_sf: Tensor, tiles: Tensor, tile: int, out: Tensor) -> None:
    """out[i] = promoted row i of a times its expert's weights; rows outside every tile are not written.

    a uint8 [n, K], a_sf float32 [n, K/group], w uint8 [E, N, K], w_sf float32 [E, N/128, K/128], tiles from
    `tile_table` for `tile` rows, out float32 or bfloat16 [n, N].
    """
    columns, depth, count = w.shape[1], w.shape[2], tiles.shape[0]
    group = depth // a_sf.shape[1]
    if group not in (BLOCK // 2, BLOCK) or columns % BLOCK or depth % BLOCK:
        raise ValueError(f"a_sf is {list(a_sf.shape)} and w is {list(w.shape)}: a scale must cover 64 or 128 columns")
    if count == 0:
        return
    fp8 = (a.view(torch.float8_e4m3fn), a_sf, w.view(torch.float8_e4m3fn), w_sf)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (count * (columns // meta["TILE_N"]),)

    grouped_kernel[grid](*fp8, out, tiles, count, columns, depth, GROUP=group, TILE_M=tile, BAND=BAND)
