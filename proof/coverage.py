"""What the inputs of a case reach: each feature counted, so that a test can ask for it by number.

Operands are counted where they lie. Gates, ups, codes and sums are computed again for the experts that received most
rows, with the compiled twin; steps of the tensor core by the readable atoms against exact sums, on a few rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.cases.inputs import Inputs
from megaproof.cases.inputs.edges import MIDPOINTS
from megaproof.quant import atoms
from megaproof.quant.cast import BLOCK, group_amax
from megaproof.quant.formats import f32_bits, pow2
from megaproof.quant.scale import activation_scale
from megaproof.quant.twin import arith
from megaproof.reference import combine, dispatch, gemm, swiglu
from megaproof.reference.dispatch import Routes
from megaproof.reference.operands import Operand

AMAX_EDGE = 0x600000
"""Mantissa of 448 * 2^j, the largest amax of a scale factor."""
STEP_ROWS, STEP_COLUMNS = 12, 24
"""Rows and columns of GEMM 1 whose tensor-core steps are counted, in each sampled expert."""


SAMPLED_ROWS = 512
"""Rows of a weight whose codes are counted, at least; they are spread over all of it."""


class Coverage:
    """Counts by feature: how many of how many."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}

    def add(self, feature: str, found: Tensor) -> None:
        """found: bool, one for each element that could show the feature."""
        count = self.counts.setdefault(feature, [0, 0])
        count[0] += int(found.sum())
        count[1] += found.numel()

    def share(self, feature: str) -> float:
        """Share of the elements that show it; 0 where there were none. Raises KeyError for an unknown feature."""
        found, total = self.counts[feature]
        return found / total if total else 0.0

    def missing(self, floors: dict[str, float]) -> dict[str, tuple[float, float]]:
        """The features whose share is below its floor, or 0: name -> (share, floor). A floor of 0 asks for one."""
        shares = {name: (self.share(name), floor) for name, floor in floors.items()}
        return {name: (share, floor) for name, (share, floor) in shares.items() if share < floor or share == 0}

    def table(self) -> str:
        """One line a feature."""
        return "\n".join(
            f"{name:30} {found:9} of {total:9} {100 * self.share(name):9.4f} %"
            for name, (found, total) in self.counts.items()
        )


def assert_coverage(case: Case, made: Inputs, floors: dict[str, float], **sample: int) -> Coverage:
    """`measure`, and an AssertionError that names every feature below its floor."""
    coverage = measure(case, made, **sample)
    if gone := coverage.missing(floors):
        raise AssertionError(f"{case.id} (share, floor): {gone}\n{coverage.table()}")
    return coverage


