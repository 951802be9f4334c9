"""The chips: what their makers publish, what was measured on them, and the time that no kernel goes below on each.

Another chip is a row of CHIPS here. What is measured on it goes to bench/results/<folder>, what public kernels took on
it to bench/peers/<folder>.json; all else follows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from megaproof.bench.model.roofline import Load

START_US = 10.0
"""Launch and ramp of a bulk read."""
MODEL_OF = "H200"
"""The chip whose measured shares of the published rates are taken for a chip that was not measured."""


@dataclass(frozen=True)
class Chip:
    """What a maker publishes, and the two rates that were measured, if any were."""

    name: str
    """As it stands in the device's name, 'NVIDIA H200'."""
    sms: int
    tb_s: float
    """Published rate of the memory, TB/s."""
    fp8_tflops: float
    """Published rate of dense FP8, TFLOP/s, without sparsity."""
    read_gb_s: tuple[tuple[float, float], ...] = ()
    """(GB, GB/s by event time) of bulk copies into shared memory by as many blocks as there are SMs; about 10 us of
    launch and ramp are inside. Empty: not measured, and both rates are by model."""
    ceiling_tflops: Mapping[tuple[int, int], float] = field(default_factory=dict, hash=False)
    """(H, I) -> rate of dense promoted GEMMs, per 128 for two thirds of the work and per 64 for one, L2 flushed."""

    @property
    def folder(self) -> str:
        """The name of its folder of results and of its file of peers."""
        return self.name.lower()

    @property
    def measured(self) -> bool:
        return bool(self.read_gb_s)

    def has_floor(self, load: Load) -> bool:
        """Whether both terms of `floor_us` are known for this (H, I)."""
        return (load.hidden, load.intermediate) in (self if self.measured else CHIPS[MODEL_OF]).ceiling_tflops

    def read_us(self, size: int) -> float:
        """Time of a plain bulk read of `size` bytes.

        Measured: linear in bytes between the points of the curve, a start-up plus bytes at a rate; beyond the
        outermost points the nearest segment goes on. By model: a start, and the share of the published rate that the
        longest read of MODEL_OF reaches; this model of the H200 is within 8 % of its measured curve.
        """
        if not self.measured:
            model = CHIPS[MODEL_OF]
            reached = model.read_gb_s[-1][1] / 1e3 / model.tb_s
            return START_US + size / (self.tb_s * reached) / 1e6
        points = [(gb * 1e9, gb * 1e6 / rate) for gb, rate in self.read_gb_s]
        segments = list(pairwise(points))
        (b0, t0), (b1, t1) = next((s for s in segments if size <= s[1][0]), segments[-1])
        return t0 + (size - b0) * (t1 - t0) / (b1 - b0)

    def multiply_us(self, load: Load) -> float:
        """Time of the multiplies at the ceiling. Raises KeyError for an (H, I) without one.

        By model: at the share of the published rate that the ceiling of MODEL_OF reaches. That is rather long for a
        chip whose tensor cores are slow beside its other units: promotion then costs a smaller share.
        """
        if not self.measured:
            model = CHIPS[MODEL_OF]
            return model.multiply_us(load) * (model.fp8_tflops / self.fp8_tflops)
        return load.flops / self.ceiling_tflops[load.hidden, load.intermediate] / 1e6

    def floor_us(self, load: Load) -> float:
        """The time that nothing goes below: reading, or multiplying if that takes longer. Raises KeyError as above."""
        return max(self.read_us(load.bytes), self.multiply_us(load))


H200 = Chip(
    "H200",
    132,
    4.8,
    1979,
    ((0.15, 3230), (0.4, 3990), (0.8, 4300), (2.0, 4490), (3.0, 4535)),
    {(4096, 2048): 1275, (7168, 3072): 1320, (6144, 2048): 1275},
)
"""Published rates by NVIDIA's data sheet. (6144, 2048) was not measured: its second GEMM is as shallow as that of
(4096, 2048), so it takes the same rate."""
H20 = Chip("H20", 78, 4.0, 296)
"""Published rates as they are widely quoted."""
CHIPS = {chip.name: chip for chip in (H200, H20)}


def of_device(name: str) -> Chip | None:
    """The chip of a device's name; None for one that is not in CHIPS: it has neither a floor nor peers."""
    return next((chip for chip in CHIPS.values() if re.search(rf"\b{chip.name}\b", name)), None)
