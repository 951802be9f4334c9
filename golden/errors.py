"""What is wrong with a golden, in one sentence."""

from __future__ import annotations


class GoldenError(RuntimeError):
    """A golden that is missing or damaged, or a folder that none can be written to; it names the file and the rule."""
