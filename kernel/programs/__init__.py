"""The registry: every CUDA program of the project, which `kernel build`, the pins and the tests of the gate go through.

A new program is one .cu and one .py here, and one entry in `PROGRAMS`.
"""

from __future__ import annotations

from pathlib import Path

from megaproof.kernel.programs import dense, grouped, moe, probe, stream
from megaproof.quant import twin_gpu
from megaproof.toolchain.pins import FILES, Pins
from megaproof.toolchain.program import Program

PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        probe.PROGRAM,
        twin_gpu.PROGRAM,
        dense.PROGRAM,
        grouped.PROGRAM,
        moe.moe(64),
        moe.moe(128),
        stream.PROGRAM,
        moe.phases(64),
    )
}
"""By name, in the order in which they are built and pinned."""
PINS = Pins(Path(__file__).with_name("cubins.json"), renew="python -m kernel build --all --pin")
"""What was gated, and what results name."""
FILES.append(PINS)
