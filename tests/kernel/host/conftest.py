"""The host's tests make many small tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megaproof.tests.support.threads import threads


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield
