"""The order of weights in memory: every byte where the tensor core will look for it, and nothing lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel import api
from kernel.tiles import tiled, untiled
from quant.cast import interleave_gate_up

SIZES = st.integers(1, 5).map(lambda n: n * 128)


def place(n: int, k: int, row: int, column: int) -> int:
    """Where byte (row, column) of an expert's [n, k] stands, by hand."""
    half, blocks = row // 128, k // 128
    pair, second = divmod(half, 2)
    width = 2 if 2 * pair + 1 < n // 128 else 1
    tile = 2 * pair * blocks + column // 128 * width + second
    chunk = column % 128 // 16 ^ row % 8
    return tile * 128 * 128 + row % 128 * 128 + chunk * 16 + column % 16


@pytest.mark.parametrize("n", [128, 256, 384], ids=lambda n: f"n{n}")
@pytest.mark.parametrize("k", [128, 256], ids=lambda k: f"k{k}")
def test_every_byte_stands_where_the_kernel_looks(n: int, k: int) -> None:
    """Places are told apart by three bytes each."""
    numbers = torch.arange(2 * n * k)
    for shift in (0, 8, 16):
        codes = (numbers >> shift & 0xFF).to(torch.uint8).view(2, n, k)
        found = tiled(codes)
        assert found.shape == codes.shape
        wanted = torch.empty_like(codes).view(2, n * k)
        where = torch.tensor([place(n, k, row, column) for row in range(n) for column in range(k)])
        wanted[:, where] = codes.view(2, n * k)
        assert torch.equal(found, wanted.view(2, n, k))


@given(st.integers(1, 3), SIZES, SIZES, st.integers(0, 2**31))
def test_no_byte_is_lost(experts: int, n: int, k: int, seed: int) -> None:
    codes = torch.randint(0, 256, (experts, n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(untiled(tiled(codes)), codes)
    assert torch.equal(tiled(untiled(codes)), codes)


def test_transformed_weights() -> None:
    """W1 interleaved, both tiled; scales are the ones that were given, and nothing given is written to."""
    w1, w2 = (torch.randint(0, 256, (2, n, k), dtype=torch.uint8) for n, k in ((256, 384), (384, 128)))
    before = w1.clone(), w2.clone()
    sf = torch.ones(2, 2, 3), torch.ones(2, 3, 1)
    pairs = [(w.view(torch.float8_e4m3fn), s) for w, s in zip((w1, w2), sf, strict=True)]
    (new1, sf1), (new2, sf2) = api.transform_weights_for_mega_moe_sm90(*pairs)
    assert (sf1 is sf[0], sf2 is sf[1]) == (True, True)
    assert torch.equal(untiled(new1.view(torch.uint8)), interleave_gate_up(w1))
    assert torch.equal(untiled(new2.view(torch.uint8)), w2)
    assert torch.equal(w1, before[0])
    assert torch.equal(w2, before[1])
