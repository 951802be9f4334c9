"""Clamped SwiGLU, routing weight and re-quantisation of a pool of rows in one Triton kernel: Eq. (4), Eq. (5).

On a GPU every step that a compiler could change is one line of inline PTX, so the bytes equal the reference's on every
chip whose tables the reference has. Outside the PTX no sum follows a product, and contraction is off besides.

Triton's interpreter has no inline PTX, and its casts to FP8 do not round to nearest even. For it there is a portable
form of the three steps concerned, in tl.exp2, tl.exp, division and integer arithmetic; it can differ from the chip by
what numpy's exp2, exp and a rounded division differ from the tables, so it is bounded, not equal: see
`swiglu_quantise`. Only an argument asks for it, never the environment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from megaproof.quant.recipe import Recipe
from megaproof.toolchain.errors import EnvironmentMissing

ROWS = 32
"""Rows of one program; it takes one group of columns."""

_SILU_FAST = """{
    .reg .f32 e;
    mul.rn.f32 e, $1, 0fBFB8AA3B;        // -log2(e)
    ex2.approx.ftz.f32 e, e;
    add.rn.f32 e, e, 0f3F800000;
    rcp.approx.ftz.f32 e, e;
    mul.rn.f32 $0, $1, e;
}"""
_SILU_PRECISE = """{
    .reg .f32 x, t, j, n, f, e;
    .reg .b32 b;
    neg.f32 x, $1;
    fma.rn.sat.f32 t, x, 0f3BBB989D, 0f3F000000;
    fma.rm.f32 j, t, 0f437C0000, 0f4B400001;
    sub.rn.f32 n, 0f4B40007F, j;         // -n
    fma.rn.f32 f, x, 0f3FB8AA3B, n;
    fma.rn.f32 f, x, 0f32A57060, f;
    ex2.approx.ftz.f32 f, f;
    mov.b32 b, j;
    shl.b32 b, b, 23;
    mov.b32 e, b;
    mul.rn.f32 e, f, e;                  // expf(x)
    add.rn.f32 e, e, 0f3F800000;
    div.rn.f32 e, 0f3F800000, e;
    mul.rn.f32 $0, $1, e;
}"""
_ENCODE_E4M3 = """{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}"""
SILU_FAST, SILU_PRECISE, ENCODE_E4M3 = (tl.constexpr(asm) for asm in (_SILU_FAST, _SILU_PRECISE, _ENCODE_E4M3))
RECIPROCAL_448 = tl.constexpr(float.fromhex("0x1.24924ap-9"))
"""fl(1/448), `megaproof.quant.scale.RECIPROCAL_448_BITS`."""


@triton.jit
def _float(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _silu(gate: tl.tensor, FAST: tl.constexpr, PTX: tl.constexpr) -> tl.tensor:
    """silu(gate) of the reference's atoms; with PTX to the last bit."""
    if PTX:
        asm: tl.constexpr = SILU_FAST if FAST else SILU_PRECISE
        return tl.inline_asm_elementwise(asm, "=f,f", [gate], dtype=tl.float32, is_pure=True, pack=1)
    if FAST:
        sigmoid = 1.0 / (1.0 + tl.exp2(gate * -1.44269504))
        # rcp.approx.ftz gives 0 where a division keeps a subnormal.
        return gate * tl.where(sigmoid < 1.17549435e-38, 0.0, sigmoid)
    return gate * (1.0 / (1.0 + tl.exp(-gate)))


