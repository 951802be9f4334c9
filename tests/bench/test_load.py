"""The load of a rank: routings, inputs and weights, and what is put beside the kernel. No GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megaproof.bench.measure import yardsticks
from megaproof.bench.measure.load import ROUTINGS, Layer, distinct, folded, quantised_blocks, quantised_rows
from megaproof.kernel import api
from megaproof.quant.cast import quantise_per_block, quantise_per_token


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_are_reproducible_and_local(routing: str) -> None:
    route = ROUTINGS[routing]
    first = route(512, 32, 6, 1)
    assert first.shape == (512, 6)
    assert first.dtype == torch.int64
    assert torch.equal(first, route(512, 32, 6, 1))
    assert not torch.equal(first, route(512, 32, 6, 2))
    assert first.unique().tolist() == list(range(32))


def test_only_folded_routing_repeats_an_expert() -> None:
    def least(topk_idx: torch.Tensor) -> int:
        return min(len(set(token)) for token in topk_idx.tolist())

    assert least(distinct(512, 32, 6, 0)) == 6
    assert least(folded(512, 32, 6, 0)) < 6


def test_inputs_are_quantised_as_a_caller_does() -> None:
    v = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    for ours, readable in ((quantised_rows, quantise_per_token), (quantised_blocks, quantise_per_block)):
        (codes, scale), (expected_codes, expected_scale) = ours(v), readable(v)
        assert torch.equal(codes.view(torch.uint8), expected_codes)
        assert torch.equal(scale, expected_scale)


def test_the_baseline_gets_the_weights_that_the_kernel_has() -> None:
    w1, w2 = (torch.randint(0, 256, (2, *size), dtype=torch.uint8) for size in ((256, 128), (128, 128)))
    w1_sf, w2_sf = torch.rand(2, 2, 1), torch.rand(2, 1, 1)
    l1, l2 = api.transform_weights_for_mega_moe_sm90(
        (w1.view(torch.float8_e4m3fn), w1_sf), (w2.view(torch.float8_e4m3fn), w2_sf)
    )
    assert not torch.equal(l1[0].view(torch.uint8), w1)
    found = Layer.weights(SimpleNamespace(l1=l1, l2=l2), 1)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), (w1[1], w1_sf[1], w2[1], w2_sf[1]), strict=True))
    assert found.l1.codes.is_contiguous()


def test_elements_of_other_bits() -> None:
    y = torch.tensor([1.0, -0.0, float("nan"), 2.0], dtype=torch.bfloat16)
    assert yardsticks.differing(y, y.clone()) == 0
    assert yardsticks.differing(y, torch.tensor([1.0, 0.0, float("nan"), 2.015625], dtype=torch.bfloat16)) == 2
