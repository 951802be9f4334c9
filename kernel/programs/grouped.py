"""The layer's two grouped GEMMs with their epilogues, from torch: dispatched pool rows in, output rows out.

A pool holds the rows of one expert after the other, each expert's rows padded to blocks of 128.
`tests/kernel/programs/test_grouped.py` holds both kernels to the reference, bit for bit.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof import HOME
from megaproof.kernel.host.sizes import BLOCK_N, GEMM_DEFINES, GROUP, ROLES, THREADS, pipeline_bytes
from megaproof.kernel.host.sizes import check_recipe as check_any
from megaproof.kernel.programs.dense import BLOCK
from megaproof.quant.recipe import Recipe
from megaproof.toolchain.launch import TensorMap, require_device, tensor_map
from megaproof.toolchain.program import Program

PROGRAM = Program(
    name="grouped",
    sources=(HOME / "kernel" / "programs" / "grouped.cu",),
    entries=("grouped_l1_fast", "grouped_l1_precise", "grouped_l2"),
    defines={**GEMM_DEFINES, "SHARED_BYTES": pipeline_bytes()},
    shared=pipeline_bytes(),
    static=0,
    gemm=("grouped_",),
    roles=ROLES,
)


class _SwigluParams(ctypes.Structure):
    _fields_ = (("clamp", ctypes.c_float), ("is_clamped", ctypes.c_uint32))


class GroupedParams(ctypes.Structure):
    """`GroupedParams` of grouped.cu."""

    _fields_ = (
        ("a", TensorMap),
        ("b", TensorMap),
        *((n, ctypes.c_void_p) for n in ("a_sf", "b_sf", "block_expert", "weight", "l2_acts", "l2_acts_sf", "out")),
        *((n, ctypes.c_uint32) for n in ("rows", "n", "k")),
        ("swiglu", _SwigluParams),
        ("padding", ctypes.c_uint32 * 13),
    )


@dataclass(frozen=True)
class Pool:
    """Where the rows of each expert stand: rows int64 [n], the pool row of each routed row; experts int32 by block."""

    rows: Tensor
    block_expert: Tensor

    @property
    def size(self) -> int:
        return BLOCK * self.block_expert.shape[0]


def make_pool(expert: Tensor) -> Pool:
    """The pool of routed rows; expert int64 [n] is the local expert of each."""
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert)
    blocks = (counts + BLOCK - 1) // BLOCK
    first = (blocks.cumsum(0) - blocks) * BLOCK
    place = torch.arange(len(expert), device=expert.device) - (counts.cumsum(0) - counts)[expert[order]]
    rows = torch.empty_like(expert)
    rows[order] = first[expert[order]] + place
    ids = torch.arange(len(counts), device=expert.device)
    return Pool(rows, torch.repeat_interleave(ids, blocks).to(torch.int32))


def check_recipe(recipe: Recipe) -> Recipe:
    """The recipe, if these kernels compute it: one scale covers 64 activations. Raises RecipeError by field."""
    return check_any(recipe, (GROUP,))


def gemm1(
    recipe: Recipe, pool: Pool, acts: Tensor, acts_sf: Tensor, weight: Tensor, w1: Tensor, w1_sf: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. (2) to (5): (l2_acts uint8 [rows, I], l2_acts_sf float32 [I/64, rows]) of every pool row.

    acts uint8 [rows, H], acts_sf float32 [H/128, rows], weight float32 [rows]; w1 uint8 [E, 2I, H] in the order of
    `tiles.w1_rows`, w1_sf float32 [E, 2I/128, H/128] in their own. Raises RecipeError.
    """
    check_recipe(recipe)
    experts, n, k = w1.shape
    l2_acts = torch.empty(pool.size, n // 2, dtype=torch.uint8, device=acts.device)
    l2_acts_sf = torch.empty(n // 128, pool.size, device=acts.device)
    clamped = recipe.clamp is not None
    params = GroupedParams(
        tensor_map(acts, BLOCK),
        tensor_map(w1.view(experts * n, k), BLOCK),
        acts_sf.data_ptr(),
        w1_sf.data_ptr(),
        pool.block_expert.data_ptr(),
        weight.data_ptr(),
        l2_acts.data_ptr(),
        l2_acts_sf.data_ptr(),
        None,
        pool.size,
        n,
        k,
        _SwigluParams(recipe.clamp if clamped else 0.0, clamped),
    )
    _launch("grouped_l1_" + recipe.silu, params)
    return l2_acts, l2_acts_sf


def gemm2(pool: Pool, acts: Tensor, acts_sf: Tensor, w2: Tensor, w2_sf: Tensor) -> Tensor:
    """Eq. (6), (7): bfloat16 [rows, H] of every pool row.

    acts uint8 [rows, I], acts_sf float32 [I/64, rows]; w2 uint8 [E, H, I], w2_sf float32 [E, H/128, I/128].
    """
    experts, n, k = w2.shape
    out = torch.empty(pool.size, n, dtype=torch.bfloat16, device=acts.device)
    maps = tensor_map(acts, BLOCK), tensor_map(w2.view(experts * n, k), BLOCK)
    pointers = (acts_sf.data_ptr(), w2_sf.data_ptr(), pool.block_expert.data_ptr(), None, None, None, out.data_ptr())
    _launch("grouped_l2", GroupedParams(*maps, *pointers, pool.size, n, k))
    return out


def _launch(name: str, params: GroupedParams) -> None:
    tiles = params.rows // BLOCK * -(-params.n // BLOCK_N)
    if tiles:
        PROGRAM.library().kernel(name)(params, min(tiles, require_device().sms), THREADS, pipeline_bytes())
