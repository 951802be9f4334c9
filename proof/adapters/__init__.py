"""Kernels as the suite reaches them: `--kernel module:factory`.

`protocol.py` says what an adapter is, `registry.py` finds the one that was asked for, `canonical.py` puts what a kernel
keeps by expert into the order of the reference; the other modules are adapters. A kernel of somebody else's is one more
module, here or anywhere.
"""

from __future__ import annotations

from megaproof.proof.adapters.protocol import METHODS, WORLDS, Adapter, AdapterError, Prepared
from megaproof.proof.adapters.registry import DEFAULT, default, load, make

__all__ = ["DEFAULT", "METHODS", "WORLDS", "Adapter", "AdapterError", "Prepared", "default", "load", "make"]
