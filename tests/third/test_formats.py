"""The format tables against ml_dtypes and gfloat: every code decoded, and encoded values on and around every boundary.

Differences that are known and that these tests step around, each on purpose:
- ml_dtypes.float8_e4m3fn overflows to NaN above 464 and keeps the sign of a NaN; ours saturates and has one NaN, as
  cvt.rn.satfinite does. Finite values are clamped to +-448 for it and NaN is left out.
- ml_dtypes.float4_e2m1fn saturates like ours, but turns NaN into a zero; ours becomes +6, as PTX says.
- ml_dtypes.float8_e8m0fnu rounds to nearest; a scale needs the ceiling, so only exact powers are encoded with it.
  gfloat rounds E8M0 upward when asked to; below 2^-127 its code wraps around (2^-133 becomes 250), ours is 0.
- bfloat16: ml_dtypes keeps the sign of a NaN, ours is 0x7fff. NaN is compared as a class.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megaproof.quant import formats
from megaproof.quant.formats import BF16, E2M1, E4M3, E8M13, UE8M0
from megaproof.tests.third.bits import Source, assert_same_bits, to_bits, to_float

NAN = np.uint32(0x7FFFFFFF)


def one_nan(values: np.ndarray) -> np.ndarray:
    """float values -> float32 bits, every NaN 0x7fffffff."""
    values = values.astype(np.float32)
    return np.where(np.isnan(values), NAN, values.view(np.uint32))


def boundaries(format: formats.Format) -> np.ndarray:
    """float32 bits: the format's values, the midpoints of neighbours and half a step above the largest, each with two
    float32 neighbours on both sides, both signs. All codes, or every 63rd of the 2 million of E8M13."""
    lower = torch.arange(0, format.max_code + 1, max(format.max_code >> 15, 1))
    values = to_bits(format.decode(lower)).view(np.float32).astype(np.float64)
    above = to_bits(format.decode((lower + 1).clamp(max=format.max_code))).view(np.float32).astype(np.float64)
    top, below_top = (float(format.decode(torch.tensor([format.max_code - i]))[0]) for i in (0, 1))
    points = np.concatenate([values, (values + above) / 2, [top, top + (top - below_top) / 2]])
    bits = points.astype(np.float32).view(np.uint32).astype(np.int64)
    around = (bits[:, None] + np.arange(-2, 3)).reshape(-1).clip(0, 0x7F800000)
    return np.concatenate([around, around | 1 << 31]).astype(np.uint32)


def inputs(format: formats.Format) -> np.ndarray:
    """float32 bits without NaN: all that bfloat16 can hold, the format's boundaries, random bits, values in range."""
    s = Source(61)
    near = s.floats(max(127 - format.bias - format.mantissa - 3, 0), 140, 50_000)
    bits = np.concatenate([np.arange(1 << 16, dtype=np.uint32) << 16, boundaries(format), s.words(50_000), near])
    return bits[bits & 0x7FFFFFFF <= 0x7F800000]


def ours(format: formats.Format | formats.PowerOfTwoFormat, bits: np.ndarray) -> np.ndarray:
    return format.encode(to_float(bits)).numpy()


# --- ml_dtypes --------------------------------------------------------------------------------------------------------

ML_DTYPES = {"E4M3": "float8_e4m3fn", "E2M1": "float4_e2m1fn", "UE8M0": "float8_e8m0fnu"}
CODES = {"E4M3": 256, "E2M1": 16, "UE8M0": 256}


