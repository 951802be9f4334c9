"""Fixtures of the tests on silicon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from megaproof.proof.guards import GuardedAdapter
from megaproof.tests.support import problems
from megaproof.tests.support.invariance import Tally, problem


@pytest.fixture
def adapter() -> Iterator[GuardedAdapter]:
    adapter = GuardedAdapter()
    yield adapter
    adapter.close()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """What a test compared; printed at its end. A test that compared nothing has proven nothing."""
    tally: Tally = Counter()
    yield tally
    stages = ", ".join(f"{stage} {count:,}" for stage, count in sorted(tally.items()))
    print(f"{request.node.name}: {tally.total():,} elements: {stages}")


@pytest.fixture(scope="module", autouse=True)
def _no_problem_outlives_the_file() -> Iterator[None]:
    yield
    problem.cache_clear()
    problems.mixed_weights.cache_clear()
