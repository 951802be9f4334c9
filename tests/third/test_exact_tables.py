"""The tables of the special-function unit, and expf and silu built on them, against exact values.

`rounded.py` knows the correctly rounded value of all 2^23 entries by integer arithmetic; expf and silu are compared
with Python's decimal module, whose exp is correctly rounded at any precision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from megaproof.quant import tables
from megaproof.tests.third import exact, rounded, special
from megaproof.tests.third.bits import Source, assert_same_bits

TABLES: dict[str, tuple[Callable[[], np.ndarray], Callable[[np.ndarray], float]]] = {
    "rcp": (rounded.reciprocal, rounded.reciprocal_error),
    "ex2": (rounded.exp2, rounded.exp2_error),
}
MAX_ULPS = {"rcp": 1.0, "ex2": 1.4, "expf": 2.0}
"""Bounds of the error against the exact value, just above what `python -m tests.third.figures` finds on an H200 (0.975,
1.390, and 1.720 in a sample)."""


def chip_table(name: str) -> np.ndarray:
    """int64 [2^23] of the default chip; skips where it was not captured."""
    try:
        return tables.load(name).numpy().astype(np.int64)
    except tables.TableError as error:
        pytest.skip(f"no {name} table: {error}")


@pytest.mark.parametrize("name", TABLES)
def test_base_is_correctly_rounded(name: str) -> None:
    """The base on which the committed tables are packed is the correctly rounded function, in every entry."""
    assert_same_bits(tables.correctly_rounded(name).astype(np.int64), TABLES[name][0](), f"base of {name}")


@pytest.mark.parametrize("name", TABLES)
def test_bounds_against_fractions(name: str) -> None:
    """`rounded.py` itself, on a sample, by a rounding of `exact.py`."""
    for i in [0, 1, 2, rounded.SIZE - 1, rounded.SIZE // 2, *Source(71).below(rounded.SIZE, 500).tolist()]:
        if name == "rcp":
            value = 1 / exact.value(0x3F800000 + i)
        else:
            value = exact.exp2_fixed(i, 23) * exact.power(-exact.SCALE)
        assert exact.round_float32(value) == int(TABLES[name][0]()[i]), i


@pytest.mark.parametrize("name", TABLES)
def test_chip_is_within_one_ulp(name: str) -> None:
    """The chip differs from the correctly rounded value by -1, 0 or +1 ulp, everywhere."""
    chip = chip_table(name)
    nearest, error = TABLES[name]
    delta = chip - nearest()
    assert delta.shape == (rounded.SIZE,)
    assert set(np.unique(delta).tolist()) <= {-1, 0, 1}
    assert np.count_nonzero(delta), "a table that is correctly rounded everywhere was not captured from a chip"
    assert error(chip) < MAX_ULPS[name]


# --- functions built on the tables ------------------------------------------------------------------------------------


def test_expf_error() -> None:
    """expf is within 2 units in the last place of e^x wherever the result is normal or subnormal."""
    chip_table("ex2")
    errors = special.expf_errors(4000)
    assert len(errors) > 4000
    assert max(errors) < MAX_ULPS["expf"]


@pytest.mark.parametrize("fast", [True, False])
def test_silu_error(fast: bool) -> None:
    """The bound of fast silu that counts where a chip has no tables holds with them; precise silu keeps it too."""
    chip_table("ex2")
    shares = special.silu_shares_of_bound(fast, 3000)
    assert len(shares) > 3000
    assert max(shares) <= 1
