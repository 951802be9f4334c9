"""Every case of the matrix, proven in every way that it can be; the proofs themselves are in proof/gate.py."""

from __future__ import annotations

from megaproof.proof.gate import TestCase, TestGolden, run

__all__ = ["TestCase", "TestGolden", "run"]
