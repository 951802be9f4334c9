"""The atoms compiled for a CPU with numba: same names, same contracts, same bits as `quant/atoms.py`.

Every function runs on one core and releases the GIL; `moe_layer` runs experts side by side. LLVM neither contracts nor
reorders floating point here (fastmath is off); the one fused operation is an explicit intrinsic.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from megaproof.quant import atoms, lanes, tables
from megaproof.quant.formats import F32_NAN
from megaproof.quant.host_state import guarded, guarded_atom
from megaproof.quant.numba_cache import compiled as _compiled
from megaproof.quant.philox import check, check_lut

NAME = f"numba {numba.__version__} on the CPU"

_STEP = atoms.K_STEP
_SIDE = 4
"""Outputs of a row side by side: a step waits for the one before it, and meanwhile the core works on the others."""


# --- the FP8 tensor core ----------------------------------------------------------------------------------------------


@_compiled
def _pow2(e):
    return np.int32((e + 127) << 23).view(np.float32)


@_compiled
def _step(c, emax, a_value, i, b_value, j):
    """One k32 step on a finite c, given the largest exponent of the products: atoms.wgmma_e4m3's rule."""
    bits = np.float32(c).view(np.int32)
    if emax < -12:  # no product: c alone, cut to 13 fraction bits; zero is +0
        kept = np.int32(bits & ~np.int32(0x3FF))
        return np.int32(0 if (kept & 0x7FFFFFFF) == 0 else kept).view(np.float32)
    if c != 0:
        emax = max(emax, np.int32(max((bits >> 23) & 0xFF, 1) - 127))
    scale = _pow2(13 - emax)  # emax >= -12 here: no overflow; a cast to integer cuts toward zero, as the chip does
    total = np.int32(lanes.cut_sum(a_value, i, b_value, j, scale) + np.int32(c * scale))
    kept = np.float32(total).view(np.int32) & ~np.int32(0x3FF)  # 14 significant bits
    return np.int32(kept).view(np.float32) * _pow2(emax - 13)


@_compiled
def _chain(a, b, acc):
    """acc = chain of k32 steps over the whole depth, in place; a uint8 [M, K], b uint8 [N, K], acc float32 [M, N]."""
    rows, depth = a.shape
    a_value = np.empty(rows * depth, np.float32)
    a_exponent = np.empty(rows * depth, np.int8)
    a_nan = np.zeros(rows, np.bool_)
    for m in range(rows):
        for k in range(0, depth, _STEP):
            a_nan[m] |= lanes.decode(a[m], k, a_value, a_exponent, m * depth + k)
    b_value = np.empty(_SIDE * _STEP, np.float32)
    b_exponent = np.empty(_SIDE * _STEP, np.int8)
    b_nan = np.empty(_SIDE, np.bool_)
    for first in range(0, b.shape[0], _SIDE):
        side = min(_SIDE, b.shape[0] - first)
        b_nan[:] = False
        for k in range(0, depth, _STEP):
            for j in range(side):
                b_nan[j] |= lanes.decode(b[first + j], k, b_value, b_exponent, j * _STEP)
            for m in range(rows):
                for j in range(side):
                    c = acc[m, first + j]
                    if np.isfinite(c):
                        emax = lanes.max_exponent(a_exponent, m * depth + k, b_exponent, j * _STEP)
                        acc[m, first + j] = _step(c, emax, a_value, m * depth + k, b_value, j * _STEP)
        for m in range(rows):
            for j in range(side):
                if a_nan[m] or b_nan[j] or np.isnan(acc[m, first + j]):
                    acc[m, first + j] = np.uint32(F32_NAN).view(np.float32)


