"""The baseline's SwiGLU kernel: to the last bit on a GPU, to the bound under Triton's interpreter, and its PTX."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaproof.cases.compare import same
from megaproof.quant import atoms, twin
from megaproof.quant.cast import group_amax
from megaproof.quant.recipe import RECIPES, Recipe
from megaproof.quant.scale import activation_scale
from megaproof.reference import swiglu
from megaproof.tests.support import swiglu_rows
from megaproof.tests.support.patience import PATIENCE_S
from megaproof.tests.support.swiglu_rows import expected
from megaproof.toolchain import child

pytest.importorskip("triton", reason="triton is not installed, and the unfused baseline is written in it")

from megaproof.kernel.baseline import swiglu as fused

RECIPES_OF_SWIGLU = {
    **{
        f"{silu}-clamp{clamp}-g{group}": Recipe(silu=silu, clamp=clamp, activation_granularity=group)
        for silu in ("fast", "precise")
        for clamp in (10.0, None)
        for group in (64, 128)
    },
    "clamp0": Recipe(clamp=0.0),
    "clamp0.5": Recipe(clamp=0.5, silu="precise"),
    "public": RECIPES["pr323_small"],
    "fp32": RECIPES["fp32_scales"],
    "bf16": RECIPES["unfused"],
}
BOUNDED = {
    name: RECIPES_OF_SWIGLU[name]
    for name in ("fast-clamp10.0-g64", "precise-clampNone-g128", "clamp0", "public", "fp32")
}
INTERPRETED = (96, 256)
"""Rows and I of what the interpreter takes; at a millisecond a program it takes little."""


def compiled(recipe: Recipe) -> str:
    """PTX of the SwiGLU kernel for SM90; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chosen = fused.options(recipe)
    pointers = {"gate_up": "*fp32", "weight": "*fp32", "codes": "*u8", "scales": "*fp32"}
    signature = pointers | {"rows": "i32", "inter": "i32", "clamp": "fp32"} | dict.fromkeys(chosen, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(fused.swiglu_kernel, signature, chosen, aligned)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]


