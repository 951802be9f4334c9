"""Casts with scale factors, and the kernel's weight layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megaproof.quant import cast, philox
from megaproof.quant.formats import E4M3, f32_bits, f32_from_bits

KINDS = pytest.mark.parametrize("kind", ["ue8m0", "fp32"])


def values(rows: int, columns: int, stream: int) -> Tensor:
    """Random float32 with exponents from 2^-20 to 2^19, signs and mantissas."""
    word = philox.words(7, stream, rows * columns)
    return f32_from_bits((word & 0x807FFFFF) | (107 + word % 40) << 23).reshape(rows, columns)


def assert_within_half_an_ulp(v: Tensor, codes: Tensor, scale: Tensor, slack: float) -> None:
    """|decode(q) - v / sf| is at most half the step of q's binade; slack covers the rounding of v / sf itself."""
    scaled = v.double() / scale.double()
    binade = torch.floor(torch.log2(scaled.abs().clamp(min=2.0**-6)))
    error = (E4M3.decode(codes).double() - scaled).abs()
    assert bool((error <= 2.0 ** (binade - 4) * (1 + slack)).all())
    assert bool((scaled.abs() <= 448 * (1 + slack)).all()), "nothing saturates"


# --- amax -------------------------------------------------------------------------------------------------------------


