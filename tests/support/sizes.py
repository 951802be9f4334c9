"""Symmetric buffers of any size, for property tests of their layout."""

from __future__ import annotations

from hypothesis import strategies as st

from megaproof.kernel.host.buffer import BufferSize
from megaproof.kernel.host.sizes import MAX_RANKS, WAVE_BLOCKS


def _problem(ranks: int, local: int, topk: int, units: tuple[int, int], capacity: int, ring: int | None) -> BufferSize:
    hidden, intermediate = (128 * n for n in units)
    return BufferSize(ranks, ranks * local, topk, hidden, intermediate, capacity, ring)


SIZES = st.builds(
    _problem,
    ranks=st.integers(1, MAX_RANKS),
    local=st.integers(1, 64),
    topk=st.integers(1, 32),
    units=st.tuples(st.integers(1, 56), st.integers(1, 24)),
    capacity=st.integers(1, 10_000) | st.integers(1, 200_000),
    ring=st.none() | st.integers(2 * WAVE_BLOCKS, 500),
)
"""Up to 64 experts a rank, 7,168 by 3,072, 200,000 tokens, and any ring."""
