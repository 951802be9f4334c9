"""What a GEMM multiplies activations with: codes, their scale factors and the format of the codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megaproof.quant.cast import BLOCK
from megaproof.quant.formats import E4M3, Format

FORMATS = {"e4m3": E4M3}
"""A recipe's `weight_format` -> the format of the codes."""


class Operand(NamedTuple):
    """A matrix of N rows along K, one scale factor for a block of 128 x 128."""

    codes: Tensor
    """uint8 [N, K]."""
    scales: Tensor
    """float32 [N/128, K/128]."""
    format: Format = E4M3
    """How a code is read."""

    def of_blocks(self, blocks: Sequence[int]) -> Operand:
        """The rows of some blocks of 128, copied, in the order of `blocks`."""
        chosen = list(blocks)
        return self._replace(
            codes=self.codes.unflatten(0, (-1, BLOCK))[chosen].flatten(0, 1), scales=self.scales[chosen]
        )

    def to(self, device: torch.device | str) -> Operand:
        """The same on a device."""
        return self._replace(codes=self.codes.to(device), scales=self.scales.to(device))


class ExpertWeights(NamedTuple):
    """The two matrices of one expert."""

    l1: Operand
    """[2I, H]: gate rows, then up rows."""
    l2: Operand
    """[H, I]."""

    def to(self, device: torch.device | str) -> ExpertWeights:
        """The same on a device."""
        return ExpertWeights(self.l1.to(device), self.l2.to(device))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(codes and scales of l1, codes and scales of l2)."""
        return (*self.l1[:2], *self.l2[:2])


Weights = Callable[[int], ExpertWeights]
"""Expert of the layer -> its weights."""


def e4m3(w1: Tensor, w1_sf: Tensor, w2: Tensor, w2_sf: Tensor) -> ExpertWeights:
    """An expert's weights in E4M3: w1 uint8 [2I, H], w1_sf float32 [2I/128, H/128], w2 uint8 [H, I], w2_sf float32
    [H/128, I/128]."""
    return ExpertWeights(Operand(w1, w1_sf), Operand(w2, w2_sf))


def plain(weights: Weights) -> Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The same weights as four tensors, for the oracle, which knows none of our types."""
    return lambda expert: weights(expert).tensors()