@pytest.mark.parametrize("name", ML_DTYPES)
def test_decode_equals_ml_dtypes(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = np.arange(CODES[name], dtype=np.uint8)
    theirs = codes.view(getattr(ml_dtypes, ML_DTYPES[name])).astype(np.float32)
    assert_same_bits(to_bits(getattr(formats, name).decode(torch.from_numpy(codes))), one_nan(theirs), name)


def test_decode_bf16_equals_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = np.arange(1 << 16, dtype=np.uint16)
    theirs = one_nan(codes.view(ml_dtypes.bfloat16).astype(np.float32))
    assert_same_bits(to_bits(BF16.decode(torch.from_numpy(codes.view(np.int16)))), theirs, "BF16")


def test_encode_e4m3_equals_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = inputs(E4M3)
    theirs = bits.view(np.float32).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert_same_bits(ours(E4M3, bits), theirs, "E4M3")


def test_encode_e2m1_equals_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = inputs(E2M1)
    theirs = bits.view(np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert_same_bits(ours(E2M1, bits), theirs, "E2M1")


def test_encode_ue8m0_of_powers_equals_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = np.concatenate([[1 << 22], np.arange(1, 255) << 23]).astype(np.uint32)  # 2^-127 to 2^127
    theirs = bits.view(np.float32).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    assert_same_bits(ours(UE8M0, bits), theirs, "UE8M0")


def test_encode_bf16_equals_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = inputs(BF16)
    theirs = bits.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    assert_same_bits(ours(BF16, bits).view(np.uint16), theirs, "BF16")


def test_torch_bfloat16_agrees() -> None:
    """torch's own cast, which the layer's callers use for y."""
    bits = inputs(BF16)
    assert_same_bits(ours(BF16, bits), to_float(bits).bfloat16().view(torch.int16).numpy(), "BF16")


# --- gfloat -----------------------------------------------------------------------------------------------------------


def gfloat_info(name: str) -> object:
    """gfloat's description of a format; E8M13 is described here, since no library knows it."""
    gfloat = pytest.importorskip("gfloat")
    known = {"E4M3": "ocp_e4m3", "E2M1": "ocp_e2m1", "UE8M0": "ocp_e8m0", "BF16": "bfloat16"}
    if name in known:
        return getattr(pytest.importorskip("gfloat.formats"), f"format_info_{known[name]}")
    return gfloat.FormatInfo(
        name="E8M13",
        k=22,
        precision=14,
        bias=127,
        is_signed=True,
        domain=gfloat.Domain.Extended,
        has_nz=True,
        num_high_nans=2**13 - 1,
        has_subnormals=True,
        is_twos_complement=False,
    )


@pytest.mark.parametrize("name", ["E4M3", "E2M1", "UE8M0", "BF16", "E8M13"])
def test_decode_equals_gfloat(name: str) -> None:
    info = gfloat_info(name)
    from gfloat import decode_ndarray

    count = 1 << info.k
    codes = np.arange(count) if count <= 1 << 16 else np.arange(0, count, 17)
    theirs = one_nan(np.asarray(decode_ndarray(info, codes), dtype=np.float64))
    assert_same_bits(to_bits(getattr(formats, name).decode(torch.from_numpy(codes))), theirs, name)


@pytest.mark.parametrize("name", ["E4M3", "E2M1", "BF16", "E8M13"])
def test_encode_equals_gfloat(name: str) -> None:
    info = gfloat_info(name)
    from gfloat import RoundMode, encode_ndarray, round_ndarray

    format = getattr(formats, name)
    bits = inputs(format)
    if format is E8M13:  # its infinity is only reached from infinity: cutting never overflows
        bits = bits[(bits & 0x7FFFFFFF) < 0x7F800000]
    mode = RoundMode.TowardZero if format.rounding == "truncate" else RoundMode.TiesToEven
    values = bits.view(np.float32).astype(np.float64)
    theirs = encode_ndarray(info, round_ndarray(info, values, mode, sat=name in ("E4M3", "E2M1")))
    mask = (1 << info.k) - 1
    assert_same_bits(ours(format, bits).astype(np.int64) & mask, theirs.astype(np.int64), name)


def test_encode_ue8m0_equals_gfloat_rounding_up() -> None:
    info = gfloat_info("UE8M0")
    from gfloat import RoundMode, encode_ndarray, round_ndarray

    s = Source(62)
    bits = np.concatenate([np.arange(1, 0x7F01, dtype=np.uint32) << 16, s.below(0x7F000000, 50_000)])
    bits = bits[bits >= 1 << 22]  # from 2^-127 on
    rounded = round_ndarray(info, bits.view(np.float32).astype(np.float64), RoundMode.TowardPositive)
    theirs = encode_ndarray(info, rounded).astype(np.uint8)
    assert_same_bits(ours(UE8M0, bits), theirs, "UE8M0")


# --- what no library shares -------------------------------------------------------------------------------------------


def test_nan_and_overflow_are_the_chips() -> None:
    """PTX: satfinite conversions give +MAX_NORM or the positive NaN for a NaN of either sign, the bound for inf."""
    special = np.array([0x7F800001, 0xFFC00000, 0x7F800000, 0xFF800000, 0x80000000], dtype=np.uint32)
    assert ours(E4M3, special).tolist() == [0x7F, 0x7F, 0x7E, 0xFE, 0x80]
    assert ours(E2M1, special).tolist() == [0x7, 0x7, 0x7, 0xF, 0x8]
    assert ours(BF16, special).view(np.uint16).tolist() == [0x7FFF, 0x7FFF, 0x7F80, 0xFF80, 0x8000]
    assert ours(UE8M0, special[:4]).tolist() == [0xFF, 0xFF, 0xFF, 0xFF]