def test_group_amax_drops_nan() -> None:
    v = torch.tensor([[1.0, -3.0, torch.nan, 2.0], [torch.nan] * 4, [-torch.inf, 0.0, torch.nan, 1.0]])
    assert cast.group_amax(v, 4).tolist() == [[3.0], [0.0], [torch.inf]]
    assert cast.group_amax(v, 2).tolist() == [[3.0, 2.0], [0.0, 0.0], [torch.inf, 1.0]]
    assert f32_bits(cast.group_amax(-torch.zeros(1, 4), 4)).tolist() == [[0]], "fmaxf from +0"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cast.group_amax(torch.zeros(2, 96), 64), "columns = 96 must be a multiple of 64"),
        (lambda: cast.group_amax(torch.zeros(2, 96), 0), "columns = 96 must be a multiple of 0"),
        (lambda: cast.quantise_activation(torch.zeros(2, 96), 64, "ue8m0", "clamp"), "columns = 96"),
        (lambda: cast.quantise_per_token(torch.zeros(2, 192)), "columns = 192 must be a multiple of 128"),
        (lambda: cast.quantise_per_block(torch.zeros(192, 128)), "rows = 192 must be a multiple of 128"),
        (lambda: cast.quantise_per_block(torch.zeros(128, 192)), "columns = 192 must be a multiple of 128"),
        (lambda: cast.interleave_gate_up(torch.zeros(24, 4)), "gate rows = 12 must be a multiple of 8"),
        (lambda: cast.deinterleave_gate_up(torch.zeros(24, 4)), "interleaved rows = 24 must be a multiple of 16"),
    ],
    ids=["amax", "group-0", "activation", "token", "block-rows", "block-columns", "interleave", "deinterleave"],
)
def test_errors_name_the_dimension(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- activations ------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("group", [64, 128])
def test_activation_decodes_within_half_an_ulp(kind: str, group: int) -> None:
    v = values(64, 512, 1)
    codes, scale = cast.quantise_activation(v, group, kind, "clamp")
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (
        torch.uint8,
        v.shape,
        torch.float32,
        (64, 512 // group),
    )
    slack = 0 if kind == "ue8m0" else 2.0**-21  # a power of two divides exactly
    assert_within_half_an_ulp(v, codes, scale.repeat_interleave(group, dim=1), slack)


def test_ue8m0_activation_is_exact_integers() -> None:
    """q and sf by Python integers alone, for a group of multiples of 1/8: v / sf is a ratio of small integers."""
    v = torch.arange(-32, 32, dtype=torch.float32)[None] * 0.125 * 300
    codes, scale = cast.quantise_activation(v, 64, "ue8m0", "clamp")
    assert scale.tolist() == [[4.0]], "amax = 1200, 1200 / 448 = 2.68"
    decoded = E4M3.decode(codes)[0].tolist()
    for i, got in enumerate(decoded):
        target = abs((i - 32) * 300) / 32  # |v / 4|, exactly
        steps = [step for step in (2.0**e for e in range(-9, 6)) if 8 * step <= target < 16 * step] or [2.0**-9]
        assert abs(got) == round(target / steps[0]) * steps[0]


@pytest.mark.parametrize("kind", ["ue8m0", "fp32"])
def test_zero_groups(kind: str) -> None:
    v = torch.zeros(2, 128)
    v[0, 64:] = 1.0
    v[1, :64] = -0.0
    codes, scale = cast.quantise_activation(v, 64, kind, "clamp")
    zero = 2.0**-126 if kind == "ue8m0" else float(torch.tensor(1e-10) / 448.0)
    assert float(scale[0, 0]) == pytest.approx(zero, rel=1e-6)
    assert f32_bits(scale[:1, 0] if kind == "ue8m0" else torch.tensor([2.0**-126])).tolist() == [0x00800000]
    assert codes[0, :64].tolist() == [0] * 64
    assert codes[1, :64].tolist() == [0x80] * 64, "a zero keeps its sign"


def test_public_zero_rule_changes_the_scale_and_no_byte() -> None:
    v = values(8, 256, 2)
    v[3] = 0
    v[5, 64:128] = 0
    ours, public = (cast.quantise_activation(v, 64, "ue8m0", rule) for rule in ("clamp", "public"))
    assert torch.equal(ours[0], public[0])
    changed = ours[1] != public[1]
    assert changed.nonzero().tolist() == [[3, 0], [3, 1], [3, 2], [3, 3], [5, 1]]
    assert public[1][changed].tolist() == [0.0] * 5
    assert f32_bits(ours[1][changed]).tolist() == [0x00800000] * 5


def test_infinities_and_nan() -> None:
    """An infinity saturates with its sign, a NaN is 0x7f; finite values beside an infinity become zero."""
    v = torch.ones(1, 64)
    v[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    codes, scale = cast.quantise_activation(v, 64, "ue8m0", "clamp")
    assert scale.tolist() == [[2.0**126]]
    assert codes[0, :4].tolist() == [0x7E, 0xFE, 0x7F, 0]
    only_nan, scale = cast.quantise_activation(torch.full((1, 64), torch.nan), 64, "ue8m0", "clamp")
    assert f32_bits(scale).tolist() == [[0x00800000]]
    assert only_nan.tolist() == [[0x7F] * 64]


def test_groups_do_not_see_each_other() -> None:
    v = values(4, 256, 3)
    alone = [cast.quantise_activation(part, 64, "ue8m0", "clamp") for part in v.split(64, dim=1)]
    codes, scale = cast.quantise_activation(v, 64, "ue8m0", "clamp")
    assert torch.equal(codes, torch.cat([part[0] for part in alone], dim=1))
    assert torch.equal(scale, torch.cat([part[1] for part in alone], dim=1))


# --- inputs and weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [64, 128])
def test_per_token(group: int) -> None:
    x = values(16, 256, 4)
    x[2] = 0
    codes, scale = cast.quantise_per_token(x, group)
    assert scale.shape == (16, 256 // group)
    assert scale[2].tolist() == [1.0] * (256 // group)
    assert codes[2].tolist() == [0] * 256
    assert_within_half_an_ulp(x, codes, scale.repeat_interleave(group, dim=1), 2.0**-21)
    assert torch.equal(
        E4M3.decode(codes).abs().unflatten(1, (-1, group)).amax(2)[:2], torch.full((2, 256 // group), 448.0)
    )


def test_per_block() -> None:
    w = values(256, 384, 5)
    w[:128, 128:256] = 0
    codes, scale = cast.quantise_per_block(w)
    assert scale.shape == (2, 3)
    assert scale[0, 1] == 1.0
    assert torch.equal(scale[1, 2], w[128:, 256:].abs().max() / 448.0)
    expanded = cast.expand_block_scale(scale)
    assert (expanded[127, 127], expanded[128, 127], expanded[127, 128]) == (scale[0, 0], scale[1, 0], scale[0, 1])
    assert_within_half_an_ulp(w, codes, expanded, 2.0**-21)


# --- the interleave ---------------------------------------------------------------------------------------------------


def test_interleave_order_is_the_literal_one() -> None:
    """[g0..7, u0..7, g8..15, u8..15]; a gate row i holds i, an up row 100 + i."""
    rows = torch.cat([torch.arange(16), 100 + torch.arange(16)])[:, None].to(torch.uint8)
    expected = [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]
    assert cast.interleave_gate_up(rows)[:, 0].tolist() == expected


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 2))
def test_interleave_round_trips(groups: int, columns: int, batch: int) -> None:
    shape = (*([2] * batch), 16 * groups, columns)
    w1 = torch.arange(2**batch * 16 * groups * columns).reshape(shape)
    mixed = cast.interleave_gate_up(w1)
    assert mixed.shape == w1.shape
    assert mixed.is_contiguous()
    assert torch.equal(cast.deinterleave_gate_up(mixed), w1)
    assert torch.equal(cast.interleave_gate_up(cast.deinterleave_gate_up(w1)), w1)
