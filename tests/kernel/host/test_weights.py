"""The order of weights in memory: every byte where the tensor core will look for it, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megaproof.kernel import api
from megaproof.kernel.host.weights import tiled, untiled, w1_rows, w2_rows

SIZES = st.integers(1, 5).map(lambda n: n * 128)


def place(n: int, k: int, row: Tensor, column: Tensor) -> Tensor:
    """Where bytes (row, column) of an expert's [n, k] stand, by hand."""
    blocks, pair, second = k // 128, row // 256, row // 128 % 2
    alone = (n % 256 != 0) & (row >= n - 128)
    tile = 2 * pair * blocks + torch.where(alone, column // 128, column // 128 * 2 + second)
    chunk = column % 128 // 16 ^ row % 8
    return tile * 128 * 128 + row % 128 * 128 + chunk * 16 + column % 16


def test_places_by_hand() -> None:
    """Of [384, 256]: 4 half tiles of the first 256 rows, 2 of the last 128; chunks by the row."""
    half = 128 * 128
    wanted = {
        (0, 0): 0,
        (0, 127): 127,
        (1, 0): 128 + 16,
        (1, 17): 128 + 1,
        (6, 0): 6 * 128 + 6 * 16,
        (8, 5): 8 * 128 + 5,
        (127, 112): 127 * 128,
        (128, 0): half,
        (0, 128): 2 * half,
        (128, 128): 3 * half,
        (256, 0): 4 * half,
        (256, 128): 5 * half,
        (383, 255): 6 * half - 128 + 15,
    }
    row, column = torch.tensor([*wanted]).T
    assert place(384, 256, row, column).tolist() == [*wanted.values()]


def test_chunks_of_a_half_tile() -> None:
    """All 128 rows x 8 chunks: row r has chunk c at c XOR (r mod 8), and its bytes in their order."""
    codes = torch.arange(128 * 8, dtype=torch.int16).repeat_interleave(8).view(torch.uint8)
    found = tiled(codes.view(1, 128, 128), torch.arange(128)).view(torch.int16).view(128, 8, 8)
    for row in range(128):
        for chunk in range(8):
            assert found[row, chunk ^ (row % 8)].tolist() == [8 * row + chunk] * 8


@given(SIZES, SIZES)
def test_every_byte_stands_where_the_kernel_looks(n: int, k: int) -> None:
    """Places are told apart by three bytes each."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n + k))
    numbers = torch.arange(2 * n * k)
    row, column = numbers[: n * k] // k, numbers[: n * k] % k
    where = place(n, k, row, column)
    assert torch.equal(where.sort().values, numbers[: n * k])
    for shift in (0, 8, 16):
        codes = (numbers >> shift & 0xFF).to(torch.uint8).view(2, n, k)
        found = tiled(codes, order)
        assert found.shape == codes.shape
        wanted = torch.empty_like(codes).view(2, n * k)
        wanted[:, where] = codes[:, order].flatten(1)
        assert torch.equal(found, wanted.view(2, n, k))


@given(st.integers(1, 3), SIZES, SIZES, st.integers(0, 2**31))
def test_no_byte_is_lost(experts: int, n: int, k: int, seed: int) -> None:
    codes = torch.randint(0, 256, (experts, n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    for rows in (w2_rows(n), w1_rows(n)):
        assert torch.equal(untiled(tiled(codes, rows), rows), codes)
        assert torch.equal(tiled(untiled(codes, rows), rows), codes)


@pytest.mark.parametrize(("n", "k", "rule"), [(192, 128, "rows = 192"), (128, 64, "columns = 64")], ids=str)
def test_sizes_that_make_no_tiles_are_refused(n: int, k: int, rule: str) -> None:
    for change in (tiled, untiled):
        with pytest.raises(ValueError, match=f"weight {rule} must be a multiple of 128"):
            change(torch.zeros(1, n, k, dtype=torch.uint8), torch.arange(n))


def test_lanes_have_neighbours() -> None:
    """Accumulators 8 j + 2 q and + 1 are lane q's: 16 outputs of GEMM 1 with gate and up, 8 at a time of GEMM 2."""
    half, i = 3, 5 * 64
    gates_and_ups = w1_rows(2 * i).view(5, 8, 2, 4, 2)[half]  # pair of j, gate or up, lane, column
    for lane in range(4):
        neighbours = 64 * half + 16 * lane + torch.arange(16)
        assert torch.equal(gates_and_ups[:, 0, lane].flatten(), neighbours)
        assert torch.equal(gates_and_ups[:, 1, lane].flatten(), i + neighbours)
        outputs = w2_rows(5 * 128).view(5, 4, 4, 4, 2)[half, :, :, lane]  # store, j, column
        neighbours = 128 * half + 32 * torch.arange(4)[:, None] + 8 * lane + torch.arange(8)
        assert torch.equal(outputs.flatten(1), neighbours)


@pytest.mark.parametrize("rows", [w1_rows, w2_rows], ids=["w1", "w2"])
def test_orders_are_of_whole_half_tiles(rows: Callable[[int], Tensor]) -> None:
    assert torch.equal(rows(640).sort().values, torch.arange(640))
    with pytest.raises(ValueError, match="weight rows = 192 must be a multiple of 128"):
        rows(192)


def test_transformed_weights() -> None:
    """Both tiled, each in its order; scales are the ones that were given, and nothing given is written to."""
    w1, w2 = (torch.randint(0, 256, (2, n, k), dtype=torch.uint8) for n, k in ((256, 384), (384, 128)))
    before = w1.clone(), w2.clone()
    sf = torch.ones(2, 2, 3), torch.ones(2, 3, 1)
    pairs = [(w.view(torch.float8_e4m3fn), s) for w, s in zip((w1, w2), sf, strict=True)]
    (new1, sf1), (new2, sf2) = api.transform_weights_for_mega_moe_sm90(*pairs)
    assert (sf1 is sf[0], sf2 is sf[1]) == (True, True)
    assert torch.equal(untiled(new1.view(torch.uint8), w1_rows(256)), w1)
    assert torch.equal(untiled(new2.view(torch.uint8), w2_rows(384)), w2)
    assert torch.equal(w1, before[0])
    assert torch.equal(w2, before[1])
