"""Where the wrong elements lie."""

from __future__ import annotations

import torch

from megaproof.proof.faults.traces import bits_to, expected, found, noise
from megaproof.quant.stored import unsigned


def test_dense_noise_is_everywhere_and_nothing_else() -> None:
    bits = unsigned(expected("y"))
    noise(bits, "y", tuple(torch.ones_like(bits).nonzero().unbind(1)))
    assert {pattern.name for pattern in found("y", bits_to("y", bits)).patterns} == {"everything"}
