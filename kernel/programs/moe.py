"""The fused kernel as programs: a cubin for each granularity, and the same with marks of its phases."""

from __future__ import annotations

import ctypes
from dataclasses import replace

from megaproof import HOME
from megaproof.kernel.host.params import Params
from megaproof.kernel.host.sizes import DEFINES, GRANULARITIES, GROUP, ROLES, shared_bytes
from megaproof.toolchain.program import Program

ENTRIES = ("moe_fast", "moe_precise")


def _shipped(granularity: int) -> Program:
    return Program(
        name="moe" if granularity == GROUP else f"moe_g{granularity}",
        sources=(HOME / "kernel" / "moe_sm90.cu",),
        entries=ENTRIES,
        defines={
            **DEFINES,
            "SHARED_BYTES": shared_bytes(),
            "PARAMS_BYTES": ctypes.sizeof(Params),
            "GRANULARITY": granularity,
        },
        shared=shared_bytes(),
        # barrier.cuh has a few static words; the alignment of the dynamic part makes 1,024 bytes of them.
        static=1024,
        gemm=("moe_",),
        roles=ROLES,
    )


def _marked(plain: Program) -> Program:
    return replace(plain.with_defines(PHASES=1), name=plain.name.replace("moe", "phases"), gated=False)


_MOE = {granularity: _shipped(granularity) for granularity in GRANULARITIES}
_PHASES = {granularity: _marked(plain) for granularity, plain in _MOE.items()}


def moe(granularity: int = GROUP) -> Program:
    """The kernel that ships, for one of `GRANULARITIES`: always the same object.

    Ranks and SMs are run-time values, and one tile serves all shapes: there is one cubin for each granularity.
    """
    return _MOE[granularity]


def phases(granularity: int = GROUP) -> Program:
    """The same kernel with the marks of phase.cuh. It is measured, never shipped, and not gated: it may spill."""
    return _PHASES[granularity]
