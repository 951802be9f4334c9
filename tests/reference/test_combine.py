"""Eq. (8): ascending k, fp32, one rounding at the end; +0 where nothing arrives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaproof.quant import atoms, philox
from megaproof.quant.recipe import RECIPES, Recipe
from megaproof.reference import combine, dispatch
from megaproof.tests.support.bit_patterns import assert_same

IN_COMBINE = RECIPES["weight_in_combine"]


def combined(recipe: Recipe, slots: Tensor, idx: list[Tensor], weight: Tensor) -> list[Tensor]:
    where = dispatch.routes(idx)
    return combine.combine(recipe, slots, where, weight, tuple(map(len, idx)), idx[0].shape[1], atoms)


def columns(*values: float) -> Tensor:
    """bfloat16 [n, 1], one value a row."""
    return torch.tensor(values)[:, None].bfloat16()


def test_slots_are_summed_in_ascending_k() -> None:
    idx = [torch.tensor([[5, 1, 3], [1, 3, 5]])]
    y = combined(Recipe(), columns(2.0**24, 1.0, 1.0, 1.0, 1.0, 2.0**24), idx, torch.ones(6))
    assert y[0].float().tolist() == [[2.0**24], [2.0**24]]
    big, one = 2.0**25, 1.0
    y = combined(Recipe(), columns(big, one, -big, one, -big, big), idx, torch.ones(6))
    assert y[0].float().tolist() == [[0.0], [0.0]], "1 is lost beside 2^25, on either side"
    y = combined(Recipe(), columns(big, -big, one, -big, big, one), idx, torch.ones(6))
    assert y[0].float().tolist() == [[1.0], [1.0]]


def test_only_the_end_is_rounded_to_bf16() -> None:
    """256 + 1 + 1: BF16 sums would stay at 256."""
    y = combined(Recipe(), columns(256.0, 1.0, 1.0), [torch.tensor([[0, 1, 2]])], torch.ones(3))
    assert y[0].float().tolist() == [[258.0]]


def test_masked_slots_and_tokens() -> None:
    idx = [torch.tensor([[-1, -1], [-1, 4]]), torch.tensor([[2, -1]])]
    y = combined(Recipe(), columns(-3.0, 7.0), idx, torch.ones(2))
    assert [part.float().tolist() for part in y] == [[[0.0], [-3.0]], [[7.0]]]
    assert y[0].view(torch.int16)[0].tolist() == [0], "+0"


def test_a_sum_of_minus_zeros_is_plus_zero() -> None:
    """The sum starts at +0."""
    y = combined(Recipe(), columns(-0.0, -0.0), [torch.tensor([[0, 1]])], torch.ones(2))
    assert y[0].view(torch.int16).tolist() == [[0]]


def test_the_weight_enters_here_by_an_fma_or_not_at_all() -> None:
    """acc = fma(w, slot, acc): 1 + 2^-12 squared, less its rounded square, is the rounding error 2^-24."""
    w = 1 + 2.0**-7
    slots = columns(w, w)
    idx = [torch.tensor([[0, 1]])]
    weight = torch.tensor([-(1 + 2.0**-7), 1 + 2.0**-7 + 2.0**-23])
    exact = weight[1].double() * w + (weight[0] * w).double()
    assert exact != 0
    fused = combined(IN_COMBINE, slots, idx, weight)[0]
    assert_same(fused, exact.float().reshape(1, 1).bfloat16())
    unfused = (weight[1] * w + weight[0] * w).reshape(1, 1).bfloat16()
    assert float(fused) != float(unfused)
    assert combined(Recipe(), slots, idx, weight)[0].float().tolist() == [[float((slots[0] + slots[1]).float())]]


@pytest.mark.parametrize("recipe", [Recipe(), IN_COMBINE], ids=["before", "in_combine"])
def test_token_by_token(recipe: Recipe) -> None:
    """All tokens together against a loop over tokens and slots; ranks of different sizes, one of them idle."""
    sizes, topk, hidden = (3, 0, 5), 4, 16
    keep = (philox.words(9, 1, sum(sizes) * topk) % 3 > 0).reshape(-1, topk)
    idx = list(torch.where(keep, 1, -1).split(sizes))
    n = int(keep.sum())
    slots = ((philox.words(9, 2, n * hidden) - 2.0**31) * 2.0**-29).float().bfloat16().reshape(n, hidden)
    weight = (philox.words(9, 3, n) * 2.0**-32).float()
    y = torch.cat(combined(recipe, slots, idx, weight))
    row = 0
    for token, active in enumerate(keep.tolist()):
        total = torch.zeros(hidden)
        for k in range(topk):
            if active[k]:
                value = slots[row].float()
                total = atoms.fma(weight[row], value, total) if recipe is IN_COMBINE else total + value
                row += 1
        assert_same(y[token], atoms.encode_bf16(total))


def test_ranks_get_tensors_of_their_own() -> None:
    y = combined(Recipe(), columns(1.0, 2.0), [torch.tensor([[0]]), torch.tensor([[0]])], torch.ones(2))
    y[0].zero_()
    assert y[1].float().tolist() == [[2.0]]
