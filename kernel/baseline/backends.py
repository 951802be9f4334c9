"""Who computes the baseline's two grouped GEMMs. A result names the one that ran.

'exact'      the reference's promoted sum on the compiled twin: the model, bit for bit, and never timed
'triton'     Triton on the tensor cores, `grouped.py`; its bits are the compiler's business, so it is bounded
'deep_gemm'  DeepGEMM's m_grouped_fp8_gemm_nt_contiguous where that package is installed; bounded, BF16 results only
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from megaproof.kernel.baseline import grouped
from megaproof.quant import twin
from megaproof.quant.recipe import Recipe, RecipeError
from megaproof.reference import gemm, scatter
from megaproof.reference.arguments import check_weights
from megaproof.reference.operands import ExpertWeights, Operand, Weights
from megaproof.toolchain.errors import EnvironmentMissing

PEERS = ("deep_gemm", "deep_ep")
"""Other people's packages that a user's baseline could have; DeepEP needs several GPUs, so it is only reported."""


def peers() -> dict[str, str | None]:
    """Package -> its version, or None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PEERS:
        found[name] = None
        if importlib.util.find_spec(name):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "installed, version unknown"
    return found


class GroupedGemm(Protocol):
    """The two GEMMs of a pool whose rows stand sorted by expert; `offsets` int64 [E+1] on the device."""

    name: str
    """Which back end, and on what."""

    def gemm1(self, acts: Tensor, acts_sf: Tensor, offsets: Tensor) -> Tensor:
        """Eq. (3): uint8 [n, H], float32 [n, H/128] -> gate then up, float32 or (l1_rounding) bfloat16 [n, 2I]."""

    def gemm2(self, acts: Tensor, acts_sf: Tensor, offsets: Tensor) -> Tensor:
        """Eq. (6), (7): uint8 [n, I], float32 [n, I/granularity] -> bfloat16 [n, H]."""


@dataclass(frozen=True)
class Sizes:
    """E, H and I of a layer."""

    experts: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class Stacked:
    """The weights of E experts on a device, one operand a GEMM with E in front: codes [E,2I,H] and [E,H,I]."""

    l1: Operand
    l2: Operand

    @classmethod
    def of(cls, recipe: Recipe, weights: Weights, sizes: Sizes) -> Stacked:
        """Asks for each expert once. Raises `ArgumentError` where its tensors do not fit."""
        stacks: tuple[Tensor, ...] = ()
        for e in range(sizes.experts):
            found = weights(e)
            check_weights(recipe, e, found, sizes.hidden)
            stacks = stacks or tuple(t.new_empty(sizes.experts, *t.shape) for t in found.tensors())
            for stack, tensor in zip(stacks, found.tensors(), strict=True):
                stack[e] = tensor
        return cls(Operand(*stacks[:2]), Operand(*stacks[2:]))


class ExactGemms:
    """The GPU twin (`quant/twin.py`) through `megaproof.reference.gemm`: the reference's own sums."""

    def __init__(self, recipe: Recipe, weights: Weights, sizes: Sizes, device: torch.device) -> None:
        self._recipe, self._weights, self._sizes = recipe, weights, sizes
        self._arith = twin.arith(device)
        self.name = f"exact ({twin.describe(device)})"

    def gemm1(self, acts: Tensor, acts_sf: Tensor, offsets: Tensor) -> Tensor:
        """See `GroupedGemm.l1`."""
        dtype = torch.bfloat16 if self._recipe.l1_rounding == "bf16" else torch.float32
        out = torch.zeros(acts.shape[0], 2 * self._sizes.intermediate, dtype=dtype, device=acts.device)
        for e, rows in _busy(offsets):
            halves = gemm.gemm1(self._recipe, acts[rows], acts_sf[rows], self._expert(e).l1, self._arith)
            out[rows] = torch.cat(halves, dim=1).to(dtype)
        return out

    def gemm2(self, acts: Tensor, acts_sf: Tensor, offsets: Tensor) -> Tensor:
        """See `GroupedGemm.l2`."""
        out = torch.zeros(acts.shape[0], self._sizes.hidden, dtype=torch.bfloat16, device=acts.device)
        for e, rows in _busy(offsets):
            total = gemm.gemm2(self._recipe, acts[rows], acts_sf[rows], self._expert(e).l2, self._arith)
            out[rows] = scatter.to_slot(total, self._arith)
        return out

    def _expert(self, e: int) -> ExpertWeights:
        found = self._weights(e)
        check_weights(self._recipe, e, found, self._sizes.hidden)
        return found


