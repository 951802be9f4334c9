"""What the fused kernel is put beside, in the same run: a bulk read, dense GEMMs, the unfused layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaproof.bench.measure.load import Layer, Work, quantised_rows
from megaproof.bench.measure.timer import Call, Timer
from megaproof.bench.model.roofline import Load
from megaproof.kernel.host.sizes import aligned
from megaproof.kernel.programs import dense, stream
from megaproof.quant.recipe import RecipeError
from megaproof.toolchain.errors import EnvironmentMissing

CHUNK = 4096
"""Rows that are quantised at a time: in float32 all of them would take gigabytes."""
FASTEST = ("deep_gemm", "triton")
"""Back ends of the baseline that are timed, the first that is there and computes the recipe."""
READ, DENSE = "read", {128: "dense_128", 64: "dense_64"}
"""Names of the calls; a promotion's granularity -> its GEMM."""


def promotions(granularity: int) -> tuple[int, int]:
    """Columns of a promotion, of GEMM 1 and of GEMM 2."""
    return 128, granularity


class Yardsticks:
    """A plain bulk read of a load's bytes, and the layer's two GEMMs dense: M = T*K rows and one expert's weights."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._generator = torch.Generator("cuda").manual_seed(layer.seed)  # the layer draws the same without us
        self._data = torch.empty(0, dtype=torch.uint8, device="cuda")
        self._operands: list[tuple[Tensor, Tensor, Tensor]] = []
        self._groups = promotions(layer.granularity)

    def calls(self, load: Load) -> list[Call]:
        """The read, the GEMM promoted per 128 (N = 2I, K = H) and the one per 64 (N = H, K = I).

        Where that one is promoted per 128 too, one call makes both: the profiler tells calls apart by their kernels.
        """
        size = aligned(load.bytes, stream.GRAIN)
        if self._data.numel() < size:
            self._data = torch.empty(0, dtype=torch.uint8, device="cuda")  # let go of the shorter one first
            self._data = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
        data, rows = self._data[:size], aligned(load.rows, dense.BLOCK)
        self._prepare(rows)
        gemms = [self._gemm(group) for group in dict.fromkeys(self._groups)]
        return [Call(READ, "stream_read", lambda: stream.stream_read(data)), *gemms]

    def _gemm(self, group: int) -> Call:
        arguments = []
        both = zip(self._groups, self._operands, (self._layer.l1, self._layer.l2), strict=True)
        for own, (a, a_sf, out), (b, b_sf) in both:
            if own == group:
                arguments.append((a, a_sf, b[0].view(torch.uint8), b_sf[0], group, out))

        def run() -> None:
            for each in arguments:
                dense.dense(*each)

        return Call(DENSE[group], f"dense_{group}", run)

    def _prepare(self, rows: int) -> None:
        """Operands of both GEMMs at M = rows; those of another M are let go."""
        if self._operands and self._operands[0][0].shape[0] == rows:
            return
        self._operands = []  # none, or both: memory may end between them
        shape = self._layer.shape
        sizes = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
        operands = []
        for group, (n, k) in zip(self._groups, sizes, strict=True):
            a, sf = self._random_rows(rows, k)
            sf = sf.repeat_interleave(128 // group, dim=1)
            operands.append((a, sf.t().contiguous(), torch.empty(rows, n, device="cuda")))
        self._operands = operands

    def _random_rows(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        codes = torch.empty(rows, columns, dtype=torch.uint8, device="cuda")
        scales = torch.empty(rows, columns // 128, device="cuda")
        for first in range(0, rows, CHUNK):
            some = slice(first, min(first + CHUNK, rows))
            x = torch.randn(some.stop - first, columns, generator=self._generator, device="cuda")
            part, scales[some] = quantised_rows(x)
            codes[some] = part.view(torch.uint8)
        return codes, scales


class Unfused:
    """The unfused layer of `megaproof.kernel.baseline`: the fastest back end to time, the exact one to compare with.

    Raises EnvironmentMissing where Triton is not installed.
    """

    def __init__(self, layer: Layer, timed: bool, compared: bool) -> None:
        self._layer = layer
        self._fast = self._fastest() if timed else None
        self._exact = self._make("exact") if compared else None
        self.gemm = self._fast.gemm.name if self._fast else None
        """The back end that is timed, in words."""

    def _make(self, gemm: str) -> Any:
        from megaproof.kernel.baseline import Baseline  # late: Triton may be missing

        layer, shape = self._layer, self._layer.shape
        sizes = layer.experts, shape.hidden, shape.intermediate
        return Baseline(layer.recipe, layer.weights, *sizes, "cuda", gemm)

    def _fastest(self) -> Any:
        reasons = []
        for gemm in FASTEST:
            try:
                return self._make(gemm)
            except (RecipeError, EnvironmentMissing) as error:
                reasons.append(f"{gemm}: {error}")
        raise EnvironmentMissing("the baseline has no back end for this recipe; " + "; ".join(reasons))

    def times(self, work: Work, timer: Timer, regime: str) -> list[float] | None:
        """Microseconds from the first kernel's start to the last one's end, by events around a graph of the pass."""
        if self._fast is None:
            return None
        baseline = self._fast
        call = Call("baseline", "", lambda: baseline.forward(*work.arguments))
        for _ in range(2):  # Triton compiles and tunes
            call.run()
        return timer.spans(call, regime)

    def differing(self, work: Work) -> int | None:
        """Elements of y whose bits are not those of the exact back end; None if they are not compared."""
        if self._exact is None:
            return None
        expected = self._exact.forward(*work.arguments).y
        return differing(work.y, expected)


def differing(y: Tensor, expected: Tensor) -> int:
    """Elements of two bfloat16 tensors of one shape whose bits differ."""
    return int((y.view(torch.int16) != expected.view(torch.int16)).sum())


def require_baseline() -> None:
    """Raises EnvironmentMissing, one sentence, where the baseline cannot be had."""
    import megaproof.kernel.baseline  # noqa: F401
