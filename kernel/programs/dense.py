"""The dense promoted GEMM from torch: the kernel's main loop alone, to prove and to time.

`tests/kernel/programs/test_dense.py` holds it to the model, bit for bit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megaproof import HOME
from megaproof.kernel.host.sizes import BLOCK_M, BLOCK_N, GEMM_DEFINES, ROLES, THREADS, pipeline_bytes
from megaproof.toolchain.launch import TensorMap, require_device, tensor_map
from megaproof.toolchain.program import Program

PROGRAM = Program(
    name="dense",
    sources=(HOME / "kernel" / "programs" / "dense.cu",),
    entries=("dense_128", "dense_64"),
    defines={**GEMM_DEFINES, "SHARED_BYTES": pipeline_bytes()},
    shared=pipeline_bytes(),
    static=0,
    gemm=("dense_",),
    roles=ROLES,
)
BLOCK = 128
"""Multiple of M, N and K."""


class DenseParams(ctypes.Structure):
    """`DenseParams` of dense.cu."""

    _fields_ = (
        ("a", TensorMap),
        ("b", TensorMap),
        *((name, ctypes.c_void_p) for name in ("a_sf", "b_sf", "d")),
        *((name, ctypes.c_uint32) for name in ("m", "n", "k")),
        ("padding", ctypes.c_uint32 * 7),
    )


def dense(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, group: int, out: Tensor | None = None) -> Tensor:
    """Eq. (3), (6): sum over the groups of K of fma(fl(a_sf * b_sf), chain, sum), on the tensor core; float32 [M, N].

    a uint8 [M, K], a_sf float32 [K/group, M] (its scales side by side, as TMA wants them), b uint8 [N, K],
    b_sf float32 [N/128, K/128]; M, N, K multiples of 128; group 64 or 128. Raises ValueError naming what does not fit.
    """
    (m, k), n = a.shape, b.shape[0]
    for name, size in (("M", m), ("N", n), ("K", k)):
        if size <= 0 or size % BLOCK:
            raise ValueError(f"{name} = {size} must be a positive multiple of {BLOCK}")
    shapes = {"a": (a, (m, k)), "b": (b, (n, k)), "b_sf": (b_sf, (n // BLOCK, k // BLOCK))}
    for name, (tensor, shape) in (shapes | {"a_sf": (a_sf, (k // group, m))}).items():
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} is {list(tensor.shape)}; it must be contiguous {list(shape)}")
    d = torch.empty(m, n, device=a.device) if out is None else out
    maps = (tensor_map(a, BLOCK), tensor_map(b, BLOCK))
    params = DenseParams(*maps, a_sf.data_ptr(), b_sf.data_ptr(), d.data_ptr(), m, n, k)
    tiles = m // BLOCK_M * -(-n // BLOCK_N)
    grid = min(tiles, require_device().sms)
    PROGRAM.library().kernel(f"dense_{group}")(params, grid, THREADS, pipeline_bytes())
    return d