def _busy(offsets: Tensor) -> list[tuple[int, slice]]:
    """Experts with rows, and those rows of the pool."""
    ends = offsets.tolist()
    return [(e, slice(ends[e], ends[e + 1])) for e in range(len(ends) - 1) if ends[e] < ends[e + 1]]


class TensorCore:
    """The Triton grouped GEMM, tiles tuned on first use of a size."""

    def __init__(self, recipe: Recipe, weights: Weights, sizes: Sizes, device: torch.device) -> None:
        import triton

        self.name = f"triton {triton.__version__}"
        self._dtype = torch.bfloat16 if recipe.l1_rounding == "bf16" else torch.float32
        self._weights = Stacked.of(recipe, weights, sizes)

    def gemm1(self, acts: Tensor, acts_sf: Tensor, offsets: Tensor) -> Tensor:
        """See `GroupedGemm.l1`."""
        return self._run(acts, acts_sf, self._weights.l1, offsets, self._dtype)

    def gemm2(self, acts: Tensor, acts_sf: Tensor, offsets: Tensor) -> Tensor:
        """See `GroupedGemm.l2`."""
        return self._run(acts, acts_sf, self._weights.l2, offsets, torch.bfloat16)

    def _run(self, a: Tensor, a_sf: Tensor, w: Operand, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        rows = a.shape[0]
        out = torch.empty(rows, w.codes.shape[1], dtype=dtype, device=a.device)
        tile = grouped.tile_rows(rows, w.codes.shape[0])
        grouped.grouped_gemm(a, a_sf, w.codes, w.scales, grouped.tile_table(offsets, rows, tile), tile, out)
        return out


class DeepGemm:
    """DeepGEMM's contiguous grouped GEMM: an expert's rows are padded to its alignment, in copies that it needs."""

    def __init__(self, recipe: Recipe, weights: Weights, sizes: Sizes, device: torch.device) -> None:
        if recipe.l1_rounding != "bf16":
            raise RecipeError(f"recipe field l1_rounding = {recipe.l1_rounding!r}: DeepGEMM's results are 'bf16'")
        if recipe.activation_granularity != 128:
            raise RecipeError(
                f"recipe field activation_granularity = {recipe.activation_granularity}: DeepGEMM's scales cover 128"
            )
        self._library = _deep_gemm()
        self.name = f"deep_gemm {peers()['deep_gemm']}"
        self._weights = Stacked.of(recipe, weights, sizes)

    def gemm1(self, acts: Tensor, acts_sf: Tensor, offsets: Tensor) -> Tensor:
        """See `GroupedGemm.l1`."""
        return self._run(acts, acts_sf, self._weights.l1, offsets)

    def gemm2(self, acts: Tensor, acts_sf: Tensor, offsets: Tensor) -> Tensor:
        """See `GroupedGemm.l2`."""
        return self._run(acts, acts_sf, self._weights.l2, offsets)

    def _run(self, a: Tensor, a_sf: Tensor, w: Operand, offsets: Tensor) -> Tensor:
        rows, experts = a.shape[0], w.codes.shape[0]
        align = self._library.get_mk_alignment_for_contiguous_layout()
        room = (offsets.diff() + align - 1) // align * align
        first = room.cumsum(0) - room  # of each expert, in the padded pool
        number = torch.arange(rows, device=a.device)
        expert = torch.searchsorted(offsets, number, right=True) - 1
        known = expert.clamp(max=experts - 1)  # masked rows stand behind the last expert
        place = torch.where(expert < experts, first[known] + number - offsets[known], -1)

        padded = -(-rows // align) * align + experts * align
        source = torch.zeros(padded + 1, dtype=torch.int64, device=a.device).index_copy_(
            0, place % (padded + 1), number
        )
        owner = torch.full((padded + 1,), -1, dtype=torch.int32, device=a.device)
        owner = owner.index_copy_(0, place % (padded + 1), torch.where(place < 0, -1, expert).to(torch.int32))
        lhs = (a[source[:-1]].view(torch.float8_e4m3fn), a_sf[source[:-1]])
        out = torch.empty(padded, w.codes.shape[1], dtype=torch.bfloat16, device=a.device)
        rhs = (w.codes.view(torch.float8_e4m3fn), w.scales)
        self._library.m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, owner[:-1])
        return out[place.clamp(min=0)]


def _deep_gemm() -> ModuleType:
    if not importlib.util.find_spec("deep_gemm"):
        raise EnvironmentMissing("deep_gemm is not installed; the other back ends are 'exact' and 'triton'")
    return importlib.import_module("deep_gemm")


BACKENDS: dict[str, type[ExactGemms | TensorCore | DeepGemm]] = {
    "exact": ExactGemms,
    "triton": TensorCore,
    "deep_gemm": DeepGemm,
}
