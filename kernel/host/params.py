"""The one argument of the fused kernel: the structs of params.cuh and swiglu.cuh in ctypes, and how they are filled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from megaproof.kernel.host.buffer import FIELDS, BufferSize, RankViews
from megaproof.kernel.host.sizes import BOX_ROWS, MAX_RANKS
from megaproof.quant.host_state import neutral
from megaproof.quant.recipe import Recipe
from megaproof.toolchain.launch import TensorMap

Encode = Callable[[Tensor, int], TensorMap]
"""(matrix [rows, columns] of bytes, rows of a box) -> the map that TMA reads: the driver's, or the emulator's."""


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


SHAPE_FIELDS = {
    "num_ranks": "ranks",
    "num_experts": "experts",
    "num_local_experts": "experts_local",
    "num_topk": "topk",
    "hidden": "hidden",
    "intermediate": "intermediate",
    "capacity": "capacity",
    "num_pool_blocks": "pool_blocks",
    "num_ring_blocks": "ring_blocks",
    "num_ring_rows": "ring_rows",
}
"""Field of `Shape` in params.cuh -> attribute of `BufferSize`."""


def _pointers(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, ctypes.c_void_p) for name in names)


Offsets = _struct("Offsets", *((field.name, ctypes.c_uint64) for field in FIELDS))
LayoutParams = _struct("LayoutParams", ("buffer_ptr", ctypes.c_void_p * MAX_RANKS), ("offset", Offsets))
KernelShape = _struct("KernelShape", *((name, ctypes.c_uint32) for name in SHAPE_FIELDS))
Swiglu = _struct("Swiglu", ("clamp", ctypes.c_float), ("is_clamped", ctypes.c_uint32))
GridParams = _struct("GridParams", ("first_rank_idx", ctypes.c_uint32), ("num_ctas_per_rank", ctypes.c_uint32))
BarrierParams = _struct("BarrierParams", ("timeout_ns", ctypes.c_uint64), ("status_ptr", ctypes.c_void_p))
WeightParams = _struct("WeightParams", *_pointers("w1_ptr", "w2_ptr", "w1_sf_ptr", "w2_sf_ptr"))
OutputParams = _struct("OutputParams", *_pointers("y_ptr", "stats_ptr"))
RankParams = _struct(
    "RankParams",
    *((name, TensorMap) for name in ("l1_acts_map", "l2_acts_map")),
    ("weights", WeightParams),
    ("outputs", OutputParams),
    ("num_tokens", ctypes.c_uint32),
    ("unused", ctypes.c_uint32 * 3),
)
Params = _struct(
    "Params",
    ("ranks", RankParams * MAX_RANKS),
    ("layout", LayoutParams),
    ("shape", KernelShape),
    ("swiglu", Swiglu),
    ("grid", GridParams),
    ("barrier", BarrierParams),
)


def of_buffer(size: BufferSize, views: Sequence[RankViews], blocks: int, status: Tensor, encode: Encode) -> Params:
    """The fields that all launches on one buffer share: the layout, the shape, and where each rank's memory is.

    blocks: thread blocks of a rank.
    """
    params = Params(
        layout=LayoutParams(offset=Offsets(**size.offsets()[0])),
        shape=KernelShape(**{name: getattr(size, attribute) for name, attribute in SHAPE_FIELDS.items()}),
        grid=GridParams(num_ctas_per_rank=blocks),
        barrier=BarrierParams(status_ptr=status.data_ptr()),
    )
    for rank, own in enumerate(views):
        params.layout.buffer_ptr[rank] = own.storage.data_ptr()
        params.ranks[rank].l1_acts_map = encode(own.l1_acts, BOX_ROWS)
        params.ranks[rank].l2_acts_map = encode(own.l2_acts, BOX_ROWS)
    return params


def swiglu_of(recipe: Recipe) -> Swiglu:
    """The clamp of a recipe."""
    with neutral(0):  # the rounding to float32 is the host's
        return Swiglu(recipe.clamp or 0.0, recipe.clamp is not None)


def set_weights(own: RankParams, l1: tuple[Tensor, Tensor], l2: tuple[Tensor, Tensor]) -> None:
    """One rank's transformed (codes [E_loc, N, K], scales) of W1 and W2."""
    (w1, w1_sf), (w2, w2_sf) = l1, l2
    own.weights = WeightParams(w1.data_ptr(), w2.data_ptr(), w1_sf.data_ptr(), w2_sf.data_ptr())


def set_outputs(own: RankParams, y: Tensor, counts: Tensor | None) -> None:
    """One rank's y, whose rows are its tokens, and its statistics."""
    own.outputs = OutputParams(y.data_ptr(), None if counts is None else counts.data_ptr())
    own.num_tokens = y.shape[0]
