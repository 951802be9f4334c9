"""The format tables by their definition: every code, every tie, every edge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaproof.quant import formats
from megaproof.quant.formats import BF16, E2M1, E4M3, E8M13, UE8M0, Format, f32_bits, f32_from_bits, pow2

NEAREST = {"E4M3": E4M3, "E2M1": E2M1, "BF16": BF16}
by_name = pytest.mark.parametrize("format", NEAREST.values(), ids=NEAREST)


def unsigned(format: Format, codes: Tensor) -> Tensor:
    """Codes as int64 in [0, 2^bits), whatever their storage."""
    return codes.to(torch.int64) & ((2 << format.sign_shift) - 1)


def encode(format: Format, values: Tensor) -> Tensor:
    return unsigned(format, format.encode(values.to(torch.float32)))


def finite(format: Format) -> tuple[Tensor, Tensor]:
    """(magnitude codes 0 .. max_code, their values in float64)."""
    codes = torch.arange(format.max_code + 1)
    return codes, format.decode(codes).double()


def beside(values: Tensor, ulps: int) -> Tensor:
    """Positive float32 values, so many float32 neighbours further on."""
    return f32_from_bits(f32_bits(values.to(torch.float32)) + ulps)


# --- decode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [*NEAREST.values(), E8M13], ids=lambda f: f.name)
def test_decode_is_the_definition(format: Format) -> None:
    """(-1)^s * (m / 2^M + [e > 0]) * 2^(max(e, 1) - bias), on Python's floats, which hold all of it."""
    step = max(1, format.max_code >> 12)
    for code in [*range(0, format.max_code + 1, step), format.max_code]:
        e, m = code >> format.mantissa, code & ((1 << format.mantissa) - 1)
        value = (m / 2**format.mantissa + (e > 0)) * 2.0 ** (max(e, 1) - format.bias)
        assert float(format.decode(torch.tensor([code]))[0]) == value, f"code {code:#x}"


@by_name
def test_every_code_round_trips(format: Format) -> None:
    codes = torch.arange(2 << format.sign_shift)
    values = format.decode(codes)
    nan = format.is_nan(codes)
    assert torch.equal(torch.isnan(values), nan)
    assert torch.equal(f32_bits(values)[nan], torch.full((int(nan.sum()),), formats.F32_NAN))
    back = encode(format, values)
    assert torch.equal(back[~nan], codes[~nan])
    assert torch.equal(back[nan], torch.full((int(nan.sum()),), format.nan_code))


@by_name
def test_values_rise_with_their_codes(format: Format) -> None:
    _, values = finite(format)
    assert bool((values.diff() > 0).all())
    assert format.max_value == {"E4M3": 448.0, "E2M1": 6.0, "BF16": float.fromhex("0x1.fep+127")}[format.name]


# --- encode -----------------------------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("sign", [0, 1], ids=["plus", "minus"])
def test_every_tie_goes_to_even_and_its_neighbours_do_not(format: Format, sign: int) -> None:
    codes, values = finite(format)
    middle = (values[:-1] + values[1:]) / 2
    assert torch.equal(middle.float().double(), middle), "a middle has one bit more than a value"
    below, above = codes[:-1], codes[1:]
    even = torch.where(below & 1 == 0, below, above)
    flag = sign << format.sign_shift
    for ulps, expected in ((-1, below), (0, even), (1, above)):
        x = beside(middle, ulps)
        assert torch.equal(encode(format, -x if sign else x), expected | flag), f"{ulps} ulp from the middle"


@by_name
def test_values_and_their_float32_neighbours(format: Format) -> None:
    codes, values = finite(format)
    for ulps in (-1, 0, 1):
        x = beside(values[1:], ulps)
        assert torch.equal(encode(format, x), codes[1:]), f"{ulps} ulp from a value"


@by_name
def test_beyond_the_largest_value(format: Format) -> None:
    """The tie above the largest value, its neighbours, the largest float32 and infinity, both signs."""
    step = format.max_value - float(format.decode(torch.tensor([format.max_code - 1]))[0])
    tie = torch.tensor([format.max_value + step / 2], dtype=torch.float64)
    saturates = format.overflow == format.max_code
    assert saturates == (format is not BF16)
    x = torch.cat([beside(tie, -1), beside(tie, 0), beside(tie, 1), torch.tensor([3.4028234663852886e38, torch.inf])])
    expected = torch.tensor([format.max_code] + [format.overflow] * 4)
    assert torch.equal(encode(format, x), expected)
    assert torch.equal(encode(format, -x), expected | 1 << format.sign_shift)


