"""First divergence: which stage, which element, and what is said of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaproof.proof.divergence import Divergence, compare_stages, first_divergence, report
from megaproof.proof.faults import catalogue
from megaproof.proof.faults.traces import CASE, PLANTS, bits_to, expected, found, layer, noise, plant, some
from megaproof.quant.stored import unsigned
from megaproof.reference.stages import SHOWN, STAGES


def compare(**planted: Tensor) -> Divergence | None:
    """The divergence when some stages are replaced; y and stats are given as in the trace, all ranks in one tensor."""
    result = layer().result
    stages = {name: planted.get(name, expected(name)) for name in SHOWN}
    y = list(planted.get("y", expected("y")).split(list(CASE.tokens)))
    stats = list(planted.get("stats", expected("stats")).split(CASE.shape.experts_per_rank(CASE.ranks)))
    return first_divergence(result, stages, y, stats, CASE, topk_idx=layer().inputs.topk_idx)


def test_equal_stages_do_not_diverge() -> None:
    assert compare() is None


def test_a_stage_that_is_not_shown_is_counted_as_missing() -> None:
    result = layer().result
    comparison = compare_stages(result, {"slots": expected("slots")}, result.y, result.stats, CASE)
    assert comparison.divergence is None
    assert comparison.missing == ("l1_acts", "l1_acts_sf", "l2_acts", "l2_acts_sf")
    assert comparison.compared == {name: expected(name).numel() for name in ("slots", "y", "stats")}


@pytest.mark.parametrize("stage", STAGES)
def test_it_stops_at_the_first_stage_that_differs(stage: str) -> None:
    """Everything from a stage on is wrong: that stage is the one reported, and those before count as equal."""
    before = list(STAGES)[: list(STAGES).index(stage)]
    wrong = {name: torch.zeros_like(expected(name)) for name in STAGES if name not in before}
    divergence = compare(**wrong)
    assert divergence is not None
    assert divergence.stage == stage
    assert list(divergence.compared) == before


def test_counts_and_ulps() -> None:
    planted = bits_to("slots", unsigned(expected("slots")))
    view = planted.view(torch.int16)
    view[40, 7] ^= 1
    view[41, 7] += 5
    divergence = found("slots", planted)
    assert divergence.extent["elements"] == (2, 640 * 512)
    assert divergence.extent["rows"] == (2, 640)
    assert divergence.extent["columns"] == (1, 512)
    assert divergence.extent["source ranks"] == (1, 2)
    assert (divergence.ulp, divergence.ulp_max) == (1, 5)
    assert divergence.ulp_histogram == {"1": 1, "5-8": 1}
    assert divergence.allclose is torch.allclose(planted.float(), expected("slots").float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda y: [part.float() for part in y], "rank 0: expected torch.bfloat16 [100, 512], got torch.float32"),
        (lambda y: [y[0], y[1][:3]], "rank 1: expected torch.bfloat16 [60, 512], got torch.bfloat16 [3, 512]"),
        (lambda y: y[:1], "y must be a list of 2 tensors, one a rank; it has 1"),
    ],
)
def test_a_wrong_shape_is_a_divergence_too(change: Callable[[list[Tensor]], list[Tensor]], says: str) -> None:
    result = layer().result
    divergence = first_divergence(result, {}, change(result.y), result.stats, CASE)
    assert divergence is not None
    assert divergence.problem.startswith(says)
    assert says in " ".join(divergence.report().split())


def test_a_stage_of_another_name_is_refused() -> None:
    result = layer().result
    with pytest.raises(ValueError, match="l3_acts"):
        compare_stages(result, {"l3_acts": expected("slots")}, result.y, result.stats, CASE)
    with pytest.raises(ValueError, match="no trace"):
        compare_stages(dataclasses.replace(result, trace=None), {}, result.y, result.stats, CASE)


def test_a_large_stage_is_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts stay whole; patterns come from wrong rows first, and the report says from how many."""
    from megaproof.proof.divergence import find

    planted = plant(PLANTS["rows swapped"])
    monkeypatch.setattr(find, "MOST_ELEMENTS", 512 * 400)
    divergence = found("slots", planted)
    assert divergence.looked_at == 400
    assert divergence.extent["rows"] == (2, 640)
    assert "rows swapped" in {pattern.name for pattern in divergence.patterns}
    assert "400 rows" in divergence.report()


@pytest.mark.parametrize("fault", catalogue.of("trace"), ids=lambda fault: fault.id)
def test_a_planted_error_is_named(fault: catalogue.Fault) -> None:
    error = fault.change
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


@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if stage.columns])
@pytest.mark.parametrize("count", [2, 12, 200])
def test_random_noise_has_no_pattern(stage: str, count: int) -> None:
    """Elements strewn over the stage, with bits strewn over the format."""
    bits = unsigned(expected(stage))
    chance = torch.Generator().manual_seed(count)
    place = torch.randperm(bits.numel(), generator=chance)[:count]
    noise(bits, stage, (place // bits.shape[1], place % bits.shape[1]))
    assert found(stage, bits_to(stage, bits)).patterns == ()
