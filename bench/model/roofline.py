"""How fast the layer could be: bytes and multiplies of one rank, over what plain kernels of an H200 reach. Pure.

The figures here are a model of one card; bench/measure measures both of its terms again, in the run that it reports.

The floor is the longer of two times that no kernel goes below: a plain bulk read of every byte that must move, and
every multiply at the rate of a dense GEMM with the same promotion.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

RANKS = 8
"""The layer is spread over as many; one of them is measured."""
READ_GB_S = ((0.15, 3230), (0.4, 3990), (0.8, 4300), (2.0, 4490), (3.0, 4535))
"""(GB, GB/s by event time) of bulk copies into shared memory by 132 blocks; about 10 us of launch and ramp inside."""
CEILING_TFLOPS = {(4096, 2048): 1275, (7168, 3072): 1320, (6144, 2048): 1275}
"""(H, I) -> rate of dense promoted GEMMs, per 128 for two thirds of the work and per 64 for one, L2 flushed.

(6144, 2048) was not measured: its second GEMM is as shallow as that of (4096, 2048), so it takes the same rate.
"""

START_US = 10.0
"""Launch and ramp of a bulk read."""


@dataclass(frozen=True)
class Chip:
    """A chip's SMs and what its maker publishes: TB/s of memory, TFLOP/s of dense FP8."""

    sms: int
    tb_s: float
    fp8_tflops: float
    measured: bool
    """Whether the floor's two rates were measured on it; else they are by model, see `Chip.read_us`."""

    def read_us(self, size: int) -> float:
        """Time of a plain bulk read. By model: a start, and the H200's longest read's share of the rate published.

        The same model of the H200 is within 8 % of its measured curve.
        """
        if self.measured:
            return read_us(size)
        reached = READ_GB_S[-1][1] / 1e3 / CHIPS["H200"].tb_s
        return START_US + size / (self.tb_s * reached) / 1e6

    def multiply_us(self, load: Load) -> float:
        """Time of the multiplies. By model: at the share of the published rate that the H200's ceiling reaches.

        Rather long for a chip whose tensor cores are slow beside its other units: promotion then costs a smaller share.
        """
        return multiply_us(load) * (CHIPS["H200"].fp8_tflops / self.fp8_tflops)


CHIPS = {"H200": Chip(132, 4.8, 1979, True), "H20": Chip(78, 4.0, 296, False)}
"""Published rates, FP8 without sparsity: the H200's by NVIDIA's data sheet; the H20's as widely quoted."""


@dataclass(frozen=True)
class Load:
    """What one rank does: tokens of its own, routed rows T*K, and the local experts that have rows."""

    hidden: int
    intermediate: int
    tokens: int
    rows: int
    touched: int
    granularity: int = 64
    """Columns of an activation row that share a scale."""

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
        activations = self.rows * 2 * (i + 4 * (i // self.granularity))  # written, then read
        slots = self.rows * 2 * (2 * h)  # scattered as BF16, then combined
        return weights + dispatched + activations + slots + self.tokens * 2 * h

    @property
    def nvlink_bytes(self) -> int:
        """What would cross NVLink on eight ranks: rows from seven of eight come dispatched and go back as BF16."""
        h = self.hidden
        return (RANKS - 1) * self.rows * (h + h // 32 + 2 * h) // RANKS

    @property
    def reduction_bytes(self) -> int:
        """What the combine's sum alone moves: the BF16 rows of all slots read, y written."""
        return (self.rows + self.tokens) * 2 * self.hidden


def read_us(size: int) -> float:
    """Time of a plain bulk read. Linear in bytes between measured points: a start-up plus bytes at a rate.

    Beyond the outermost points the nearest segment goes on.
    """
    points = [(gb * 1e9, gb * 1e6 / rate) for gb, rate in READ_GB_S]
    segments = list(pairwise(points))
    (b0, t0), (b1, t1) = next((s for s in segments if size <= s[1][0]), segments[-1])
    return t0 + (size - b0) * (t1 - t0) / (b1 - b0)


def reduction_us(load: Load, read: float) -> float:
    """Time of the combine's sum at the rate of a plain read of all the load's bytes, which takes `read` us."""
    return read * load.reduction_bytes / load.bytes


def adjusted_tflops(load: Load, us: float, reduction: float) -> float | None:
    """Useful rate with the reduction's estimate taken off the time, as public benchmarks state it.

    None where nothing would be left: at a few tokens an estimate may exceed the whole.
    """
    return load.flops / (us - reduction) / 1e6 if us > reduction else None


def multiply_us(load: Load) -> float:
    """Time of the multiplies at the ceiling. Raises KeyError for an (H, I) without one."""
    return load.flops / CEILING_TFLOPS[load.hidden, load.intermediate] / 1e6


def floor_us(load: Load) -> float:
    """The time that nothing goes below: reading, or multiplying if that takes longer. Raises KeyError as above."""
    return max(read_us(load.bytes), multiply_us(load))
