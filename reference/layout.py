"""Where rows go: pool rows of the received tokens, slot rows of the combine buffer, fields of the symmetric buffer.

Predicts kernel/layout.cuh. Indices count elements of a field; functions of indices take int or int64 tensors alike.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

BLOCK_M = 128
"""Rows of a pool block; it holds rows of one expert only, so that a tile needs one expert's weights."""

Index = TypeVar("Index", int, Tensor)
Field = tuple[torch.dtype, tuple[int, ...]]


def first_rows(counts: Tensor, block_m: int = BLOCK_M) -> Tensor:
    """Returns int64 [R, E_loc]: the pool row at which the rows of each (source, local expert) begin.

    counts: int64 [R, E_loc], the rows of each. An expert begins with a new pool block; its rows are ordered by source.
    """
    rows = counts.sum(0)
    blocks = (rows + block_m - 1) // block_m
    return (blocks.cumsum(0) - blocks) * block_m + counts.cumsum(0) - counts


def pool_rows(counts: Tensor, block_m: int = BLOCK_M) -> tuple[Tensor, Tensor]:
    """Returns (pool row, local expert) of every received row, ascending; int64 [n] each.

    counts: int64 [E_loc], over all sources. The order of an expert's rows from one source depends on arrival; which
    pool rows they take does not.
    """
    expert = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    inside = torch.arange(len(expert), device=counts.device) - (counts.cumsum(0) - counts)[expert]
    return first_rows(counts[None], block_m)[0, expert] + inside, expert


def ring_row(block: Index, row_in_block: Index, ring_blocks: int) -> Index:
    """Returns the row of the ring that holds the activations of a pool block's row: the blocks take places in turn.

    The source and the weight of a row are found by its pool row instead.
    """
    return block % ring_blocks * BLOCK_M + row_in_block


def owner(expert: Index, experts_local: int) -> Index:
    """Returns the rank of an expert of the layer: ranks own experts in ascending order, `experts_local` each."""
    return expert // experts_local


def local(expert: Index, experts_local: int) -> Index:
    """Returns the number of an expert of the layer among those of its rank."""
    return expert % experts_local


def entry_of(token: Index, slot: Index, topk: int) -> Index:
    """Returns token * K + slot, the number by which ranks name an active slot of a source rank."""
    return token * topk + slot


def slot_row(entry: Index, topk: int, capacity: int) -> Index:
    """Returns the row of an entry in `slots` of its source rank, [K * capacity, H]: all of slot 0 come first."""
    return entry % topk * capacity + entry // topk


def recv_count(source: Index, expert: Index, experts_local: int) -> Index:
    """Returns the index into `recv_count` of the number of rows that a source rank sends to a local expert."""
    return source * experts_local + expert


def recv_list(source: Index, expert: Index, experts_local: int, capacity: int, topk: int) -> Index:
    """Returns the index into `recv_list` of the first entry of (source, local expert); a list can hold all slots."""
    return recv_count(source, expert, experts_local) * capacity * topk


def fields(
    ranks: int,
    experts: int,
    topk: int,
    hidden: int,
    intermediate: int,
    capacity: int,
    pool_blocks: int,
    ring_blocks: int,
) -> dict[str, Field]:
    """name -> (dtype, shape) of each field of a rank's symmetric buffer, in order: `Offsets` of kernel/params.cuh.

    Of `workspace` only the three counters of each pool block are given; what stands before them is the kernel's own.
    Activations have memory for `ring_blocks` pool blocks.
    """
    t, k, h, i = capacity, topk, hidden, intermediate
    rows, ring = pool_blocks * BLOCK_M, ring_blocks * BLOCK_M
    fp8, f32, u32 = torch.float8_e4m3fn, torch.float32, torch.int32
    return {
        "x": (fp8, (t, h)),
        "x_sf": (f32, (t, h // 128)),
        "topk_idx": (torch.int64, (t, k)),
        "topk_weights": (f32, (t, k)),
        "slots": (torch.bfloat16, (k, t, h)),
        "recv_count": (u32, (ranks, experts // ranks)),
        "recv_list": (u32, (ranks, experts // ranks, t * k)),
        "rank_counter": (u32, (1,)),
        "workspace": (u32, (3, pool_blocks)),
        "l1_acts": (fp8, (ring, h)),
        "l1_acts_sf": (f32, (h // 128, ring)),  # transposed: a tile's scales of one K block are contiguous
        "l2_acts": (fp8, (ring, i)),
        "l2_acts_sf": (f32, (i // 64, ring)),
        "pool_source": (u32, (rows, 2)),
        "pool_weight": (f32, (rows,)),
    }
