"""How long tests wait for what has to come: for events, and never so short that a busy machine decides."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 1200.0
"""Ends what would never end. What tests wait for takes seconds, on a machine with other work perhaps a minute; a test
that has waited this long has found something that hangs."""


def wait_for(event: Callable[[], bool]) -> None:
    """Returns as soon as `event()` is true. Raises TimeoutError after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not event():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{event} has not become true within {PATIENCE_S:g} s")
        time.sleep(0.05)
