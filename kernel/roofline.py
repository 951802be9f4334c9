"""How fast the layer could be: bytes and multiplies of one rank, over what plain kernels of an H200 reach. Pure.

The floor is the longer of two times that no kernel goes below: a plain bulk read of every byte that must move, and
every multiply at the rate of a dense GEMM with the same promotion.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

READ_GB_S = ((0.15, 3230), (0.4, 3990), (0.8, 4300), (2.0, 4490), (3.0, 4535))
"""(GB, GB/s by event time) of bulk copies into shared memory by 132 blocks; about 10 us of launch and ramp inside."""
CEILING_TFLOPS = {(4096, 2048): 1275, (7168, 3072): 1320, (6144, 2048): 1275}
"""(H, I) -> rate of dense promoted GEMMs, per 128 for two thirds of the work and per 64 for one, L2 flushed.

(6144, 2048) was not measured: its second GEMM is as shallow as that of (4096, 2048), so it takes the same rate.
"""


@dataclass(frozen=True)
class Load:
    """What one rank does: tokens of its own, routed rows T*K, and the local experts that have rows."""

    hidden: int
    intermediate: int
    tokens: int
    rows: int
    touched: int

    @property
    def flops(self) -> int:
        """Useful ones: three H x I products a row; padding does not count."""
        return 6 * self.rows * self.hidden * self.intermediate

    @property
    def bytes(self) -> int:
        """What must cross HBM once: weights of touched experts, and every row at each hand-over."""
        h, i = self.hidden, self.intermediate
        weights = self.touched * 3 * (h * i + 4 * (h // 128) * (i // 128))
        dispatched = self.rows * (h + h // 32)
        activations = self.rows * 2 * (i + i // 16)  # written, then read
        slots = self.rows * 2 * (2 * h)  # scattered as BF16, then combined
        return weights + dispatched + activations + slots + self.tokens * 2 * h


def read_us(size: int) -> float:
    """Time of a plain bulk read. Linear in bytes between measured points: a start-up plus bytes at a rate.

    Beyond the outermost points the nearest segment goes on.
    """
    points = [(gb * 1e9, gb * 1e6 / rate) for gb, rate in READ_GB_S]
    segments = list(pairwise(points))
    (b0, t0), (b1, t1) = next((s for s in segments if size <= s[1][0]), segments[-1])
    return t0 + (size - b0) * (t1 - t0) / (b1 - b0)


def multiply_us(load: Load) -> float:
    """Time of the multiplies at the ceiling. Raises KeyError for an (H, I) without one."""
    return load.flops / CEILING_TFLOPS[load.hidden, load.intermediate] / 1e6


def floor_us(load: Load) -> float:
    """The time that nothing goes below: reading, or multiplying if that takes longer."""
    return max(read_us(load.bytes), multiply_us(load))
