"""Patterns of a divergence: each is recognised where exactly that error is planted, and noise has none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megaproof.proof.divergence import first_divergence, report
from megaproof.proof.faults.traces import CASE, PLANTS, bits_to, expected, found, layer, noise, plant, some
from megaproof.quant.stored import unsigned
from megaproof.reference.stages import STAGES


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_error_is_named(name: str) -> None:
    error = PLANTS[name]
    divergence = found(error.stage, plant(error))
    assert {pattern.name for pattern in divergence.patterns} == error.names
    text = divergence.report()
    assert error.says.format(*some().tolist()) in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= report.WIDTH
    for word in (
        "first divergence",
        "Eq. (",
        "expected",
        "actual",
        "extent",
        "ulp",
        "calc_diff",
        "python -m reference",
    ):
        assert word in text


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


@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if stage.columns])
@pytest.mark.parametrize("count", [2, 12, 200])
def test_random_noise_has_no_pattern(stage: str, count: int) -> None:
    """Elements strewn over the stage, with bits strewn over the format."""
    bits = unsigned(expected(stage))
    chance = torch.Generator().manual_seed(count)
    place = torch.randperm(bits.numel(), generator=chance)[:count]
    noise(bits, stage, (place // bits.shape[1], place % bits.shape[1]))
    assert found(stage, bits_to(stage, bits)).patterns == ()


def test_dense_noise_is_everywhere_and_nothing_else() -> None:
    bits = unsigned(expected("y"))
    noise(bits, "y", tuple(torch.ones_like(bits).nonzero().unbind(1)))
    assert {pattern.name for pattern in found("y", bits_to("y", bits)).patterns} == {"everything"}
