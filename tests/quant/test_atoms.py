"""The readable atoms between tensor core and special functions: minimum, maximum, fma, conversions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from megaproof.quant import atoms
from megaproof.quant.formats import BF16, E4M3, f32_from_bits
from megaproof.tests.support.bit_patterns import INF, MINUS, NAN, SPECIAL, assert_same, bits, floats, scattered
from megaproof.tests.third import exact

# --- minimum, maximum, fma --------------------------------------------------------------------------------------------

ZERO, ONE, MINUS_ONE = 0, 0x3F800000, 0xBF800000
MINIMA = {
    (ZERO, MINUS): MINUS,
    (MINUS, ZERO): MINUS,
    (ZERO, ZERO): ZERO,
    (MINUS, MINUS): MINUS,
    (ONE, NAN): ONE,
    (0xFF800001, MINUS_ONE): MINUS_ONE,
    (NAN, 0xFFFFFFFF): NAN,
    (INF, ONE): ONE,
    (MINUS | INF, ONE): MINUS | INF,
    (1, 0x80000001): 0x80000001,
}
MAXIMA = MINIMA | {
    (ZERO, MINUS): ZERO,
    (MINUS, ZERO): ZERO,
    (INF, ONE): INF,
    (MINUS | INF, ONE): ONE,
    (1, 0x80000001): 1,
}


@pytest.mark.parametrize(("function", "table"), [(atoms.fmin, MINIMA), (atoms.fmax, MAXIMA)], ids=["fmin", "fmax"])
def test_minimum_and_maximum(function: Callable[[Tensor, Tensor], Tensor], table: dict[tuple[int, int], int]) -> None:
    for (a, b), expected in table.items():
        assert bits(function(floats(a), floats(b))) == [expected], (hex(a), hex(b))
        assert bits(function(floats(b), floats(a))) == [expected], (hex(b), hex(a))


def test_minimum_broadcasts() -> None:
    x = torch.tensor([[1.0, 3.0], [torch.nan, -1.0]])
    assert atoms.fmin(x, torch.tensor(2.0)).tolist() == [[1.0, 2.0], [2.0, -1.0]]
    assert atoms.fmax(torch.tensor(2.0), x).tolist() == [[2.0, 3.0], [2.0, 2.0]]


def test_fma_of_all_special_triples() -> None:
    """Against one exact rational sum and one rounding."""
    chosen = [*(pattern for pattern in SPECIAL[::3]), INF, 0x7F800001, 1]
    chosen += [pattern | MINUS for pattern in chosen]
    triples = torch.tensor(list(product(chosen, chosen, chosen[::2])))
    got = bits(atoms.fma(*(f32_from_bits(column) for column in triples.unbind(1))))
    wrong = [(triple, hex(y)) for triple, y in zip(triples.tolist(), got, strict=True) if y != exact.fma(*triple)]
    assert wrong == []


def test_fma_broadcasts_like_its_expression() -> None:
    a, b, c = torch.arange(6.0).reshape(2, 3), torch.tensor([[2.0], [3.0]]), torch.tensor(1.0)
    assert_same(atoms.fma(a, b, c), a * b + c)


# --- conversions ------------------------------------------------------------------------------------------------------


def test_conversions_are_the_formats() -> None:
    x = scattered(1 << 12, 1)
    assert_same(atoms.encode_e4m3(x), E4M3.encode(x))
    assert_same(atoms.encode_bf16(x), BF16.encode(x).view(torch.bfloat16))
    every = torch.arange(256).to(torch.uint8)
    assert_same(atoms.decode_e4m3(every), E4M3.decode(every))


def test_bf16_round_trips_and_has_one_nan() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    values = atoms.decode_bf16(every)
    assert_same(atoms.encode_bf16(values)[~values.isnan()], every[~values.isnan()])
    assert set(bits(values[values.isnan()])) == {NAN}
    assert set((atoms.encode_bf16(values[values.isnan()]).view(torch.int16)).tolist()) == {0x7FFF}


@pytest.mark.parametrize("encode", [atoms.encode_e4m3, atoms.encode_bf16])
def test_encoding_is_monotone(encode: Callable[[Tensor], Tensor]) -> None:
    codes = encode(f32_from_bits(torch.arange(0, INF + 1, 1021)))
    as_integers = codes.view(torch.int16) if codes.dtype == torch.bfloat16 else codes
    assert bool((as_integers.to(torch.int64).diff() >= 0).all())
