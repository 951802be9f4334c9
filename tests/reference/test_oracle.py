"""The FP64 oracle: its bounds hold for the model, and the faults it must see are beyond them."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import megaproof.reference.oracle
from megaproof.quant import atoms
from megaproof.quant.recipe import RECIPES
from megaproof.reference import __main__ as reference_cli
from megaproof.reference.oracle import (
    Refused,
    calc_diff,
    fp64_layer,
    gemm_bound,
    headroom,
    relative_error,
    usual_reference,
)
from megaproof.reference.oracle.activation import Bounded, silu_bound
from megaproof.reference.oracle.decode import VALUES
from megaproof.tests.support.oracle_cases import Draw, choices, everything, mixed_case, model_y, replaced, with_weights

# --- independence -----------------------------------------------------------------------------------------------------


def test_oracle_imports_nothing_of_the_project() -> None:
    allowed = {"torch", "numpy", "math", "typing", "collections", "__future__"}
    files = list(Path(megaproof.reference.oracle.__file__).parent.glob("*.py"))
    assert len(files) >= 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith("megaproof.reference.oracle."), (
                    f"{file.name}: {name}"
                )


def test_e4m3_table_is_the_definition() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numbers = [code for code in range(256) if code & 127 != 127]
    theirs = torch.arange(256, dtype=torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype("float64")
    assert VALUES[numbers].tolist() == theirs[numbers].tolist()


# --- the GEMM bound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("kind", ["gaussian", "spread", "subnormal", "sparse"])
def test_gemm_bound_holds(kind: str, group: int) -> None:
    draw = Draw(1)
    a, w = draw.codes(kind, 4, 512), draw.codes(kind, 128, 512)
    a_sf, w_sf = draw.uniform(0, 1, 4, 512 // group), draw.uniform(0, 1, 1, 4)
    exact, bound = gemm_bound(a, a_sf, w, w_sf, group)
    total = torch.zeros(4, 128)
    for g in range(512 // group):
        part = slice(g * group, (g + 1) * group)
        scale = a_sf[:, g : g + 1] * w_sf[0, g * group // 128]
        total = atoms.fma(scale, atoms.wgmma_chain(a[:, part], w[:, part]), total)
    real = (VALUES[a.int()] * a_sf.double().repeat_interleave(group, 1)) @ (
        VALUES[w.int()] * w_sf.double().repeat_interleave(128, 1)
    ).t()
    assert (exact - real).abs().max() < 1e-12 * real.abs().max()
    assert 0 < headroom(total, exact, bound) <= 1
    assert bound.mean() < 0.02 * exact.abs().mean()


def test_gemm_bound_is_nearly_reached() -> None:
    """One product of 448 * 448 cuts 31 products of 7.5 away, each just below the last kept bit, 8.

    The rest of the bound is the cut of the sum to 14 bits, which finds nothing left to lose here.
    """
    a, w = torch.zeros(1, 128, dtype=torch.uint8), torch.zeros(128, 128, dtype=torch.uint8)
    a[:, 0], a[:, 1:32] = 0x7E, 0x42  # 448, 2.5
    w[:, 0], w[:, 1:32] = 0x7E, 0x44  # 448, 3
    exact, bound = gemm_bound(a, torch.ones(1, 1), w, torch.ones(1, 1))
    assert 0.85 < headroom(atoms.wgmma_chain(a, w), exact, bound) <= 1


# --- the FP64 layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silu", ["fast", "precise"])
def test_silu_bound_holds(silu: str) -> None:
    bits = (Draw(5).words(1 << 18) - (1 << 31)).to(torch.int32).view(torch.float32)
    gate = torch.cat([bits[bits.abs() < 1e30], torch.linspace(-110, 110, 1 << 18), torch.linspace(-89, -86, 1 << 12)])
    value, error = silu_bound(Bounded(gate.double(), torch.zeros(len(gate)).double()), silu)
    assert headroom(atoms.silu(gate, silu == "fast"), value, error) <= 1
    tight = (gate > -80) & (gate.abs() > 1e-30)
    assert (error / value.abs())[tight].max() < 2.0**-23 * 200


@pytest.mark.parametrize(
    "name, clamp, code",
    [
        *((name, RECIPES[name].clamp, "gaussian") for name in RECIPES),
        ("default", 1.0, "spread"),
        ("precise", 1.0, "gaussian"),
        ("precise", None, "spread"),
    ],
)
def test_fp64_bound_holds_for_the_model(name: str, clamp: float | None, code: str) -> None:
    recipe, case = RECIPES[name].replace(clamp=clamp), mixed_case(code=code)
    y64, bound = fp64_layer(*case, *everything(case), **choices(recipe))
    assert 0.02 < headroom(model_y(recipe, case), y64, bound) <= 1
    assert bound.median() < 2 * y64.abs().median()  # it says something


def drop_expert(case: list) -> list:
    return replaced(case, 2, (slice(None), 0), -1)


def swap_weights(case: list) -> list:
    return [*case[:3], case[3].roll(1, 1), case[4]]


def swap_rows(case: list) -> list:
    return [case[0].roll(1, 0), case[1].roll(1, 0), *case[2:]]


def double_scales(case: list) -> list:
    return [case[0], case[1] * 2, *case[2:]]


@pytest.mark.parametrize("fault", [drop_expert, swap_weights, swap_rows, double_scales])
def test_fp64_bound_sees_faults(fault: Callable[[list], list]) -> None:
    recipe, case = RECIPES["default"], mixed_case()
    y64, bound = fp64_layer(*case, *everything(case), **choices(recipe))
    assert headroom(model_y(recipe, fault(case)), y64, bound) > 1


def test_fp64_bound_sees_other_clamps() -> None:
    case = mixed_case()
    y64, bound = fp64_layer(*case, *everything(case), **choices(RECIPES["default"]))
    for clamp in (None, 5.0):
        assert headroom(model_y(RECIPES["default"].replace(clamp=clamp), case), y64, bound) > 1


def test_fp64_layer_picks_tokens_and_columns() -> None:
    case, recipe = mixed_case(), choices(RECIPES["default"])
    y64, bound = fp64_layer(*case, *everything(case), **recipe)
    tokens, columns = torch.tensor([4, 1]), torch.tensor([7, 300, 511])
    some, some_bound = fp64_layer(*case, tokens, columns, **recipe)
    assert torch.allclose(some, y64[tokens][:, columns], rtol=1e-12)
    assert torch.allclose(some_bound, bound[tokens][:, columns], rtol=1e-6)


def test_all_masked_and_zero_rows_are_exactly_zero() -> None:
    case = mixed_case()
    case[2][3] = -1
    y64, bound = fp64_layer(*case, *everything(case), **choices(RECIPES["default"]))
    assert (y64[[2, 3]] == 0).all()
    assert (bound[3] == 0).all()
    assert (bound[2] < 1e-30).all()
    assert headroom(torch.full_like(y64, 1e-20)[3], y64[3], bound[3]) == math.inf
    assert headroom(torch.full_like(y64, math.nan)[0], y64[0], bound[0]) == math.inf


REFUSALS = {
    "x is NaN": (lambda c: replaced(c, 0, (0, 5), 0xFF), "a holds a NaN code"),
    "x_sf is NaN": (lambda c: replaced(c, 1, (0, 0), math.nan), "a_sf holds a NaN"),
    "x_sf is huge": (lambda c: replaced(c, 1, (0, 0), 1e37), "too near to the end of float32"),
    "weight is inf": (lambda c: replaced(c, 3, (0, 0), math.inf), "topk_weights holds a NaN or an infinity"),
    "w2 is NaN": (lambda c: with_weights(c, 2, 0x7F), "w2 of expert"),
}


@pytest.mark.parametrize("change, message", REFUSALS.values(), ids=REFUSALS)
def test_fp64_layer_refuses(change: Callable[[list], list], message: str) -> None:
    case = change(mixed_case())
    with pytest.raises(Refused, match=message):
        fp64_layer(*case, *everything(case), **choices(RECIPES["default"]))


def test_fp64_layer_refuses_unknown_choices() -> None:
    case = mixed_case()
    for wrong in ({"silu": "slow"}, {"granularity": 32}, {"clamp": -1.0}, {"activation_scale": "e5m2"}):
        with pytest.raises(Refused, match=next(iter(wrong))):
            fp64_layer(*case, *everything(case), **(choices(RECIPES["default"]) | wrong))


def test_relative_error_is_root_mean_square() -> None:
    y64 = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    assert relative_error(y64.float(), y64) == 0.0
    assert relative_error(y64.to(torch.bfloat16) * 1.5, y64) == pytest.approx(0.5)
    assert relative_error(torch.ones(2), torch.zeros(2, dtype=torch.float64)) == 0.0  # no size to compare with


def test_the_error_of_both_granularities_is_shown() -> None:
    shown = CliRunner().invoke(
        reference_cli.app, ("error", "smoke-r1-t5", "--tokens", "2", "--columns", "16", "--json")
    )
    report = json.loads(shown.stdout)
    assert shown.exit_code == 0
    assert report["elements"] == 32
    assert all(0.001 < report["errors"][granularity] < 0.1 for granularity in ("64", "128"))  # e4m3 has 3 bits


# --- what the field compares with -------------------------------------------------------------------------------------


def test_usual_reference_is_near_and_blind() -> None:
    case = mixed_case()
    y = model_y(RECIPES["default"], case)
    usual = usual_reference(*case, clamp=10.0)
    assert usual.dtype == torch.bfloat16
    assert 0 < calc_diff(y, usual) < 5e-3
    assert (y.view(torch.int16) != usual.view(torch.int16)).double().mean() > 0.5  # near, and other bits
    late = usual_reference(*case, clamp=10.0, weight_fold="in_combine")
    assert abs(calc_diff(late, usual)) < 1e-6  # with amax / 448 the codes hardly depend on the routing weight
    assert calc_diff(y, 1.14 * y.double()) < 0.01  # the figure of product.md: 14 % too large passes
    assert calc_diff(y, y) == calc_diff(y * 0, y * 0) == 0
