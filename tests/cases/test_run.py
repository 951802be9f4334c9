"""A case, run: the layer's own result, of the inputs that are handed out with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaproof.cases import inputs, run
from megaproof.cases.cases import Case
from megaproof.quant.shapes import Shape
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.tests.support.bit_patterns import assert_same

CASE = Case(Shape("small", 128, 128, 4, 2), (3, 0), masked=30)


def test_a_run_is_the_layer_on_the_case_s_inputs() -> None:
    found, made = run.run_case(CASE, "cpu"), inputs.make(CASE)
    expected = moe_layer(CASE.recipe, *made.arguments(), trace=True, experts=4)
    assert (found.case, found.sha256, found.inputs.sha256()) == (CASE, made.sha256(), made.sha256())
    assert list(found.trace) == list(expected.trace or {})
    for name, tensor in found.trace.items():
        assert_same(tensor, (expected.trace or {})[name])


def test_inputs_that_exist_are_taken() -> None:
    made = inputs.make(CASE)
    made.x[0][0] = 0x38
    found = run.run_case(CASE, made=made)
    assert found.inputs is made
    assert found.sha256 == made.sha256() != inputs.make(CASE).sha256()


def test_progress_is_passed_on_and_no_trace_is_none() -> None:
    seen: list[tuple[int, int]] = []
    found = run.run_case(CASE, "cpu", trace=False, progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1] == (len(seen), len(seen))
    assert found.result.trace is None
    with pytest.raises(ValueError, match=r"small-r2-.* was run without a trace"):
        _ = found.trace


def test_a_layer_that_writes_to_its_inputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def writing(recipe: Any, x: list[torch.Tensor], *others: Any, **options: Any) -> LayerResult:
        x[0][0, 0] ^= 1
        return LayerResult([], [])

    monkeypatch.setattr(run, "moe_layer", writing)
    with pytest.raises(run.InputsWritten, match="wrote to its inputs"):
        run.run_case(CASE, "cpu")
