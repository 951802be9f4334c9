"""The unfused baseline: its steps move the right rows, bit for bit; its tensor-core GEMMs are inside the bound."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from megaproof.cases import inputs
from megaproof.cases.cases import GATE, SMOKE, Case
from megaproof.cases.compare import same
from megaproof.proof.prove import SHOWN, prove
from megaproof.quant import atoms, twin
from megaproof.quant.recipe import RECIPES, Recipe, RecipeError
from megaproof.reference import combine, dispatch, gemm, oracle
from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.tests.support import swiglu_rows

pytest.importorskip("triton", reason="triton is not installed, and the unfused baseline is written in it")

from megaproof.kernel.baseline import Baseline, Result, backends, claims, grouped, peers, pipeline
from megaproof.kernel.baseline import swiglu as fused
from megaproof.proof.adapters import Prepared
from megaproof.proof.adapters import make as load
from megaproof.reference.operands import Operand, plain
from megaproof.toolchain.errors import EnvironmentMissing

CLAIMED = [case for case in SMOKE if claims(case.recipe) is None]
BY_TRITON = [
    *(case for case in CLAIMED if case.recipe in (RECIPES["granularity_128"], RECIPES["unfused"])),
    next(case for case in CLAIMED if case.ranks == 4 and case.recipe == Recipe() and case.family == "mixed"),
    GATE[0],
    GATE[1],
]
"""Both granularities, both roundings of GEMM 1, both math modes, masks, and full size."""


# --- without a GPU ----------------------------------------------------------------------------------------------------


def test_claims_name_the_field() -> None:
    assert [name for name, recipe in RECIPES.items() if claims(recipe)] == ["weight_in_combine"]
    with pytest.raises(RecipeError, match="weight_fold"):
        Baseline(RECIPES["weight_in_combine"], lambda e: (), 1, 128, 128, "cpu", "exact")
    with pytest.raises(ValueError, match="exact, triton, deep_gemm"):
        Baseline(Recipe(), lambda e: (), 1, 128, 128, "cpu", "cutlass")


def test_no_gpu_is_one_sentence() -> None:
    if torch.cuda.is_available():
        assert load("megaproof.proof.adapters.baseline:make").claims(Recipe()) is None
        return
    with pytest.raises(EnvironmentMissing, match="need a GPU"):
        fused.swiglu_quantise(Recipe(), torch.zeros(1, 256), torch.ones(1))
    assert "GPU" in load("megaproof.proof.adapters.baseline:make").claims(Recipe())


@pytest.mark.parametrize("tile", grouped.TILE_ROWS)
@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 300], [64, 128, 65], [0, 129, 0]])
def test_tiles_cover_every_row_once(counts: list[int], tile: int) -> None:
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rows = sum(counts) + 5  # five masked slots stand behind
    seen = []
    for expert, first, end in grouped.tile_table(offsets, rows, tile).tolist():
        if expert >= 0:
            seen += [(expert, row) for row in range(first, min(first + tile, end))]
    assert seen == [(e, row) for e in range(len(counts)) for row in range(offsets[e], offsets[e + 1])]


def _reference_combine(slots: Tensor, topk_idx: Tensor) -> Tensor:
    where = dispatch.routes([topk_idx])
    rows, tokens = slots.flatten(0, 1)[topk_idx.flatten() >= 0], (len(topk_idx),)
    return combine.combine(Recipe(), rows, where, torch.zeros(len(where)), tokens, topk_idx.shape[1], atoms)[0]


def run(case: Case, device: str, gemm_name: str) -> tuple[Result, LayerResult, inputs.Inputs]:
    """The baseline and the reference on a case, statistics started at 5."""
    made = inputs.make(case, device)
    shape = case.shape
    sizes = (shape.experts, shape.hidden, shape.intermediate)
    stats = [torch.full((shape.experts // case.ranks,), 5, dtype=torch.int32, device=device) for _ in case.tokens]
    result = Baseline(case.recipe, made.weights, *sizes, device, gemm_name)(*made.arguments()[:4], stats=stats)
    return result, moe_layer(case.recipe, *made.arguments(), stats, trace=True, experts=shape.experts), made


def check_all(result: Result, want: LayerResult) -> int:
    """Every stage, y and statistics, bit for bit; returns elements compared."""
    assert want.trace is not None
    stages = result.stages()
    assert set(stages) == set(SHOWN)
    assert {len(stage) for stage in stages.values()} == {len(want.trace["rows"])}
    compared = sum(same(name, want.trace[name], stage) for name, stage in stages.items() if len(stage))
    compared += sum(same("y", a, b) for a, b in zip(want.y, result.y, strict=True))
    return compared + sum(same("stats", a, b) for a, b in zip(want.stats, result.stats, strict=True))


@pytest.fixture
def kernels_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two steps that need a GPU are the reference's; what is left are dispatch, GEMMs, scatter, their order."""
    monkeypatch.setattr(fused, "swiglu_quantise", swiglu_rows.expected)
    monkeypatch.setattr(pipeline, "combine", _reference_combine)


