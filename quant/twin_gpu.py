"""The atoms compiled for a GPU: same names, same contracts, same bits as `quant/atoms.py`.

`quant/twin.cu` goes through the project's own build (NVRTC) and launch. It uses neither the tensor core nor the
special-function unit: it predicts them.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from megaproof.quant import atoms, tables
from megaproof.quant.host_state import guarded, guarded_atom
from megaproof.quant.philox import check, check_lut
from megaproof.toolchain.program import Program

NAME = "NVRTC on the GPU"
PROGRAM = Program(
    name="twin",
    sources=(Path(__file__).with_name("twin.cu").resolve(),),
    entries=("wgmma_chain", "philox_codes", "map_fma", "map_silu_fast"),
)
"""It predicts the tensor core and must not use it, so none of its kernels is a `gemm`."""
_TILE, _THREADS, _WAVE = 64, 256, 132 * 8


class _MapParams(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rcp", ctypes.c_void_p),
        ("ex2", ctypes.c_void_p),
    ]


class _ChainParams(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("acc", ctypes.c_void_p),
        ("a_stride", ctypes.c_int64),
        ("b_stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("depth", ctypes.c_int32),
    ]


class _CodesParams(ctypes.Structure):
    _fields_ = [
        ("lut", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
    ]


def _map(name: str, x: Tensor, out_dtype: torch.dtype, y: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    if not name.startswith("decode"):
        atoms.check_f32("x", x)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if x.numel() == 0:
        return out
    rcp, ex2 = (tables.load(table, device=x.device).data_ptr() for table in tables.NAMES)
    operands = [t.data_ptr() if t is not None else None for t in (x, y, z)]
    params = _MapParams(*operands, out.data_ptr(), x.numel(), rcp, ex2)
    PROGRAM.library().kernel(f"map_{name}")(params, min(_WAVE, -(-x.numel() // _THREADS)), _THREADS)
    return out


@guarded_atom
def rcp_approx(x: Tensor) -> Tensor:
    """See `atoms.rcp_approx`."""
    return _map("rcp_approx", x, torch.float32)


@guarded_atom
def ex2_approx(x: Tensor) -> Tensor:
    """See `atoms.ex2_approx`."""
    return _map("ex2_approx", x, torch.float32)


@guarded_atom
def expf(x: Tensor) -> Tensor:
    """See `atoms.expf`."""
    return _map("expf", x, torch.float32)


@guarded_atom
def silu(x: Tensor, fast: bool) -> Tensor:
    """See `atoms.silu`."""
    return _map("silu_fast" if fast else "silu_precise", x, torch.float32)


@guarded_atom
def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """See `atoms.fma`."""
    for operand, t in (("a", a), ("b", b), ("c", c)):
        atoms.check_f32(operand, t)
    a, b, c = (t.contiguous() for t in torch.broadcast_tensors(a, b, c))
    return _map("fma", a, torch.float32, b, c)


@guarded_atom
def encode_e4m3(x: Tensor) -> Tensor:
    """See `atoms.encode_e4m3`."""
    return _map("encode_e4m3", x, torch.uint8)


@guarded_atom
def decode_e4m3(codes: Tensor) -> Tensor:
    """See `atoms.decode_e4m3`."""
    return _map("decode_e4m3", codes, torch.float32)


@guarded_atom
def encode_bf16(x: Tensor) -> Tensor:
    """See `atoms.encode_bf16`."""
    return _map("encode_bf16", x, torch.bfloat16)


@guarded_atom
def decode_bf16(x: Tensor) -> Tensor:
    """See `atoms.decode_bf16`."""
    atoms.check_bf16(x)
    return _map("decode_bf16", x, torch.float32)


@guarded_atom
def wgmma_chain(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """See `atoms.wgmma_chain`. Rows may be strided by a multiple of 8 bytes (a K block of a larger matrix)."""
    depth = atoms.check_chain(a, b, c)
    rows, columns = a.shape[0], b.shape[0]
    acc = torch.zeros(rows, columns, device=a.device) if c is None else c.contiguous().clone()
    if acc.numel():
        a, b = _rows(a), _rows(b)
        pointers = (a.data_ptr(), b.data_ptr(), acc.data_ptr())
        params = _ChainParams(*pointers, a.stride(0), b.stride(0), rows, columns, depth)
        tiles = -(-rows // _TILE) * -(-columns // _TILE)
        PROGRAM.library().kernel("wgmma_chain")(params, tiles, _THREADS)
    return acc


@guarded_atom
def wgmma_e4m3(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """See `atoms.wgmma_e4m3`."""
    return atoms.by_tile(wgmma_chain, a, b, c)


def _rows(x: Tensor) -> Tensor:
    aligned = x.stride(-1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 8 == 0
    return x if aligned else x.contiguous().clone()


@guarded
def codes(seed: int, stream: int, count: int, lut: Tensor) -> Tensor:
    """See `philox.codes`."""
    check(seed, stream)
    check_lut(lut)
    lut, blocks = lut.contiguous(), -(-count // 16)
    out = torch.empty(blocks * 16, dtype=torch.uint8, device=lut.device)
    if blocks:
        params = _CodesParams(lut.data_ptr(), out.data_ptr(), blocks, seed, stream)
        PROGRAM.library().kernel("philox_codes")(params, min(_WAVE * 2, -(-blocks // _THREADS)), _THREADS)
    return out[:count]