def measure(case: Case, made: Inputs, slots: Tensor | None = None, experts: int = 4) -> Coverage:
    """Counts of a case. slots: that stage of its trace, to count y too; experts: how many are sampled, at most E."""
    coverage, where = Coverage(), dispatch.routes(made.topk_idx)
    weight = torch.cat(made.topk_weights)[where.row, where.slot]
    for x, x_sf in zip(made.x, made.x_sf, strict=True):
        count_operands(coverage, "x", x, x_sf)
    count_routing(coverage, where, weight)
    acts, acts_sf = dispatch.pull(made.x, made.x_sf, where)
    received = torch.bincount(where.expert, minlength=case.shape.experts)
    for e in _busiest(received, experts):
        rows, w = where.of_expert(e), made.weights(e)
        for name, (codes, sf, _) in (("w1", w.l1), ("w2", w.l2)):
            count_operands(coverage, name, codes[:: max(1, len(codes) // SAMPLED_ROWS)], sf)
        if len(rows):
            q, q_sf = count_activation(coverage, case, (acts[rows], acts_sf[rows], w.l1), weight[rows])
            columns = torch.arange(STEP_COLUMNS) * (2 * case.shape.intermediate // STEP_COLUMNS)
            count_steps(coverage, acts[rows][:STEP_ROWS], w.l1.codes[columns])
            out = gemm.gemm2(case.recipe, q, q_sf, w.l2, arith(q.device))
            coverage.add("slot tie", f32_bits(out) & 0xFFFF == 0x8000)
            coverage.add("slot tie to even, up", f32_bits(out) & 0x1FFFF == 0x18000)
            coverage.add("slot subnormal", (out != 0) & (out.abs() < 2.0**-126))
            coverage.add("slot zero", out == 0)
    if slots is not None:
        count_y(coverage, case, slots, where, weight)
    return coverage


def _busiest(received: Tensor, count: int) -> list[int]:
    """The expert with most rows of each residue modulo `count`: families make experts of different kinds in turn."""
    return [int(received[kind::count].argmax()) * count + kind for kind in range(count)]


# --- operands ---------------------------------------------------------------------------------------------------------


def count_operands(coverage: Coverage, name: str, codes: Tensor, sf: Tensor) -> None:
    """Codes uint8 [n, k] and their scales float32, one for 128 columns."""
    magnitude, blocks = codes & 0x7F, codes.unflatten(1, (-1, BLOCK))
    coverage.add(f"{name} NaN", magnitude == 0x7F)
    coverage.add(f"{name} subnormal", (magnitude > 0) & (magnitude < 8))
    coverage.add(f"{name} minus zero", codes == 0x80)
    coverage.add(f"{name} largest", magnitude == 0x7E)
    coverage.add(f"{name} zero row", (magnitude == 0).all(1))
    coverage.add(f"{name} zero block", (blocks & 0x7F == 0).all(2))
    coverage.add(f"{name} all-subnormal row", (magnitude < 8).all(1) & (magnitude > 0).any(1))
    coverage.add(f"{name}_sf power of two", f32_bits(sf) & 0x7FFFFF == 0)
    coverage.add(f"{name}_sf as beside it", sf[:, 1:] == sf[:, :-1])
    coverage.add(f"{name}_sf as below it", sf[1:] == sf[:-1])
    coverage.add(f"{name}_sf not finite and > 0", ~((sf > 0) & torch.isfinite(sf)))


def count_routing(coverage: Coverage, where: Routes, weight: Tensor) -> None:
    """Weights of the active slots."""
    coverage.add("weight negative", weight < 0)
    coverage.add("weight zero", weight == 0)
    coverage.add("weight minus zero", (weight == 0) & torch.signbit(weight))
    coverage.add("weight power of two", (f32_bits(weight) & 0x7FFFFF == 0) & (weight != 0))
    same = (where.row[1:] == where.row[:-1]) & (weight[1:] == weight[:-1])
    coverage.add("weight as in the slot before", same)


# --- activation -------------------------------------------------------------------------------------------------------


def count_activation(
    coverage: Coverage, case: Case, operands: tuple[Tensor, Tensor, Operand], weight: Tensor
) -> tuple[Tensor, ...]:
    """Gate, up, v, and its codes and scales, which are returned."""
    recipe, twin = case.recipe, arith(weight.device)
    gate, up = gemm.gemm1(recipe, *operands, twin)
    c = recipe.clamp if recipe.clamp is not None else 10.0  # where there is none, as if it were the default's
    for name, value in (("gate", gate), ("up", up)):
        coverage.add(f"{name} above c", value > c)
        coverage.add(f"{name} below -c", value < -c)
        coverage.add(f"{name} within", (value.abs() < c) & (value != 0))
        coverage.add(f"{name} on c", value == c)
        coverage.add(f"{name} on -c", value == -c)
        beside = f32_bits(value.abs()) - f32_bits(value.new_tensor(c))
        coverage.add(f"{name} one ulp beside c", beside.abs() == 1)
    coverage.add("gate below -90", gate < -90)
    coverage.add("gate -89 to -86", (gate > -89) & (gate < -86))
    coverage.add("not finite", ~(torch.isfinite(gate) & torch.isfinite(up)))

    v = swiglu.activate(recipe, gate, up, weight, twin)
    group = recipe.activation_granularity
    amax = group_amax(v, group)
    live = ~(operands[0] & 0x7F == 0).all(1) & (weight != 0)
    coverage.add("zero group of a live row", amax[live] == 0)
    mantissa = f32_bits(amax) & 0x7FFFFF
    for name, step in (("one ulp below", -1), ("on", 0), ("one ulp above", 1)):
        coverage.add(f"amax {name} the edge", (mantissa == AMAX_EDGE + step) & (amax > 0))
    q_sf, factor = activation_scale(amax, recipe.activation_scale, recipe.zero_group)
    coverage.add("exponent at its floor", (q_sf == 2.0**-126) & (amax > 0))
    scaled = v * factor.repeat_interleave(group, dim=-1)
    q = twin.encode_e4m3(scaled)
    count_ties(coverage, scaled.abs())
    coverage.add("code subnormal", (q & 0x7F > 0) & (q & 0x7F < 8))
    coverage.add("code largest", q & 0x7F == 0x7E)
    coverage.add("code minus zero", q == 0x80)
    coverage.add("code zero, v not", (q & 0x7F == 0) & (v != 0))
    other = recipe.replace(silu="precise" if recipe.silu == "fast" else "fast")
    scaled = swiglu.activate(other, gate, up, weight, twin) * factor.repeat_interleave(group, dim=-1)
    coverage.add("code with the other silu differs", twin.encode_e4m3(scaled) != q)
    return q, q_sf


def count_ties(coverage: Coverage, scaled: Tensor) -> None:
    """|v| / scale exactly between two codes; to even is down from an even code, up from an odd one."""
    points = scaled.new_tensor(MIDPOINTS)
    index = torch.searchsorted(points, scaled).clamp(max=len(points) - 1)
    tie = points[index] == scaled
    coverage.add("tie", tie)
    coverage.add("tie to even, down", tie & (index % 2 == 0))
    coverage.add("tie to even, up", tie & (index % 2 == 1))
    coverage.add("tie between subnormals", tie & (index < 8))


# --- sums -------------------------------------------------------------------------------------------------------------


def count_steps(coverage: Coverage, a: Tensor, b: Tensor) -> None:
    """k32 steps of GEMM 1, a uint8 [m, K], b uint8 [n, K], each against its exact sum, which float64 holds."""
    a, b = (t.unflatten(1, (-1, BLOCK)).transpose(0, 1) for t in (a, b))  # [K/128, m | n, 128], a chain each
    wide_a, wide_b = (atoms.decode_e4m3(t).double() for t in (a, b))
    acc = torch.zeros(len(a), a.shape[1], b.shape[1], dtype=torch.float32, device=a.device)
    for k in range(0, BLOCK, atoms.K_STEP):
        step = slice(k, k + atoms.K_STEP)
        exact = wide_a[..., step] @ wide_b[..., step].transpose(1, 2) + acc
        acc = atoms.wgmma_e4m3(a[..., step], b[..., step], acc)
        coverage.add("step with a cut", acc.double() != exact)
        coverage.add("step that keeps nothing", (acc == 0) & (exact != 0))
        coverage.add("step whose sum is exactly 0", exact == 0)


def count_y(coverage: Coverage, case: Case, slots: Tensor, where: Routes, weight: Tensor) -> None:
    """The sums of Eq. (8) before their rounding."""
    keep: Callable[[Tensor], Tensor] = lambda total: total  # noqa: E731 - the rounding left out
    unrounded = SimpleNamespace(decode_bf16=atoms.decode_bf16, fma=atoms.fma, encode_bf16=keep)
    y = torch.cat(combine.combine(case.recipe, slots, where, weight, case.tokens, case.shape.topk, unrounded))
    coverage.add("y tie", f32_bits(y) & 0xFFFF == 0x8000)
    coverage.add("y subnormal", (y != 0) & (y.abs() < float(pow2(torch.tensor(-126)))))
    coverage.add("y not finite", ~torch.isfinite(y))
    if case.recipe.weight_fold == "before_quantisation":
        by_slot = y.new_zeros(case.shape.topk, *y.shape)
        by_slot[where.slot, where.row] = atoms.decode_bf16(slots)
        backwards = functools.reduce(torch.add, by_slot.flip(0), torch.zeros_like(y))
        rounded, other = (atoms.encode_bf16(t).view(torch.int16) for t in (y, backwards))
        coverage.add("y of the slots backwards", rounded != other)
