"""Eq. (2), (3), (6): which scale goes with which block, in which order, and where the rounding is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megaproof.cases.inputs.draws import scales
from megaproof.quant import atoms, philox
from megaproof.quant.formats import BF16
from megaproof.quant.recipe import RECIPES, Recipe
from megaproof.reference import gemm
from megaproof.reference.operands import Operand
from megaproof.tests.support.bit_patterns import assert_same


def problem(m: int, n: int, k: int, group: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = [(philox.words(seed, i, rows * k) & 0xBF).to(torch.uint8).reshape(rows, k) for i, rows in enumerate((m, n))]
    a_sf = scales(seed, 2, m * (k // group), -3).reshape(m, k // group)
    w_sf = scales(seed, 3, (n // 128) * (k // 128), -5).reshape(n // 128, k // 128)
    return draw[0], a_sf, draw[1], w_sf


def by_element(a: Tensor, a_sf: Tensor, w: Tensor, w_sf: Tensor, group: int, i: int, j: int) -> float:
    """One output, block by block: fl(s_a * s_w), four (or two) chained steps from 0, one fma."""
    total = torch.zeros(1, 1)
    for b in range(a.shape[1] // group):
        acc = torch.zeros(1, 1)
        for k in range(b * group, (b + 1) * group, 32):
            acc = atoms.wgmma_e4m3(a[i : i + 1, k : k + 32], w[j : j + 1, k : k + 32], acc)
        scale = np.float32(a_sf[i, b].item()) * np.float32(w_sf[j // 128, b * group // 128].item())
        total = atoms.fma(torch.tensor(float(scale)).reshape(1, 1), acc, total)
    return float(total)


@pytest.mark.parametrize("group", [64, 128])
def test_promoted_element_by_element(group: int) -> None:
    a, a_sf, w, w_sf = problem(3, 256, 384, group, 21)
    got = gemm.promoted(a, a_sf, Operand(w, w_sf), group, atoms)
    for i in range(3):
        for j in (0, 1, 127, 128, 255):
            assert float(got[i, j]) == by_element(a, a_sf, w, w_sf, group, i, j), (i, j)


def test_scales_meet_their_blocks() -> None:
    """a is 1 in one column only, w is 1 everywhere: the output is the product of that block's two scales."""
    n, k, one = 256, 512, 0x38
    w = torch.full((n, k), one, dtype=torch.uint8)
    w_sf = 2.0 ** torch.arange(8.0).reshape(2, 4)
    for group in (64, 128):
        for column in range(0, k, 31):
            a = torch.zeros(1, k, dtype=torch.uint8)
            a[0, column] = one
            a_sf = 3.0 ** torch.arange(k // group)[None].float()
            got = gemm.promoted(a, a_sf, Operand(w, w_sf), group, atoms)
            expected = [3.0 ** (column // group) * 2.0 ** (4 * half + column // 128) for half in (0, 1)]
            assert got[0, ::128].tolist() == expected, (group, column)
            assert bool((got[0, :128] == expected[0]).all())


def test_blocks_are_promoted_in_ascending_order_with_one_rounding() -> None:
    """2^24 + 1 * 1.5 - 2^24: the fma of block 1 rounds to even, so 2 is left; in another order 1.5 would be."""
    a = torch.zeros(1, 384, dtype=torch.uint8)
    a[0, [0, 128, 256]] = torch.tensor([0x38, 0x38, 0xB8], dtype=torch.uint8)
    w = torch.full((128, 384), 0x38, dtype=torch.uint8)
    a_sf, w_sf = torch.tensor([[2.0**12, 1.5, 2.0**12]]), torch.tensor([[2.0**12, 1.0, 2.0**12]])
    assert gemm.promoted(a, a_sf, Operand(w, w_sf), 128, atoms)[0, :2].tolist() == [2.0, 2.0]


def test_the_scale_is_rounded_before_it_is_used_and_the_fma_is_fused() -> None:
    """s = fl(s_a * s_w) and one rounding of s * acc + sum, on scales where both matter."""
    a, w = torch.full((1, 256), 0x3D, dtype=torch.uint8), torch.full((128, 256), 0x3B, dtype=torch.uint8)
    u = 1 + 2.0**-23
    got = gemm.promoted(a, torch.tensor([[u, -u]]), Operand(w, torch.tensor([[u, 1.0]])), 128, atoms)
    acc = float(atoms.wgmma_chain(a[:, :128], w[:1, :128]))
    first = np.float32(np.float32(u) * np.float32(u)) * np.float32(acc)
    assert acc == 1.625 * 1.375 * 128
    exact = float(first) - u * acc  # the sum is small: float64 holds it
    assert got[0, 0] == np.float32(exact)
    assert exact != 0


def test_l1_splits_gate_rows_from_up_rows() -> None:
    a, a_sf, w, w_sf = problem(2, 256, 128, 128, 22)
    gate, up = gemm.gemm1(Recipe(), a, a_sf, Operand(w, w_sf), atoms)
    whole = gemm.promoted(a, a_sf, Operand(w, w_sf), 128, atoms)
    assert_same(torch.cat([gate, up], 1), whole)
    assert gate.is_contiguous()
    assert up.is_contiguous()


def test_l1_rounding_bf16() -> None:
    a, a_sf, w, w_sf = problem(2, 256, 256, 128, 23)
    plain = torch.cat(gemm.gemm1(Recipe(), a, a_sf, Operand(w, w_sf), atoms), 1)
    rounded = torch.cat(gemm.gemm1(RECIPES["unfused"], a, a_sf, Operand(w, w_sf), atoms), 1)
    assert_same(rounded, BF16.round(plain))
    assert not torch.equal(rounded, plain)


@pytest.mark.parametrize("name", ["default", "granularity_128"])
def test_l2_follows_the_granularity(name: str) -> None:
    group = RECIPES[name].activation_granularity
    a, a_sf, w, w_sf = problem(2, 128, 256, group, 24)
    assert_same(
        gemm.gemm2(RECIPES[name], a, a_sf, Operand(w, w_sf), atoms),
        gemm.promoted(a, a_sf, Operand(w, w_sf), group, atoms),
    )


def test_no_rows() -> None:
    a, a_sf, w, w_sf = problem(1, 256, 128, 128, 25)
    gate, up = gemm.gemm1(Recipe(), a[:0], a_sf[:0], Operand(w, w_sf), atoms)
    assert gate.shape == up.shape == (0, 128)
