"""Eq. (7): an output row is rounded to BF16 once, before it leaves."""

from __future__ import annotations

import torch

from megaproof.quant import atoms, twin
from megaproof.quant.formats import f32_from_bits
from megaproof.reference import scatter
from megaproof.tests.support.bit_patterns import assert_same, scattered


def test_rows_are_rounded_to_nearest_even() -> None:
    pairs = {
        0x3F800000: 0x3F80,
        0x3F808000: 0x3F80,  # tie, to even
        0x3F818000: 0x3F82,  # tie, to even
        0x3F808001: 0x3F81,
        0xBF817FFF: 0xBF81,
        0x7F7F8000: 0x7F80,  # beyond the largest BF16: infinity, no saturation
        0x00008000: 0x0000,
        0x80008001: 0x8001,  # a subnormal is kept
        0x80000000: 0x8000,
        0xFFC00001: 0x7FFF,
    }
    rows = f32_from_bits(torch.tensor(list(pairs)))[None]
    for arith in (atoms, twin.arith("cpu")):
        slots = scatter.to_slot(rows, arith)
        assert slots.dtype == torch.bfloat16
        assert (slots.view(torch.int16).to(torch.int64) & 0xFFFF)[0].tolist() == list(pairs.values())


def test_rows_keep_their_shape() -> None:
    rows = scattered(512, 41)[:1024].reshape(8, 128)
    assert_same(scatter.to_slot(rows, atoms), torch.stack([scatter.to_slot(row, atoms) for row in rows]))
    assert scatter.to_slot(rows[:0], atoms).shape == (0, 128)
