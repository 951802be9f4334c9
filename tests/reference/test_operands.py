"""Operands: blocks of rows with their scale factors, and the four tensors that the oracle gets."""

from __future__ import annotations

import torch

from megaproof.quant.formats import E4M3
from megaproof.quant.recipe import CHOICES
from megaproof.reference.operands import FORMATS, ExpertWeights, Operand, e4m3, plain

CODES = torch.arange(384 * 2, dtype=torch.int64).reshape(384, 2).to(torch.uint8)
SCALES = torch.tensor([[1.0], [2.0], [4.0]])


def weights(e: int) -> ExpertWeights:
    return e4m3(CODES, SCALES * e, CODES[:128], SCALES[:1])


def test_blocks_bring_their_scale_factors() -> None:
    part = Operand(CODES, SCALES).of_blocks([2, 0])
    assert torch.equal(part.codes, torch.cat([CODES[256:], CODES[:128]]))
    assert part.scales.tolist() == [[4.0], [1.0]]
    assert part.format is E4M3
    assert part.codes.is_contiguous()
    assert part.scales.is_contiguous()
    part.codes.zero_()
    assert int(CODES[0, 1]) == 1, "blocks are copies"


def test_nothing_is_copied_on_the_way() -> None:
    made = weights(1)
    assert made.l1.codes is CODES
    assert all(a is b for a, b in zip(made.tensors(), (*made.l1[:2], *made.l2[:2]), strict=True))
    assert made.to("cpu").l1.codes is CODES
    assert made.to("meta").l2.scales.device.type == "meta"


def test_the_oracle_gets_four_tensors_of_the_expert_it_asks_for() -> None:
    w1, w1_sf, w2, w2_sf = plain(weights)(3)
    assert (w1 is CODES, w1_sf.tolist()) == (True, [[3.0], [6.0], [12.0]])
    assert (w2.shape, w2_sf.shape) == ((128, 2), (1, 1))


def test_every_weight_format_that_is_built_has_its_codes() -> None:
    built, _ = CHOICES["weight_format"]
    assert set(FORMATS) == set(built)