@guarded_atom
def wgmma_chain(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """See `atoms.wgmma_chain`."""
    atoms.check_chain(a, b, c)
    acc = torch.zeros(a.shape[0], b.shape[0]) if c is None else c.contiguous().clone()
    _chain(_rows(a).numpy(), _rows(b).numpy(), acc.numpy())
    return acc


@guarded_atom
def wgmma_e4m3(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """See `atoms.wgmma_e4m3`."""
    return atoms.by_tile(wgmma_chain, a, b, c)


def _rows(x: Tensor) -> Tensor:
    """Rows may be strided (a K block of a larger matrix); within a row bytes are adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


# --- element by element: one scalar function an atom, one loop for all ------------------------------------------------


@_compiled
def _one_nan(x):
    return np.uint32(F32_NAN).view(np.float32) if np.isnan(x) else x


@_compiled
def _scalar_fma(a, b, c):
    return _one_nan(lanes.fma(a, b, c))


@_compiled
def _scalar_rcp(x, rcp):
    bits = np.float32(x).view(np.uint32)
    sign, field, mantissa = bits & 0x80000000, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if field == 255 and mantissa != 0:
        return np.uint32(F32_NAN).view(np.float32)
    if field == 0:
        return np.uint32(sign | 0x7F800000).view(np.float32)
    if field > 253 or (field == 253 and mantissa != 0):
        return np.uint32(sign).view(np.float32)
    return np.uint32(sign | (rcp[mantissa] + ((127 - field) << 23))).view(np.float32)


@_compiled
def _scalar_ex2(x, ex2):
    bits = np.float32(x).view(np.uint32)
    if np.isnan(x):
        return np.uint32(F32_NAN).view(np.float32)
    field = np.int64((bits >> 23) & 0xFF)
    fixed = np.int64(0)
    if field > 0:
        significand = np.int64(bits & 0x7FFFFF) + (1 << 23)
        fixed = significand << min(field - 127, 16) if field >= 127 else significand >> min(127 - field, 31)
    index, n = fixed & 0x7FFFFF, fixed >> 23
    if bits >> 31:
        n = -n
        if index:
            n, index = n - 1, 0x7FFFFF - index
    if n > 127:
        return np.float32(np.inf)
    if n < -126:
        return np.float32(0)
    return np.int32(ex2[index] + (n << 23)).view(np.float32)


@_compiled
def _scalar_expf(x, ex2):
    log2_e = np.uint32(atoms.LOG2_E).view(np.float32)
    t = lanes.fma(x, np.uint32(0x3BBB989D).view(np.float32), np.float32(0.5))
    t = np.float32(0) if np.isnan(t) else min(max(t, np.float32(0)), np.float32(1))
    n = np.int32(np.floor(np.float64(t) * 252.0)) - 126
    f = lanes.fma(x, log2_e, np.float32(-n))
    f = lanes.fma(x, np.uint32(0x32A57060).view(np.float32), f)
    return _one_nan(np.float32(_scalar_ex2(f, ex2) * _pow2(n)))


@_compiled
def _scalar_silu_fast(x, rcp, ex2):
    e = _scalar_ex2(np.float32(-x * np.uint32(atoms.LOG2_E).view(np.float32)), ex2)
    return _one_nan(np.float32(x * _scalar_rcp(np.float32(np.float32(1) + e), rcp)))


@_compiled
def _scalar_silu_precise(x, ex2):
    one = np.float32(1)
    return _one_nan(np.float32(x * np.float32(one / np.float32(one + _scalar_expf(-x, ex2)))))


@_compiled
def _scalar_encode_e4m3(x):
    bits = np.float32(x).view(np.uint32)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return np.uint8(0x7F)
    if magnitude >= 0x43E00000:  # 448
        return np.uint8(sign | 0x7E)
    if magnitude < 0x3C800000:  # below 2^-6: adding 2^14 rounds to a multiple of 2^-9, nearest even
        shifted = np.float32(np.uint32(magnitude).view(np.float32) + np.float32(16384))
        return np.uint8(sign | (np.float32(shifted).view(np.uint32) - np.uint32(0x46800000)))
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    return np.uint8(sign | min((rounded >> 20) - (120 << 3), 0x7E))


@_compiled
def _scalar_decode_e4m3(code):
    magnitude, sign = np.uint32(code & 0x7F), np.uint32(code & 0x80) << 24
    if magnitude == 0x7F:
        return np.uint32(F32_NAN).view(np.float32)
    if magnitude < 8:
        value = np.float32(magnitude) * np.float32(2.0**-9)
        return np.uint32(np.float32(value).view(np.uint32) | sign).view(np.float32)
    return np.uint32(((magnitude << 20) + (120 << 23)) | sign).view(np.float32)


@_compiled
def _scalar_encode_bf16(x):
    bits = np.float32(x).view(np.uint32)
    if (bits & 0x7FFFFFFF) > 0x7F800000:
        return np.int16(0x7FFF)
    return np.int16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@_compiled
def _scalar_decode_bf16(code):
    return _one_nan(np.uint32((np.uint32(code) & 0xFFFF) << 16).view(np.float32))


@_compiled
def _rcp(x, rcp, out):
    for i in range(x.size):
        out[i] = _scalar_rcp(x[i], rcp)


@_compiled
def _ex2(x, ex2, out):
    for i in range(x.size):
        out[i] = _scalar_ex2(x[i], ex2)


@_compiled
def _expf(x, ex2, out):
    for i in range(x.size):
        out[i] = _scalar_expf(x[i], ex2)


@_compiled
def _silu_fast(x, rcp, ex2, out):
    for i in range(x.size):
        out[i] = _scalar_silu_fast(x[i], rcp, ex2)


@_compiled
def _silu_precise(x, ex2, out):
    for i in range(x.size):
        out[i] = _scalar_silu_precise(x[i], ex2)


@_compiled
def _fma(a, b, c, out):
    for i in range(out.size):
        out[i] = _scalar_fma(a[i], b[i], c[i])


@_compiled
def _encode_e4m3(x, out):
    for i in range(x.size):
        out[i] = _scalar_encode_e4m3(x[i])


@_compiled
def _decode_e4m3(code, out):
    for i in range(code.size):
        out[i] = _scalar_decode_e4m3(code[i])


@_compiled
def _encode_bf16(x, out):
    for i in range(x.size):
        out[i] = _scalar_encode_bf16(x[i])


@_compiled
def _decode_bf16(code, out):
    for i in range(code.size):
        out[i] = _scalar_decode_bf16(code[i])


def _table(name: str) -> np.ndarray:
    return tables.load(name).numpy()


def _looked_up(x: Tensor, loop: Callable[..., None], *table_names: str) -> Tensor:
    """A function of fp32 values by tables of the chip."""
    atoms.check_f32("x", x)
    return _mapped(x, loop, torch.float32, *map(_table, table_names))


def _mapped(x: Tensor, loop: Callable[..., None], dtype: torch.dtype, *tables: np.ndarray) -> Tensor:
    """loop(x, *tables, out), element by element; out has x's shape."""
    out = torch.empty(x.shape, dtype=dtype)
    loop(x.contiguous().reshape(-1).numpy(), *tables, out.reshape(-1).numpy())
    return out


@guarded_atom
def rcp_approx(x: Tensor) -> Tensor:
    """See `atoms.rcp_approx`."""
    return _looked_up(x, _rcp, "rcp")


@guarded_atom
def ex2_approx(x: Tensor) -> Tensor:
    """See `atoms.ex2_approx`."""
    return _looked_up(x, _ex2, "ex2")


@guarded_atom
def expf(x: Tensor) -> Tensor:
    """See `atoms.expf`."""
    return _looked_up(x, _expf, "ex2")


@guarded_atom
def silu(x: Tensor, fast: bool) -> Tensor:
    """See `atoms.silu`."""
    return _looked_up(x, _silu_fast, "rcp", "ex2") if fast else _looked_up(x, _silu_precise, "ex2")


@guarded_atom
def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """See `atoms.fma`."""
    for name, x in (("a", a), ("b", b), ("c", c)):
        atoms.check_f32(name, x)
    operands = torch.broadcast_tensors(a, b, c)
    out = torch.empty(operands[0].shape)
    _fma(*(t.contiguous().reshape(-1).numpy() for t in operands), out.reshape(-1).numpy())
    return out


@guarded_atom
def encode_e4m3(x: Tensor) -> Tensor:
    """See `atoms.encode_e4m3`."""
    atoms.check_f32("x", x)
    return _mapped(x, _encode_e4m3, torch.uint8)


@guarded_atom
def decode_e4m3(codes: Tensor) -> Tensor:
    """See `atoms.decode_e4m3`."""
    return _mapped(codes, _decode_e4m3, torch.float32)


@guarded_atom
def encode_bf16(x: Tensor) -> Tensor:
    """See `atoms.encode_bf16`."""
    atoms.check_f32("x", x)
    return _mapped(x, _encode_bf16, torch.int16).view(torch.bfloat16)


@guarded_atom
def decode_bf16(x: Tensor) -> Tensor:
    """See `atoms.decode_bf16`."""
    atoms.check_bf16(x)
    return _mapped(x.contiguous().view(torch.int16), _decode_bf16, torch.float32)


# --- the generator ----------------------------------------------------------------------------------------------------


@_compiled
def _philox_codes(seed, stream, lut, out):
    """Fills out, 16 bytes a block, through lut; see quant/philox.py."""
    raw = np.empty(16 * lanes.BLOCKS, np.uint8)
    for block in range(0, out.size // 16, lanes.BLOCKS):
        lanes.philox(seed, stream, np.uint64(block), raw)
        for i in range(min(raw.size, out.size - 16 * block)):
            out[16 * block + i] = lut[raw[i]]


@guarded
def codes(seed: int, stream: int, count: int, lut: Tensor) -> Tensor:
    """See `philox.codes`."""
    check(seed, stream)
    check_lut(lut)
    out = torch.empty(-(-count // 16) * 16, dtype=torch.uint8)
    _philox_codes(np.uint64(seed), np.uint64(stream), lut.contiguous().numpy(), out.numpy())
    return out[:count]
