"""The generator: Random123's known answers, any start, and bytes through a table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaproof.quant import philox

# Counter, key -> output: kat_vectors of Random123 for philox4x32-10.
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
U64 = st.integers(0, (1 << 64) - 1)
IDENTITY = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str) -> None:
    counter, key, expected = KNOWN[name]
    block = philox.philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in block) == expected


@pytest.mark.parametrize("name", ["zeros", "pi"])
def test_known_answers_as_words(name: str) -> None:
    """Word 4 b + lane of (seed, stream): b is the counter's low half, stream its high half, seed the key."""
    counter, key, expected = KNOWN[name]
    start = 4 * (counter[1] << 32 | counter[0])
    if start >= 1 << 62:
        counter, start = (counter[0], 0, *counter[2:]), 4 * counter[0]
        expected = tuple(int(w) for w in philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key))
    seed, stream = key[1] << 32 | key[0], counter[3] << 32 | counter[2]
    assert tuple(philox.words(seed, stream, 4, start).tolist()) == expected


@given(U64, U64, st.integers(0, 50), st.integers(0, 50))
def test_any_start_gives_the_same_words(seed: int, stream: int, start: int, count: int) -> None:
    whole = philox.words(seed, stream, 100)
    part = philox.words(seed, stream, count, start)
    assert (part.dtype, part.shape) == (torch.int64, (count,))
    assert torch.equal(part, whole[start : start + count])
    assert bool(((whole >= 0) & (whole < 1 << 32)).all())


def test_start_beyond_32_bits() -> None:
    """Block 2^32 carries into the second counter word; it does not repeat block 0."""
    start = 4 << 32
    across = philox.words(1, 2, 12, start - 4)
    assert torch.equal(across[4:], philox.words(1, 2, 8, start))
    assert torch.equal(across[:4], philox.words(1, 2, 4, start - 4))
    carried = philox.philox4x32(tuple(torch.tensor([c]) for c in (0, 1, 2, 0)), (1, 0))
    assert across[4:8].tolist() == [int(word) for word in carried]


def test_seeds_and_streams_differ_in_every_bit() -> None:
    first = philox.words(0, 0, 8)
    seen = {tuple(first.tolist())}
    for bit in range(64):
        seen.add(tuple(philox.words(1 << bit, 0, 8).tolist()))
        seen.add(tuple(philox.words(0, 1 << bit, 8).tolist()))
    assert len(seen) == 129


@given(U64, U64, st.integers(0, 70))
def test_codes_are_the_bytes_of_the_words(seed: int, stream: int, count: int) -> None:
    """Little-endian in each word, through the table."""
    data = b"".join(word.to_bytes(4, "little") for word in philox.words(seed, stream, 20).tolist())
    codes = philox.codes(seed, stream, count, IDENTITY)
    assert (codes.dtype, codes.shape) == (torch.uint8, (count,))
    assert bytes(codes.tolist()) == data[:count]
    assert torch.equal(philox.codes(seed, stream, count, 255 - IDENTITY), 255 - codes)


def test_bytes_are_uniform() -> None:
    """65,536 bytes, 256 of each expected; sigma is 16."""
    counts = torch.bincount(philox.codes(3, 4, 1 << 16, IDENTITY).to(torch.int64), minlength=256)
    assert int(counts.min()) > 170
    assert int(counts.max()) < 350
    chi_squared = float(((counts - 256) ** 2 / 256.0).sum())
    assert 150 < chi_squared < 380, "255 degrees of freedom"


@pytest.mark.parametrize("value", [-1, 1 << 64])
@pytest.mark.parametrize("name", ["seed", "stream"])
def test_more_than_64_bits_are_refused(name: str, value: int) -> None:
    arguments = {"seed": 0, "stream": 0} | {name: value}
    for draw in (lambda: philox.words(**arguments, count=1), lambda: philox.codes(**arguments, count=1, lut=IDENTITY)):
        with pytest.raises(ValueError, match=rf"{name} = {value} must be in \[0, 2\^64\)"):
            draw()
