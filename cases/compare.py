"""Comparing two tensors bit for bit, never within a tolerance. For all stages of a layer: `proof/divergence/`."""

from __future__ import annotations

import torch
from torch import Tensor

from megaproof.quant.formats import BF16, E4M3
from megaproof.quant.host_state import guarded

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNIT = {torch.uint8: "E4M3", torch.bfloat16: "BF16", torch.float32: "fp32", torch.int32: "int32"}


class Differs(AssertionError):
    """Two stages that should be the same bits and are not."""


def hold(holds: bool, rule: str) -> None:
    """Raises AssertionError with the rule unless it holds: an `assert` that `python -O` cannot take away."""
    if not holds:
        raise AssertionError(rule)


@guarded
def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor, as integers of its width, on the CPU."""
    return tensor.cpu().contiguous().view(_INTEGER[tensor.element_size()])


@guarded
def same(stage: str, expected: Tensor, actual: Tensor, rows: Tensor | None = None, column: int = 0) -> int:
    """Number of elements compared. Raises `Differs` at the first element that differs.

    rows: int64 [n, 3], the (rank, token, slot) of each row; column: that of the tensors' first column in the stage.
    """
    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        raise Differs(
            f"stage {stage}: expected {expected.dtype} {list(expected.shape)}, got {actual.dtype} {list(actual.shape)}"
        )
    wrong = bits(expected) != bits(actual)
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise Differs(_describe(stage, expected, actual, wrong, where, rows, column))
    return expected.numel()


def _describe(
    stage: str,
    expected: Tensor,
    actual: Tensor,
    wrong: Tensor,
    where: tuple[int, ...],
    rows: Tensor | None,
    column: int,
) -> str:
    count, lines = int(wrong.sum()), wrong.reshape(wrong.shape[0], -1).any(1)
    place = f"row {where[0]}" + (f", column {where[1] + column}" if len(where) > 1 else "")
    if rows is not None:
        place = f"(rank, token, slot) {tuple(rows[where[0]].tolist())}, {place}"
    return (
        f"stage {stage}: {count} of {wrong.numel()} elements differ, in {int(lines.sum())} of {len(lines)} rows\n"
        f"  first at {place}\n"
        f"  expected {_decode(expected, where)}\n  actual   {_decode(actual, where)}"
    )


def _decode(tensor: Tensor, where: tuple[int, ...]) -> str:
    pattern = int(bits(tensor)[where]) & ((1 << 8 * tensor.element_size()) - 1)
    if tensor.dtype == torch.uint8:
        value = float(E4M3.decode(torch.tensor([pattern]))[0])
    elif tensor.dtype == torch.bfloat16:
        value = float(BF16.decode(torch.tensor([pattern]))[0])
    else:
        value = tensor.cpu()[where].item()
    return f"{pattern:#0{2 + 2 * tensor.element_size()}x} = {value!r} ({_UNIT.get(tensor.dtype, tensor.dtype)})"
