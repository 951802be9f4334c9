"""Every legal shape of the sweep is computed on silicon, in a whole ring and in the smallest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megaproof.cases.cases import Case
from megaproof.proof.adapters.megaproof import MegaproofAdapter
from megaproof.proof.guards import GuardedAdapter
from megaproof.tests.support.legal_shapes import LEAST, RECYCLED, REPEATED, SWEEP, prove_with_spare, sweep_id


@pytest.fixture
def adapter() -> Iterator[MegaproofAdapter]:
    adapter = GuardedAdapter()
    yield adapter
    adapter.close()
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("case, spare", (*SWEEP, *REPEATED), ids=sweep_id)
def test_every_legal_shape_is_computed(case: Case, spare: int, adapter: MegaproofAdapter) -> None:
    print(f"{case.id}: {prove_with_spare(adapter, case, spare, 'cuda')}")
    assert adapter.buffer is not None
    assert adapter.buffer.size.capacity == max(1, max(case.tokens) + spare)


@pytest.mark.gpu
@pytest.mark.parametrize("case, spare", RECYCLED, ids=sweep_id)
def test_every_legal_shape_is_computed_in_the_smallest_ring(case: Case, spare: int) -> None:
    adapter = GuardedAdapter(ring_blocks=LEAST)
    print(f"{case.id}: {prove_with_spare(adapter, case, spare, 'cuda')}")
    assert adapter.buffer is not None
    assert adapter.buffer.size.ring_blocks == LEAST
    adapter.close()
