"""The structs of params.cuh and swiglu.cuh in ctypes: the one argument of the fused kernel."""

from __future__ import annotations

import ctypes
from typing import Any

from kernel.config import MAX_RANKS
from kernel.launch import TensorMap


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


LAYOUT_FIELDS = (
    *("x", "x_sf", "topk_idx", "topk_weights", "slots", "recv_count", "recv_list", "rank_counter", "workspace"),
    *("l1_acts", "l1_acts_sf", "l2_acts", "l2_acts_sf", "pool_source", "pool_weight"),
)
SHAPE_FIELDS = (
    *("ranks", "experts", "experts_local", "topk", "hidden", "intermediate", "capacity", "pool_blocks"),
    *("ring_blocks", "ring_rows"),
)
Layout = _struct("Layout", *((name, ctypes.c_uint64) for name in LAYOUT_FIELDS))
KernelShape = _struct("KernelShape", *((name, ctypes.c_uint32) for name in SHAPE_FIELDS))
Swiglu = _struct("Swiglu", ("clamp", ctypes.c_float), ("clamped", ctypes.c_uint32))
RankParams = _struct(
    "RankParams",
    *((name, TensorMap) for name in ("l1_acts", "w1", "l2_acts", "w2")),
    *((name, ctypes.c_void_p) for name in ("w1_sf", "w2_sf", "y", "stats")),
    ("tokens", ctypes.c_uint32),
    ("unused", ctypes.c_uint32 * 7),
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
