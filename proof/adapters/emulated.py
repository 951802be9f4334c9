"""The fused kernel without a GPU: its own sources under `megaproof.kernel.emulator`, as an adapter.

`pytest -k smoke --kernel proof.adapters.emulated:make` proves them like any kernel. Small shapes only: a product takes
nanoseconds here, and every padding row is multiplied.
"""

from __future__ import annotations

from megaproof.kernel import emulator
from megaproof.kernel.host.buffer import BufferSize
from megaproof.proof.adapters.megaproof import MegaproofAdapter
from megaproof.toolchain.errors import EnvironmentMissing

MOST_PRODUCTS = 1 << 26
"""H times I of a layer that can be waited for, times the experts of the layer."""


class EmulatedAdapter(MegaproofAdapter):
    """ring_blocks as there; run: blocks a rank, seed, and what is changed in the sources."""

    name = "megaproof, emulated"

    def __init__(self, ring_blocks: int | None = None, run: emulator.Run | None = None) -> None:
        super().__init__(ring_blocks)
        self.run = run or emulator.Run()

    def _require(self) -> None:
        if emulator.compiler() is None:
            raise EnvironmentMissing("no C++ compiler is on PATH: the emulator needs g++ or clang++")

    def _make_buffer(self, size: BufferSize) -> emulator.Buffers:
        if size.hidden * size.intermediate * size.experts > MOST_PRODUCTS:
            raise EnvironmentMissing("this layer is too large to be emulated in reasonable time: smoke shapes are not")
        return emulator.buffers(size)

    def launch(self) -> None:
        """Raises EmulationError for a deadlock, collectives that do not match, or a role that gave up."""
        recipe = self._prepared.case.recipe
        emulator.launch(self._buffer, self.weights, self.outputs, self.counts, recipe, self.run)


def make() -> EmulatedAdapter:
    """The factory of `--kernel megaproof.proof.adapters.emulated:make`."""
    return EmulatedAdapter()
