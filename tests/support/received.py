"""How many rows experts receive, and sizes of layers, as strategies of hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from megaproof.reference.scheduler import WAVE_BLOCKS

COUNTS = st.integers(1, 4).flatmap(
    lambda experts: st.lists(
        st.lists(st.sampled_from([0, 0, 1, 5, 127, 128, 129, 300]), min_size=experts, max_size=experts),
        min_size=1,
        max_size=4,
    )
)
"""[R][E_loc], with the edges of a block."""
COLUMNS = st.integers(1, 5).map(lambda n: n * 128)
BLOCKS = st.integers(1, 9)
MANY = st.lists(
    st.lists(st.sampled_from([0, 0, 1, 127, 128, 129, 300, 1500, 2048, 3000]), min_size=4, max_size=4),
    min_size=1,
    max_size=2,
)
"""[R][E_loc], up to eight groups of pool blocks, with experts across the edges of groups."""
LEAST = 2 * WAVE_BLOCKS
"""Blocks of the smallest ring."""
