"""The hardware functions of an SM90 chip, readable: one function an instruction, each with a contract over every input.

Vectorised over torch tensors on any device, by integer arithmetic and correctly rounded float operations only. The
compiled twins (`quant/twin.py`) repeat these names; tests hold all of them together, and `golden/silicon` holds them to
the chip. A NaN result is always 0x7fffffff, the NaN that SM90 arithmetic produces.

Sources: PTX ISA (`wgmma`, `ex2.approx`, `rcp.approx`, `cvt.rn.satfinite.e4m3x2`, `fma`), and the captures themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megaproof.quant import tables
from megaproof.quant.formats import BF16, E4M3, E8M13, F32_NAN, f32_bits, f32_from_bits, pow2
from megaproof.quant.host_state import guarded_atom

K_STEP = 32
"""Depth of one FP8 wgmma instruction."""
ACCUMULATOR_FRACTION = 13
"""Fraction bits that the tensor core keeps below the largest exponent of a sum."""

LOG2_E = 0x3FB8AA3B
"""fp32 bits of log2(e) = 0x1.715476p+0."""


# --- conversions ------------------------------------------------------------------------------------------------------


@guarded_atom
def encode_e4m3(x: Tensor) -> Tensor:
    """cvt.rn.satfinite.e4m3x2.f32, one lane. float32 -> uint8: nearest even, saturating at 448, any NaN is 0x7f."""
    return E4M3.encode(x)


@guarded_atom
def decode_e4m3(codes: Tensor) -> Tensor:
    """uint8 -> float32, exactly; 0x7f and 0xff give NaN."""
    return E4M3.decode(codes)


@guarded_atom
def encode_bf16(x: Tensor) -> Tensor:
    """cvt.rn.bf16.f32. float32 -> bfloat16: nearest even, any NaN is 0x7fff."""
    return BF16.encode(x).view(torch.bfloat16)


@guarded_atom
def decode_bf16(x: Tensor) -> Tensor:
    """bfloat16 -> float32, exactly; any NaN gives 0x7fffffff."""
    check_bf16(x)
    return BF16.decode(x.contiguous().view(torch.int16))


# --- minimum and maximum ----------------------------------------------------------------------------------------------


@guarded_atom
def fmin(a: Tensor, b: Tensor) -> Tensor:
    """min.f32, CUDA's fminf: the other operand where one is NaN, and -0 below +0. float32, broadcast."""
    a, b = torch.broadcast_tensors(a, b)
    first = torch.isnan(b) | (a < b) | ((a == b) & torch.signbit(a))
    return _one_nan(torch.where(first & ~torch.isnan(a), a, b))


@guarded_atom
def fmax(a: Tensor, b: Tensor) -> Tensor:
    """max.f32, CUDA's fmaxf: the other operand where one is NaN, and +0 above -0. float32, broadcast."""
    return _one_nan(-fmin(-a, -b))


# --- fused multiply-add -----------------------------------------------------------------------------------------------


