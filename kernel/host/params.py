"""The structs of params.cuh and swiglu.cuh in ctypes: the one argument of the fused kernel, and how it is filled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from megaproof.kernel.host.buffer import FIELDS, BufferSize, RankViews
from megaproof.kernel.host.sizes import BOX_ROWS, MAX_RANKS
from megaproof.quant.recipe import Recipe
from megaproof.toolchain.launch import TensorMap

Encode = Callable[[Tensor, int], TensorMap]
"""(matrix [rows, columns] of bytes, rows of a box) -> the map that TMA reads: the driver's, or the emulator's."""


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


SHAPE_FIELDS = (
    *("ranks", "experts", "experts_local", "topk", "hidden", "intermediate", "capacity", "pool_blocks"),
    *("ring_blocks", "ring_rows"),
)
Layout = _struct("Layout", *((field.name, ctypes.c_uint64) for field in FIELDS))
KernelShape = _struct("KernelShape", *((name, ctypes.c_uint32) for name in SHAPE_FIELDS))
Swiglu = _struct("Swiglu", ("clamp", ctypes.c_float), ("clamped", ctypes.c_uint32))
RankParams = _struct(
    "RankParams",
    *((name, TensorMap) for name in ("l1_acts", "l2_acts")),
    *((name, ctypes.c_void_p) for name in ("w1", "w2", "w1_sf", "w2_sf", "y", "stats")),
    ("tokens", ctypes.c_uint32),
    ("unused", ctypes.c_uint32 * 3),
)
Params = _struct(
    "Params",
    ("rank", RankParams * MAX_RANKS),
    ("buffer", ctypes.c_void_p * MAX_RANKS),
    ("layout", Layout),
    ("shape", KernelShape),
    ("swiglu", Swiglu),
    ("first_rank", ctypes.c_uint32),
    ("blocks_per_rank", ctypes.c_uint32),
    ("timeout_ns", ctypes.c_uint64),
    ("status", ctypes.c_void_p),
)


def of_buffer(size: BufferSize, views: Sequence[RankViews], blocks: int, status: Tensor, encode: Encode) -> Params:
    """What all launches on one buffer share: layout, shape, where each rank's memory is. blocks: of a rank."""
    params = Params(
        layout=Layout(**size.offsets()[0]),
        shape=KernelShape(**{name: getattr(size, name) for name in SHAPE_FIELDS}),
        blocks_per_rank=blocks,
        status=status.data_ptr(),
    )
    for rank, own in enumerate(views):
        params.buffer[rank] = own.storage.data_ptr()
        params.rank[rank].l1_acts = encode(own.l1_acts, BOX_ROWS)
        params.rank[rank].l2_acts = encode(own.l2_acts, BOX_ROWS)
    return params


def swiglu_of(recipe: Recipe) -> Swiglu:
    """The clamp of a recipe."""
    return Swiglu(recipe.clamp or 0.0, recipe.clamp is not None)


def set_weights(own: RankParams, l1: tuple[Tensor, Tensor], l2: tuple[Tensor, Tensor]) -> None:
    """One rank's transformed (codes [E_loc, N, K], scales) of W1 and W2."""
    (w1, w1_sf), (w2, w2_sf) = l1, l2
    own.w1, own.w2 = w1.data_ptr(), w2.data_ptr()
    own.w1_sf, own.w2_sf = w1_sf.data_ptr(), w2_sf.data_ptr()


def set_outputs(own: RankParams, y: Tensor, counts: Tensor | None) -> None:
    """One rank's y, whose rows are its tokens, and its statistics."""
    own.y, own.tokens = y.data_ptr(), y.shape[0]
    own.stats = None if counts is None else counts.data_ptr()
