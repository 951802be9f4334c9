"""Eq. (4), (5): one-sided gate, two-sided up, NaN that the clamp drops, the order of roundings, the fold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaproof.quant import atoms, cast
from megaproof.quant.formats import f32_bits, f32_from_bits
from megaproof.quant.recipe import RECIPES, Recipe
from megaproof.reference import swiglu
from megaproof.tests.support.bit_patterns import assert_same, scattered

SIDES = torch.tensor([[-200.0, -10.0, -9.5, 0.0, 9.5, 10.0, 10.5, math.inf, -math.inf, math.nan]])


def test_gate_is_clamped_above_only_and_up_on_both_sides() -> None:
    gate, up = swiglu.clamp(Recipe(clamp=10.0), SIDES, SIDES)
    assert gate[0].tolist() == [-200.0, -10.0, -9.5, 0.0, 9.5, 10.0, 10.0, 10.0, -math.inf, 10.0]
    assert up[0].tolist() == [-10.0, -10.0, -9.5, 0.0, 9.5, 10.0, 10.0, 10.0, -10.0, -10.0]


def test_no_clamp_changes_nothing() -> None:
    gate, up = swiglu.clamp(Recipe(clamp=None), SIDES, -SIDES)
    assert torch.equal(f32_bits(gate), f32_bits(SIDES))
    assert torch.equal(f32_bits(up), f32_bits(-SIDES))


def test_a_clamp_of_zero() -> None:
    gate, up = swiglu.clamp(Recipe(clamp=0.0), SIDES, SIDES)
    assert gate[0].tolist() == [-200.0, -10.0, -9.5, 0.0, 0.0, 0.0, 0.0, 0.0, -math.inf, 0.0]
    assert up.abs()[0].tolist() == [0.0] * 10


@pytest.mark.parametrize("name", ["default", "precise", "no_clamp", "weight_in_combine"])
def test_activation_operation_by_operation(name: str) -> None:
    """fl(fl(silu(gate) * up) * weight): each product rounded to fp32 on its own."""
    recipe = RECIPES[name]
    x = scattered(2048, 31)[:4096]
    gate, up = (t.reshape(8, 512) for t in (x, x.flip(0)))
    weight = torch.tensor([1.0, -0.3, 0.0, 0.7, 1e-30, -1.0, 3.0, 0.1])
    v = swiglu.activate(recipe, gate, up, weight, atoms)
    clamped = swiglu.clamp(recipe, gate, up)
    silu = atoms.silu(clamped[0], recipe.silu == "fast").double()
    product = (silu * clamped[1].double()).float()  # 48 bits: the float64 product is exact
    if recipe.weight_fold == "before_quantisation":
        product = (product.double() * weight[:, None].double()).float()
    same = (f32_bits(v) == f32_bits(product)) | (v.isnan() & product.isnan())
    assert bool(same.all())
    assert torch.equal(v.isnan(), product.isnan())


def one_row(v: Tensor, recipe: Recipe) -> tuple[list[int], list[int]]:
    codes, scale = swiglu.requantise(recipe, v[None])
    return codes[0].tolist(), f32_bits(scale)[0].tolist()


def test_requantise_special_groups() -> None:
    """Four 64-groups: zeros, all NaN, an infinity, and one value at the threshold of the next power."""
    v = torch.zeros(256)
    v[64:128] = math.nan
    v[128:192] = 1.0
    v[130] = -math.inf
    v[192] = 448.0
    codes, scale = one_row(v, Recipe())
    assert scale == [0x00800000, 0x00800000, 0x7E800000, 0x3F800000]
    assert codes[:64] == [0] * 64
    assert codes[64:128] == [0x7F] * 64
    assert codes[128:192] == [0, 0, 0xFE] + [0] * 61
    assert codes[192:] == [0x7E] + [0] * 63
    v[192] = float(f32_from_bits(torch.tensor([0x43E00001]))[0])
    assert one_row(v, Recipe())[1][3] == 0x40000000, "one ulp above 448 doubles the scale"
    codes, scale = one_row(v, RECIPES["pr323_small"])
    assert scale[:2] == [0, 0]
    assert codes[:128] == [0] * 64 + [0x7F] * 64


@pytest.mark.parametrize("name", RECIPES)
def test_requantise_takes_the_recipe(name: str) -> None:
    recipe = RECIPES[name]
    v = scattered(2048, 32)[2048:4096].reshape(4, 512)
    fields = (recipe.activation_granularity, recipe.activation_scale, recipe.zero_group)
    for ours, expected in zip(swiglu.requantise(recipe, v), cast.quantise_activation(v, *fields), strict=True):
        assert_same(ours, expected)
    assert swiglu.requantise(recipe, v)[1].shape == (4, 512 // recipe.activation_granularity)
