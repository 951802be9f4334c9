"""Two tensors, bit for bit: equal, or an error that says where they differ first."""

from __future__ import annotations

import pytest
import torch

from megaproof.cases.compare import Differs, bits, same

ROW = torch.arange(6, dtype=torch.uint8).reshape(2, 3)


def changed(tensor: torch.Tensor, place: tuple[int, ...], pattern: int) -> torch.Tensor:
    other = tensor.clone()
    bits(other)[place] = pattern
    return other


def test_equal_tensors_are_counted() -> None:
    assert same("y", ROW, ROW.clone()) == 6
    nan = torch.tensor([float("nan"), -0.0])
    assert same("y", nan, nan.clone()) == 2


def test_bits_decide_and_not_values() -> None:
    """Two zeros and two NaNs are equal as numbers, or never equal; here their bits say so."""
    with pytest.raises(Differs, match="1 of 1 elements differ"):
        same("y", torch.tensor([0.0]), torch.tensor([-0.0]))
    quiet, other = (
        torch.tensor([pattern], dtype=torch.int32).view(torch.float32) for pattern in (0x7FC00000, 0x7FC00001)
    )
    with pytest.raises(Differs, match="1 of 1 elements differ"):
        same("y", quiet, other)


@pytest.mark.parametrize("other", [ROW.to(torch.int32), ROW[:1], ROW.flatten()])
def test_another_dtype_or_shape_differs(other: torch.Tensor) -> None:
    with pytest.raises(Differs, match=r"stage y: expected torch.uint8 \[2, 3\], got torch"):
        same("y", ROW, other)


def test_the_first_difference_is_placed_and_decoded() -> None:
    rows = torch.tensor([[0, 5, 1], [3, 2, 0]])
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    actual = changed(expected, (1, 1), 0x4081)
    with pytest.raises(Differs) as caught:
        same("slots", expected, actual, rows, column=10)
    text = str(caught.value)
    assert "stage slots: 1 of 4 elements differ, in 1 of 2 rows" in text
    assert "(rank, token, slot) (3, 2, 0), row 1, column 11" in text
    assert "0x4080 = 4.0 (BF16)" in text
    assert "0x4081 = 4.03125 (BF16)" in text
    with pytest.raises(Differs, match=r"0x38 = 1.0 \(E4M3\)"):
        same("codes", torch.tensor([0x38], dtype=torch.uint8), torch.tensor([0x39], dtype=torch.uint8))
