"""The figures of `figures.py` stay where the documentation says they are."""

from __future__ import annotations

import pytest

from megaproof.tests.third import figures


@pytest.mark.parametrize(
    ("operands", "low", "high"),
    [("normal, sigma 1", 0.02, 0.035), ("normal, sigma 150", 0.01, 0.018), ("all codes alike", 0.0, 0.001)],
)
def test_a_tensor_core_chain_is_rarely_the_rounded_dot_product(operands: str, low: float, high: float) -> None:
    assert low <= figures.chain_equals_rounded_dot(operands, rows=192) <= high


@pytest.mark.parametrize(
    ("family", "least"), [("tie_below_c", 0.015), ("tie_in_product", 0.25), ("overflow_edge", 0.03)]
)
def test_float64_is_no_fma(family: str, least: float) -> None:
    assert figures.naive_fma_failures(family, 20_000) >= least