@by_name
def test_zeros_keep_their_sign_and_nan_has_one_code(format: Format) -> None:
    minus = 1 << format.sign_shift
    tiny = f32_from_bits(torch.tensor([0, 0x80000000, 1, 0x80000001]))
    assert encode(format, tiny).tolist() == [0, minus, 0, minus]
    nan = f32_from_bits(torch.tensor([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF]))
    assert encode(format, nan).tolist() == [format.nan_code] * 6


def test_special_codes_are_the_chips() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 449.0, -1e30])
    assert E4M3.encode(x).tolist() == [0x7E, 0xFE, 0x7F, 0x7E, 0xFE]
    assert E2M1.encode(x).tolist() == [0x7, 0xF, 0x7, 0x7, 0xF]
    assert (BF16.encode(x[:3]).to(torch.int64) & 0xFFFF).tolist() == [0x7F80, 0xFF80, 0x7FFF]


@pytest.mark.parametrize(
    ("format", "storage"), [(E4M3, torch.uint8), (E2M1, torch.uint8), (BF16, torch.int16), (E8M13, torch.int32)]
)
def test_storage(format: Format, storage: torch.dtype) -> None:
    assert format.encode(torch.tensor([-1.0])).dtype == storage
    assert float(format.decode(format.encode(torch.tensor([-1.0])))[0]) == -1.0


# --- E8M13: truncation ------------------------------------------------------------------------------------------------


def test_e8m13_cuts_toward_zero() -> None:
    """The 14 leading bits of a float32 of any binade, subnormals included; nothing is rounded up."""
    field = torch.arange(255)[:, None]
    fraction = torch.tensor([0, 1, 0x3FF, 0x400, 0x401, 0x5FF, 0x600, 0x7FF, 0x7FFBFF, 0x7FFC00, 0x7FFFFF])[None]
    bits = (field << 23 | fraction).reshape(-1)
    for sign in (0, 1 << 31):
        x = f32_from_bits(bits | sign)
        assert torch.equal(E8M13.encode(x).to(torch.int64), (bits | sign) >> 10)
        assert torch.equal(f32_bits(E8M13.round(x)), (bits | sign) & 0xFFFFFC00)


def test_e8m13_specials() -> None:
    x = f32_from_bits(torch.tensor([0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000]))
    assert f32_bits(E8M13.round(x)).tolist() == [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7FFFFFFF]


# --- UE8M0: a ceiling -------------------------------------------------------------------------------------------------


def test_ue8m0_every_code_round_trips() -> None:
    codes = torch.arange(256)
    values = UE8M0.decode(codes)
    assert torch.equal(values[:255].double(), torch.ldexp(torch.ones(255, dtype=torch.float64), codes[:255] - 127))
    assert f32_bits(values[255:]).tolist() == [0x7FFFFFFF]
    assert torch.equal(UE8M0.encode(values).to(torch.int64), codes)


def test_ue8m0_rounds_up() -> None:
    codes = torch.arange(254)
    values = UE8M0.decode(codes)
    assert torch.equal(UE8M0.encode(beside(values, 1)).to(torch.int64), codes + 1)
    assert torch.equal(UE8M0.encode(beside(values[1:], -1)).to(torch.int64), codes[1:])


def test_ue8m0_specials() -> None:
    bits = [0, 1 << 31, 1, 0x7F000000, 0x7F000001, 0x7F800000, 0x7FC00000, 0x80000001, 0xBF800000, 0xFF800000]
    codes = UE8M0.encode(f32_from_bits(torch.tensor(bits)))
    assert codes.tolist() == [0, 0, 0, 254, 255, 255, 255, 255, 255, 255]


# --- bits -------------------------------------------------------------------------------------------------------------


def test_bits_round_trip_and_refuse_another_dtype() -> None:
    bits = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFF800001, 0xFFFFFFFF])
    assert torch.equal(f32_bits(f32_from_bits(bits)), bits)
    assert torch.equal(f32_bits(f32_from_bits(bits).reshape(2, 3).t()), bits.reshape(2, 3).t())
    with pytest.raises(TypeError, match=r"x has dtype torch.float64; it must be torch.float32"):
        f32_bits(torch.zeros(1, dtype=torch.float64))


def test_powers_of_two() -> None:
    e = torch.arange(-149, 128)
    assert pow2(e).tolist() == [2.0**i for i in range(-149, 128)]