@triton.jit
def _encode_e4m3(x: tl.tensor, PTX: tl.constexpr) -> tl.tensor:
    """cvt.rn.satfinite.e4m3x2: nearest even, saturating, NaN is 0x7f; uint8."""
    if PTX:
        return tl.inline_asm_elementwise(ENCODE_E4M3, "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4)
    bits = x.to(tl.int32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    # Below 2^-6 a code counts 2^-9, the unit in the last place of 16384: one addition rounds to nearest even.
    small = (_float(magnitude) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    kept = tl.minimum(magnitude, 0x43E00000)  # 448
    code = tl.where(magnitude < 0x3C800000, small, ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - 960)
    return tl.where(magnitude > 0x7F800000, 0x7F, sign | tl.minimum(code, 0x7E)).to(tl.uint8)


@triton.jit
def swiglu_kernel(
    gate_up: tl.tensor,  # float32 or bfloat16 [rows, 2I]
    weight: tl.tensor,  # float32 [rows]
    codes: tl.tensor,  # uint8 [rows, I]
    scales: tl.tensor,  # float32 [rows, I/GROUP]
    rows: tl.tensor,
    inter: tl.tensor,  # I
    clamp: tl.tensor,  # float32, read if CLAMPED
    CLAMPED: tl.constexpr,
    FAST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    UE8M0: tl.constexpr,
    PUBLIC_ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PTX: tl.constexpr,
) -> None:
    """Eq. (4), Eq. (5) of ROWS rows and one group of GROUP columns."""
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = group * GROUP + tl.arange(0, GROUP)
    inside = (row < rows)[:, None]
    place = row.to(tl.int64)[:, None] * (2 * inter) + column[None, :]
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + inter, mask=inside, other=0.0).to(tl.float32)

    if CLAMPED:  # fminf and fmaxf: a comparison with NaN fails, so NaN becomes the limit
        limit = tl.full(gate.shape, clamp, tl.float32)
        least = limit * -1.0  # a tensor's -limit is 0 - limit to Triton: +0 for a clamp of 0
        gate = tl.where(gate <= limit, gate, limit)
        up = tl.where(up >= least, up, least)
        up = tl.where(up <= limit, up, limit)
    v = _silu(gate, FAST, PTX) * up
    if WEIGHTED:
        v = v * tl.load(weight + row, mask=row < rows, other=0.0)[:, None]

    amax = tl.max(tl.where(v == v, tl.abs(v), 0.0), axis=1)  # fmaxf from 0: NaN does not count
    if UE8M0:
        scaled = amax * RECIPROCAL_448
        bits = scaled.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 127 + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
        exponent = tl.minimum(tl.maximum(exponent, -126), 126)
        scale = _float((127 + exponent) << 23)
        factor = _float((127 - exponent) << 23)
        if PUBLIC_ZERO:
            scale = tl.where(scaled == 0.0, 0.0, scale)
    else:
        scale = tl.maximum(amax, 1e-10) * RECIPROCAL_448
        factor = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)

    out = row.to(tl.int64)[:, None] * inter + column[None, :]
    tl.store(codes + out, _encode_e4m3(v * factor[:, None], PTX), mask=inside)
    tl.store(scales + row.to(tl.int64) * (inter // GROUP) + group, scale, mask=row < rows)


def options(recipe: Recipe, portable: bool = False) -> dict[str, bool | int]:
    """The kernel's compile-time choices for a recipe."""
    return {
        "CLAMPED": recipe.clamp is not None,
        "FAST": recipe.silu == "fast",
        "WEIGHTED": recipe.weight_fold == "before_quantisation",
        "UE8M0": recipe.activation_scale == "ue8m0",
        "PUBLIC_ZERO": recipe.zero_group == "public",
        "GROUP": recipe.activation_granularity,
        "ROWS": ROWS,
        "PTX": not portable,
    }


def swiglu_quantise(
    recipe: Recipe, gate_up: Tensor, weight: Tensor, *, portable: bool = False
) -> tuple[Tensor, Tensor]:
    """Eq. (4), Eq. (5): (E4M3 codes uint8 [m, I], scale factors float32 [m, I/granularity]).

    gate_up float32 or bfloat16 [m, 2I], gate columns then up columns; weight float32 [m]. Equal to
    `megaproof.reference.swiglu` bit for bit on a chip whose tables are captured (the sign of NaN aside).

    portable: the form without inline PTX, for tests under Triton's interpreter. Where the reference has its bytes from
    the tables, this one has numpy's exp2 or exp and a rounded division: a scale factor may double, or a byte move by
    one code, only where the bound of silu straddles a rounding point, about 1e-5 of the bytes at most.
    Raises ValueError naming the argument; `EnvironmentMissing` where this form can't run.
    """
    rows, inter = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.dtype not in (torch.float32, torch.bfloat16) or gate_up.shape[1] % 256 or not gate_up.is_contiguous():
        raise ValueError(f"gate_up is {gate_up.dtype} {list(gate_up.shape)}; it must be float32 or bfloat16 [m, 2I]")
    if weight.dtype != torch.float32 or weight.shape != (rows,) or not weight.is_contiguous():
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}; it must be float32 [{rows}], contiguous")
    require(gate_up, portable)
    codes = torch.empty(rows, inter, dtype=torch.uint8, device=gate_up.device)
    groups = inter // recipe.activation_granularity
    scales = torch.empty(rows, groups, dtype=torch.float32, device=gate_up.device)
    if rows:
        clamp = 0.0 if recipe.clamp is None else recipe.clamp
        arguments = (gate_up, weight, codes, scales, rows, inter, clamp)
        grid = (triton.cdiv(rows, ROWS), groups)
        swiglu_kernel[grid](*arguments, **options(recipe, portable), enable_fp_fusion=False)
    return codes, scales


def require(tensor: Tensor, portable: bool = False) -> None:
    """Raises `EnvironmentMissing` unless the kernels of this package can run on a tensor in the asked form."""
    interpreted = isinstance(swiglu_kernel, InterpretedFunction)
    if interpreted and not portable:
        raise EnvironmentMissing("TRITON_INTERPRET is set: the interpreter can't run this kernel exactly; unset it")
    if not interpreted and tensor.device.type != "cuda":
        raise EnvironmentMissing(f"the baseline's Triton kernels need a GPU; the tensors are on {tensor.device}")