@guarded_atom
def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fma.rn.f32: a * b + c rounded once. float32, broadcast like `a * b + c`; subnormals kept.

    The product of two float32 is exact in float64; the sum is rounded to odd there, so that the final rounding to
    float32 sees on which side of a tie the exact value lies (Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums", 2008).
    """
    for name, x in (("a", a), ("b", b), ("c", c)):
        check_f32(name, x)
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)  # TwoSum: total + error is exact
    bits = total.view(torch.int64)
    inexact = torch.isfinite(total) & (error != 0) & (bits & 1 == 0)
    outward = (error > 0) == (total > 0)
    odd = torch.where(inexact, torch.where(outward, bits + 1, bits - 1), bits).view(torch.float64)
    return _one_nan(odd.to(torch.float32))


# --- the FP8 tensor core ----------------------------------------------------------------------------------------------


@guarded_atom
def wgmma_e4m3(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """wgmma.mma_async m64nNk32 f32.e4m3.e4m3, one k32 step: d = a @ b^T + c as the chip adds it up.

    a uint8 [..., M, 32], b uint8 [..., N, 32] (E4M3 codes), c float32 [..., M, N] -> float32 [..., M, N].
    One fused sum of 33 terms, aligned to the largest exponent and cut there; equations.md, "tensor core".
    Leading dimensions broadcast. Raises TypeError or ValueError naming the operand that does not fit.
    """
    check_step(a, b, c)

    # Products: significands multiply to 6 fraction bits and are NOT normalised; exponents add.
    sign_a, sig_a, exp_a = (t.to(torch.int32).unsqueeze(-2) for t in E4M3.unpack(a))  # [..., M, 1, 32]
    sign_b, sig_b, exp_b = (t.to(torch.int32).unsqueeze(-3) for t in E4M3.unpack(b))  # [..., 1, N, 32]
    sig = sig_a * sig_b
    exp = exp_a + exp_b
    sign = sign_a ^ sign_b

    # The accumulator: a 24-bit significand with 23 fraction bits.
    c_bits = f32_bits(c)
    c_field, c_fraction = c_bits >> 23 & 0xFF, c_bits & 0x7FFFFF
    c_sig = torch.where(c_field > 0, c_fraction + (1 << 23), c_fraction).to(torch.int32)
    c_exp = (c_field.clamp(min=1) - 127).to(torch.int32)

    # emax: the largest exponent of the NON-zero terms (-1000 loses to every real one).
    nothing = torch.full((), -1000, dtype=torch.int32, device=a.device)
    emax = torch.where(sig != 0, exp, nothing).amax(-1)
    emax = torch.maximum(emax, torch.where(c_sig != 0, c_exp, nothing))

    # Every magnitude is cut to 13 fraction bits below emax, without a sticky bit; the sum of the cut terms is exact.
    shift = (emax.unsqueeze(-1) - exp).clamp(0, 31)
    terms = (sig << (ACCUMULATOR_FRACTION - 6)) >> shift
    total = torch.where(sign == 1, -terms, terms).sum(-1, dtype=torch.int32)
    c_term = c_sig >> (emax - c_exp + (23 - ACCUMULATOR_FRACTION)).clamp(0, 31)
    total = total + torch.where(c_bits >> 31 == 1, -c_term, c_term)

    # |total| < 2^21, so float32 holds total * 2^(emax - 13) exactly; 14 significant bits of it stay. Zero is +0.
    value = E8M13.round(total.to(torch.float32) * pow2((emax - ACCUMULATOR_FRACTION).clamp(min=-149)))

    nan = E4M3.is_nan(a).any(-1).unsqueeze(-1) | E4M3.is_nan(b).any(-1).unsqueeze(-2) | torch.isnan(c)
    value = torch.where(torch.isinf(c), c, value)
    return torch.where(nan, _nan_like(value), value)


def check_f32(name: str, x: Tensor) -> None:
    """Raises TypeError unless x is float32."""
    if x.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be torch.float32")


def check_bf16(x: Tensor) -> None:
    """Raises TypeError unless x is bfloat16."""
    if x.dtype != torch.bfloat16:
        raise TypeError(f"x has dtype {x.dtype}; it must be torch.bfloat16")


def check_step(a: Tensor, b: Tensor, c: Tensor) -> None:
    """Raises TypeError or ValueError unless a, b, c are the operands of one step."""
    for name, x in (("a", a), ("b", b)):
        if x.dtype != torch.uint8:
            raise TypeError(f"{name} has dtype {x.dtype}; E4M3 codes are torch.uint8")
        if x.dim() < 2 or x.shape[-1] != K_STEP:
            depth = x.shape[-1] if x.dim() else 0
            raise ValueError(f"{name} has depth {depth}, shape {tuple(x.shape)}; one step takes [..., rows, {K_STEP}]")
    check_f32("c", c)
    if c.shape[-2:] != (a.shape[-2], b.shape[-2]):
        raise ValueError(f"c has shape {tuple(c.shape)}; a and b ask for [..., {a.shape[-2]}, {b.shape[-2]}]")


def check_chain(a: Tensor, b: Tensor, c: Tensor | None) -> int:
    """The common depth of a chain's operands. Raises TypeError or ValueError naming the operand that does not fit."""
    for name, x in (("a", a), ("b", b)):
        if x.dtype != torch.uint8 or x.dim() != 2:
            raise TypeError(f"{name} is {x.dtype} {tuple(x.shape)}; a chain takes uint8 [rows, depth]")
    depth = a.shape[-1]
    if depth % K_STEP or depth != b.shape[-1]:
        raise ValueError(f"a and b have depth {depth} and {b.shape[-1]}; both must be one multiple of {K_STEP}")
    if c is not None:
        check_f32("c", c)
        if c.shape != (a.shape[0], b.shape[0]):
            raise ValueError(f"c has shape {tuple(c.shape)}; a and b ask for ({a.shape[0]}, {b.shape[0]})")
    return depth


def by_tile(chain: Callable[[Tensor, Tensor, Tensor], Tensor], a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`wgmma_e4m3` over leading dimensions by a function that takes one [M,32], [N,32], [M,N] at a time."""
    check_step(a, b, c)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2], c.shape[:-2])
    a, b, c = (t.expand(*batch, *t.shape[-2:]) for t in (a, b, c))
    tiles = zip(*(t.reshape(-1, *t.shape[-2:]) for t in (a, b, c)), strict=True)
    out = [chain(*tile) for tile in tiles]
    return torch.stack(out).reshape(c.shape) if out else torch.empty_like(c)


@guarded_atom
def wgmma_chain(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """A chain of k32 steps in ascending k, each result the next step's accumulator.

    a uint8 [M, K], b uint8 [N, K], K a multiple of 32, c float32 [M, N] or None for +0 (scale-d 0) -> float32 [M, N].
    """
    depth = check_chain(a, b, c)
    if c is None:
        c = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    rows = max(1, (1 << 22) // (max(1, b.shape[0]) * K_STEP))  # bounds the [rows, N, 32] temporaries
    out = []
    for a_rows, acc in zip(a.split(rows), c.split(rows), strict=True):
        for k in range(0, depth, K_STEP):
            acc = wgmma_e4m3(a_rows[:, k : k + K_STEP], b[:, k : k + K_STEP], acc)
        out.append(acc)
    return _one_nan(torch.cat(out)) if out else c.clone()


# --- the special-function unit ----------------------------------------------------------------------------------------


@guarded_atom
def rcp_approx(x: Tensor) -> Tensor:
    """rcp.approx.ftz.f32: about 1/x, float32 -> float32. Subnormal inputs count as zero, subnormal results are zero."""
    bits = f32_bits(x)
    sign, field, mantissa = bits & 0x80000000, bits >> 23 & 0xFF, bits & 0x7FFFFF
    table = tables.load("rcp", device=x.device)
    result = table[mantissa].to(torch.int64) + ((127 - field) << 23)
    result = torch.where((field > 253) | ((field == 253) & (mantissa != 0)), 0, result)
    result = torch.where(field == 0, 0x7F800000, result)
    return _one_nan(f32_from_bits(torch.where(torch.isnan(x), F32_NAN, result | sign)))


@guarded_atom
def ex2_approx(x: Tensor) -> Tensor:
    """ex2.approx.ftz.f32: about 2^x, float32 -> float32. Subnormal inputs count as zero, subnormal results are zero."""
    bits = f32_bits(x)
    field, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    significand = torch.where(field > 0, fraction + (1 << 23), 0)
    left, right = (field - 127).clamp(0, 16), (127 - field).clamp(0, 31)
    fixed = (significand << left) >> right  # |x| cut to 23 fraction bits; 2^16 and more overflow all the same
    whole, part = fixed >> 23, fixed & 0x7FFFFF
    below = (bits >> 31 == 1) & (part != 0)
    # Below zero the fraction is complemented bit by bit (one's complement, not two's).
    index = torch.where(below, 0x7FFFFF - part, part)
    n = torch.where(bits >> 31 == 1, -whole, whole) - below.to(torch.int64)
    result = tables.load("ex2", device=x.device)[index].to(torch.int64) + (n << 23)
    result = torch.where(n > 127, 0x7F800000, torch.where(n < -126, 0, result))
    return f32_from_bits(torch.where(torch.isnan(x), F32_NAN, result))


@guarded_atom
def expf(x: Tensor) -> Tensor:
    """expf of CUDA 13.0's libdevice without fast math, step by step; float32 -> float32, subnormal results kept."""
    check_f32("x", x)
    t = fma(x, _constant(0x3BBB989D, x), _constant(0x3F000000, x))  # x * log2(e) / 252 + 1/2
    t = torch.where(torch.isnan(t), 0.0, t).clamp(0.0, 1.0)
    n = torch.floor(t.double() * 252.0).to(torch.int64) - 126  # fma rounding down, made exact: n = floor(252 t) - 126
    f = fma(x, _constant(LOG2_E, x), -n.to(torch.float32))
    f = fma(x, _constant(0x32A57060, x), f)  # the rest of log2(e)
    return _one_nan(ex2_approx(f) * pow2(n))


@guarded_atom
def silu(x: Tensor, fast: bool) -> Tensor:
    """x * sigmoid(x), float32 -> float32. fast: ex2.approx and rcp.approx; else expf and an IEEE division."""
    check_f32("x", x)
    if fast:
        exponential = ex2_approx(-x * _constant(LOG2_E, x))
        return _one_nan(x * rcp_approx(1.0 + exponential))
    return _one_nan(x * torch.div(torch.ones_like(x), 1.0 + expf(-x)))


# --- helpers ----------------------------------------------------------------------------------------------------------


def _constant(bits: int, like: Tensor) -> Tensor:
    return f32_from_bits(torch.tensor(bits, device=like.device))


def _nan_like(x: Tensor) -> Tensor:
    return f32_from_bits(torch.full(x.shape, F32_NAN, dtype=torch.int64, device=x.device))


def _one_nan(x: Tensor) -> Tensor:
    return torch.where(torch.isnan(x), _nan_like(x), x)