@pytest.mark.parametrize("name", ["default", "precise", "fp32_scales"])
def test_ptx_rounds_every_operation_on_its_own(name: str) -> None:
    """No multiply-add but those that expf writes out, no flush to zero but in ex2 and rcp, the chip's own casts."""
    ptx = compiled(RECIPES[name])
    written = re.sub(r"// begin inline asm.*?// end inline asm", "", ptx, flags=re.DOTALL)
    assert not re.search(r"\b(?:fma|mad)\.\S*f32|\.ftz|\.approx|\bdiv\.full", written)
    assert not re.search(r"\b(?:mul|add|sub)\.f32", written), "a plain mul or add may be contracted"
    assert set(re.findall(r"\S+\.ftz\.f32", ptx)) <= {"ex2.approx.ftz.f32", "rcp.approx.ftz.f32"}
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor, dict[str, Tensor], str]:
    """Rows, weights, and what a process with Triton's interpreter made of them for every recipe."""
    folder: Path = tmp_path_factory.mktemp("interpreted")
    gate_up, weight = swiglu_rows.rows(*INTERPRETED, seed=3)
    recipes = json.dumps([recipe.fields() for recipe in BOUNDED.values()])
    save_file({"gate_up": gate_up, "weight": weight}, folder / "in", {"recipes": recipes})
    command = child.command("tests.support.interpreted", str(folder / "in"), str(folder / "out"))
    done = subprocess.run(command, env=child.environment(), capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return gate_up, weight, load_file(folder / "out"), done.stdout


@pytest.mark.parametrize("name", BOUNDED)
def test_interpreted_kernel_is_within_the_bound(
    interpreted: tuple[Tensor, Tensor, dict[str, Tensor], str], name: str
) -> None:
    """Ladder E2: a byte is another only where the bound of silu straddles a rounding point, then the next code."""
    gate_up, weight, out, _ = interpreted
    recipe, i = BOUNDED[name], list(BOUNDED).index(name)
    group = recipe.activation_granularity
    codes, scales = out[f"codes{i}"], out[f"scales{i}"]
    want, want_scales = expected(recipe, gate_up, weight)
    gate, up = swiglu.clamp(recipe, *(half.contiguous() for half in gate_up.chunk(2, dim=1)))
    v = swiglu.activate(recipe, gate, up, weight, twin.arith()).abs()

    # Both are within the bound of numerics on silu, so twice that of each other; the products round alike.
    x = gate.double()
    relative = 2.0**-22 * ((2 + 1.173 * x.abs()) * torch.sigmoid(-x) + 2.5) + 2.0**-22
    relative = torch.where(x < -87, 1.0, relative).nan_to_num(0.0)  # where 'fast' flushes; infinite and NaN gates
    low, high = (v.double() * (1 - relative)).float(), (v.double() * (1 + relative)).float()
    choice = (recipe.activation_scale, recipe.zero_group)
    least, most = (activation_scale(group_amax(t, group), *choice)[0] for t in (low, high))
    assert bool(((least <= scales) & (scales <= most)).all()), f"{name}: a scale factor is outside the bound"

    moved = scales != want_scales
    wrong = codes != want
    steady = ~(moved.repeat_interleave(group, dim=1))
    factor = torch.where(scales == 0, 2.0**126, 1 / scales).repeat_interleave(group, dim=1)
    reach = [atoms.encode_e4m3(t * factor) & 0x7F for t in (low, high)]
    inside = (reach[0] <= codes & 0x7F) & (codes & 0x7F <= reach[1]) & (codes & 0x80 == want & 0x80)
    near = ((codes & 0x7F).int() - (want & 0x7F).int()).abs() <= 1
    print(f"{name}: {int(wrong.sum())} of {wrong.numel():,} bytes and {int(moved.sum())} scale factors differ")
    assert not bool((wrong & steady & ~(inside & near)).any())
    assert int((wrong & steady).sum()) <= max(1, 1e-5 * wrong.numel())


def test_interpreter_is_refused_by_the_product(
    interpreted: tuple[Tensor, Tensor, dict[str, Tensor], str],
) -> None:
    """TRITON_INTERPRET can't turn exact bytes into bounded ones: without the argument it is an error."""
    assert "TRITON_INTERPRET is set" in interpreted[3]


def test_rows_hold_every_hard_case() -> None:
    gate_up, weight = swiglu_rows.rows(*INTERPRETED, seed=3)
    codes, scales = expected(Recipe(), gate_up, weight)
    counts = swiglu_rows.coverage(gate_up, codes, scales, 10.0)
    print(counts)
    assert all(counts.values()), counts
    sides = [count for name, count in counts.items() if "the clamp" in name]
    assert min(sides) >= 0.01 * codes.numel(), "each side of the clamp in at least 1 % of elements"
    assert all(int(kind.sum()) for kind in (weight.isnan(), weight == 0, weight < 0, weight.abs() > 1e38))


@pytest.mark.parametrize(
    ("gate_up", "weight"),
    [
        (torch.zeros(2, 256, dtype=torch.float64), torch.zeros(2)),
        (torch.zeros(2, 128), torch.zeros(2)),
        (torch.zeros(256, 2).T, torch.zeros(2)),
        (torch.zeros(2, 256), torch.zeros(3)),
    ],
)
def test_wrong_arguments_are_named(gate_up: Tensor, weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^(gate_up|weight) is "):
        fused.swiglu_quantise(Recipe(), gate_up, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES_OF_SWIGLU)
def test_swiglu_kernel_equals_the_reference(name: str) -> None:
    recipe, codes_compared, counts = RECIPES_OF_SWIGLU[name], 0, {}
    for seed in range(4):
        gate_up, weight = swiglu_rows.rows(2048, 2048, 100 + seed, "cuda")
        if recipe.l1_rounding == "bf16":
            gate_up = gate_up.to(torch.bfloat16)
        want, want_scales = expected(recipe, gate_up, weight)
        codes, scales = fused.swiglu_quantise(recipe, gate_up, weight)
        codes_compared += same("l2_acts", want, codes)
        same("l2_acts_sf", want_scales, scales)
        counts = swiglu_rows.coverage(gate_up.float(), want, want_scales, 10.0)
    print(f"{name}: 0 of {codes_compared:,} codes differ; the last quarter has {counts}")
    absent = {"clamp0": {"codes saturated", "codes subnormal"}, "fp32": {"zero groups"}}.get(name, set())
    assert {case for case, count in counts.items() if not count} == absent