@pytest.mark.parametrize("case", CLAIMED, ids=lambda case: f"steps-{case.id}")
@pytest.mark.usefixtures("kernels_by_the_reference")
def test_steps_move_the_right_rows(case: Case) -> None:
    result, want, _ = run(case, "cpu", "exact")
    check_all(result, want)
    assert result.gemm.startswith("exact")


class FakeDeepGemm(ModuleType):
    """DeepGEMM's interface with the exact model inside."""

    def get_mk_alignment_for_contiguous_layout(self) -> int:
        return 16

    def m_grouped_fp8_gemm_nt_contiguous(
        self, lhs: tuple[Tensor, Tensor], rhs: tuple[Tensor, Tensor], out: Tensor, owner: Tensor
    ) -> None:
        assert owner.dtype == torch.int32
        assert len(owner) == len(out) == len(lhs[0])
        assert len(owner) % 16 == 0
        for block in range(0, len(owner), 16):
            experts = {e for e in owner[block : block + 16].tolist() if e >= 0}
            assert len(experts) <= 1, "a block of rows belongs to one expert"
            for e in experts:
                rows = slice(block, block + 16)
                a, w = lhs[0][rows].view(torch.uint8), Operand(rhs[0][e].view(torch.uint8), rhs[1][e])
                total = gemm.promoted(a, lhs[1][rows], w, 128, twin.arith())
                out[rows] = twin.arith().encode_bf16(total)


@pytest.mark.usefixtures("kernels_by_the_reference")
def test_deep_gemm_gets_aligned_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CLAIMED if case.recipe == RECIPES["unfused"])
    masked = Case(case.shape, (7, 0), case.recipe, masked=30)
    with pytest.raises(RecipeError, match="l1_rounding"):
        run(CLAIMED[0], "cpu", "deep_gemm")
    if peers()["deep_gemm"] is None:
        with pytest.raises(EnvironmentMissing, match="deep_gemm is not installed"):
            run(case, "cpu", "deep_gemm")
    monkeypatch.setattr(backends, "_deep_gemm", lambda: FakeDeepGemm("deep_gemm"))
    for each in (case, masked):
        result, want, _ = run(each, "cpu", "deep_gemm")
        check_all(result, want)
        assert result.gemm.startswith("deep_gemm")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CLAIMED, GATE[0]], ids=lambda case: f"exact-{case.id}")
def test_baseline_with_exact_gemms_equals_the_reference(case: Case) -> None:
    result, want, made = run(case, "cuda", "exact")
    compared = check_all(result, want)
    print(f"{case.id}: 0 of {compared:,} elements differ ({result.gemm})")
    prepared = Prepared(case, made, torch.device("cuda"))
    fresh = moe_layer(case.recipe, *made.arguments(), trace=True, experts=case.shape.experts)
    assert prove(load("megaproof.proof.adapters.baseline:make"), prepared, fresh).elements > 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", BY_TRITON, ids=lambda case: f"triton-{case.id}")
def test_triton_gemms_are_inside_the_fp64_bound(case: Case) -> None:
    """Their bits are the compiler's business, so they are bounded; how many agree all the same is printed."""
    result, want, made = run(case, "cuda", "triton")
    assert want.trace is not None
    recipe = case.recipe
    columns = torch.arange(0, case.shape.hidden, case.shape.hidden // 64)
    rank = next(rank for rank in range(case.ranks) if case.tokens[rank])
    y64, bound = oracle.fp64_layer(
        *(tensors[rank] for tensors in made.arguments()[:4]),
        plain(made.weights),
        torch.tensor([case.tokens[rank] - 1]),
        columns,
        clamp=recipe.clamp,
        silu=recipe.silu,
        granularity=recipe.activation_granularity,
        activation_scale=recipe.activation_scale,
        l1_rounding=recipe.l1_rounding,
    )
    used = oracle.headroom(result.y[rank][-1:, columns], y64, bound)
    y, want_y = torch.cat(result.y), want.trace["y"]
    differ = {
        name: f"{int((stage.float() != want.trace[name].float()).sum()):,} of {stage.numel():,}"
        for name, stage in (result.stages() | {"y": y}).items()
    }
    diff = oracle.calc_diff(y, want_y)
    print(f"{case.id}: {result.gemm}, {100 * used:.2f} % of the bound, calc_diff {diff:.1e}, differ {differ}")
    assert used <= 1.0
    assert diff < 1e-4
    for a, b in zip(want.stats, result.stats, strict=True):
        same("stats", a, b)
