"""How tensors hold numbers: bits and back, and steps between two codes."""

from __future__ import annotations

import pytest
import torch

from megaproof.quant.stored import BF16_VALUES, E4M3_CODES, FP32_VALUES, INT32_COUNTS, Stored, unsigned


@pytest.mark.parametrize(
    ("stored", "a", "b", "steps"),
    [
        (BF16_VALUES, 0x3F80, 0x3F81, 1),
        (BF16_VALUES, 0x8001, 0x0001, 2),
        (BF16_VALUES, 0x0000, 0x8000, 0),
        (BF16_VALUES, 0x7F7F, 0x7F80, 1),
        (BF16_VALUES, 0x7F81, 0x3F80, -1),
        (E4M3_CODES, 0x07, 0x08, 1),
        (E4M3_CODES, 0xFE, 0x7E, 252),
        (E4M3_CODES, 0xFF, 0x7E, -1),
        (FP32_VALUES, 0x3F800000, 0x3F7FFFFF, 1),
        (INT32_COUNTS, 0xFFFFFFFF, 3, 4),
    ],
)
def test_distance_in_ulps(stored: Stored, a: int, b: int, steps: int) -> None:
    assert int(stored.ulps(torch.tensor([a]), torch.tensor([b]))) == steps


@pytest.mark.parametrize("stored", [E4M3_CODES, BF16_VALUES, FP32_VALUES, INT32_COUNTS], ids=lambda form: form.name)
def test_bits_survive_the_way_there_and_back(stored: Stored) -> None:
    """All codes of a narrow format; of a wide one its edges, NaNs of both signs among them."""
    edges = [0, 1, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 1 << 31, 0xFFC00001, 0xFFFFFFFF]
    bits = torch.arange(1 << stored.width) if stored.width < 32 else torch.tensor(edges)
    tensor = stored.tensor(bits.reshape(2, -1))
    assert (tensor.dtype, tensor.element_size()) == (stored.dtype, stored.bytes)
    assert torch.equal(unsigned(tensor), bits.reshape(2, -1))
