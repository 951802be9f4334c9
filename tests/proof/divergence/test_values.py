"""What happened to the bits: NaN payloads, the launch before, a fill pattern."""

from __future__ import annotations

import dataclasses

import torch

from megaproof.proof.divergence import first_divergence
from megaproof.proof.faults.traces import CASE, bits_to, expected, found, layer, some
from megaproof.quant.stored import unsigned


def test_nan_payloads_are_told_from_numbers() -> None:
    """Expected is NaN too: only the payload differs."""
    result = layer().result
    assert result.trace is not None
    nan = bits_to("slots", unsigned(expected("slots")).index_fill_(0, torch.tensor([4]), 0x7FFF))
    other = bits_to("slots", unsigned(expected("slots")).index_fill_(0, torch.tensor([4]), 0xFFC1))
    poisoned = dataclasses.replace(result, trace=result.trace | {"slots": nan})
    divergence = first_divergence(poisoned, {"slots": other}, result.y, result.stats, CASE)
    assert divergence is not None
    assert divergence.patterns[0].name == "NaN class only"
    assert divergence.ulp == -1
    assert divergence.ulp_histogram == {"NaN": 512}


def test_what_the_launch_before_left_is_recognised() -> None:
    """In its own place, or in another row of the same buffer."""
    chance = torch.Generator().manual_seed(9)
    old = torch.randint(0, 0x7F, (200, 256), dtype=torch.uint8, generator=chance)
    planted = expected("l2_acts").clone()
    planted[30:33] = old[30:33]
    in_place = found("l2_acts", planted, previous={"l2_acts": old})
    assert in_place.patterns[0].name == "stale: previous launch"
    assert "of this place" in in_place.patterns[0].text
    planted = expected("l2_acts").clone()
    planted[30:33] = old[150:153]
    moved = found("l2_acts", planted, previous={"l2_acts": old})
    assert "30 holds its row 150" in moved.patterns[0].text
    assert "stale: previous launch" not in {p.name for p in found("l2_acts", planted).patterns}


def test_the_fill_pattern_is_recognised_when_it_is_known() -> None:
    planted = expected("slots").clone()
    planted[some()[0], 20:40] = bits_to("slots", torch.tensor(0x3C3C))
    assert found("slots", planted, fill={"slots": 0x3C3C}).patterns[0].name == "stale: fill"
    assert found("slots", planted).patterns[0].name == "constant"
