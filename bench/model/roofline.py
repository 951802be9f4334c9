"""What one rank of the layer must do: bytes and multiplies. Pure; chips.py has the rates.

The floor is the longer of two times that no kernel goes below: a plain bulk read of every byte that must move, and
every multiply at the rate of a dense GEMM with the same promotion. The figures of chips.py are a model of one card;
bench/measure measures both terms again, in the run that it reports.
"""

from __future__ import annotations

from dataclasses import dataclass

RANKS = 8
"""The layer is spread over as many; one of them is measured."""


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


def reduction_us(load: Load, read: float) -> float:
    """Time of the combine's sum at the rate of a plain read of all the load's bytes, which takes `read` us."""
    return read * load.reduction_bytes / load.bytes


def adjusted_tflops(load: Load, us: float, reduction: float) -> float | None:
    """Useful rate with the reduction's estimate taken off the time, as public benchmarks state it.

    None where nothing would be left: at a few tokens an estimate may exceed the whole.
    """
    return load.flops / (us - reduction) / 1e6 if us > reduction else None
