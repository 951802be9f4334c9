"""The integer oracle against plain Python rationals, the model against it, and the faults that both tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from megaproof.quant import atoms
from megaproof.quant.recipe import RECIPES
from megaproof.reference.oracle import NotLattice, Refused, lattice_y
from megaproof.reference.oracle.decode import UNITS
from megaproof.reference.oracle.integers import Scaled, bf16_bits, round_bf16
from megaproof.reference.oracle.lattice import _gemm2
from megaproof.tests.support.oracle_cases import (
    EXPERTS,
    Draw,
    everything,
    lattice_case,
    model_y,
    replaced,
    with_weights,
)


def nearest_bf16(value: Fraction) -> Fraction:
    if value == 0:
        return value
    ulp = Fraction(2) ** (math.floor(math.log2(abs(value))) - 7)
    return round(value / ulp) * ulp  # Python rounds a Fraction to the nearest even


def plain_y(case: list, token: int, columns: list[int], clamp: float | None) -> list[Fraction]:
    """The recipe's words in Python's own rationals: nothing is rounded but slots and y."""
    x, x_sf, idx, topk_weights, weights = case
    y = [Fraction(0)] * len(columns)

    def numbers(codes: Tensor) -> list[Fraction]:
        return [Fraction(int(UNITS[code]), 512) for code in codes.tolist()]

    for slot, expert in enumerate(idx[token].tolist()):
        if expert < 0:
            continue
        w1, w1_sf, w2, w2_sf = weights(expert)
        row = [a * Fraction(x_sf[token, k // 128].item()) for k, a in enumerate(numbers(x[token]))]
        sums = []
        for n in range(w1.shape[0]):
            scaled = [Fraction(s) for s in w1_sf[n // 128].tolist()]
            sums.append(
                sum(a * b * scaled[k // 128] for k, (a, b) in enumerate(zip(row, numbers(w1[n]), strict=True)) if b)
            )
        inter = len(sums) // 2
        limit = math.inf if clamp is None else Fraction(clamp)
        v = []
        for gate, up in zip(sums[:inter], sums[inter:], strict=True):
            assert gate == 0 or gate >= 32
            v.append(min(gate, limit) * max(min(up, limit), -limit) * Fraction(topk_weights[token, slot].item()))
        for i, column in enumerate(columns):
            scaled = [Fraction(s) for s in w2_sf[column // 128].tolist()]
            total = sum(a * b * scaled[k // 128] for k, (a, b) in enumerate(zip(v, numbers(w2[column]), strict=True)))
            y[i] += nearest_bf16(total)
    return [nearest_bf16(value) for value in y]


@pytest.mark.parametrize(("clamp", "token"), [(None, 1), (32.0, 2), (64.0, 1)])
def test_lattice_equals_plain_python(clamp: float | None, token: int) -> None:
    case = lattice_case(tokens=3, hidden=256, inter=128)
    columns = [0, 1, 77, 128, 255]
    y = lattice_y(*case, torch.tensor([0, token]), torch.tensor(columns), clamp).view(torch.bfloat16)
    assert [Fraction(value) for value in y[1].tolist()] == plain_y(case, token, columns, clamp)


@pytest.mark.parametrize("hidden, inter", [(128, 128), (384, 128), (512, 256), (1152, 384)])
def test_lattice_is_one_for_every_shape(hidden: int, inter: int) -> None:
    case = lattice_case(hidden=hidden, inter=inter)
    y = lattice_y(*case, *everything(case), None)
    assert torch.equal(y, lattice_y(*case, *everything(case), None, granularity=128))
    assert not torch.equal(y, lattice_y(*case, *everything(case), 32.0))
    values = y.view(torch.bfloat16)
    assert (values == 0).double().mean() < 0.05
    assert len(values.unique()) > hidden // 2  # rounding has something to do, and rows are told apart


@pytest.mark.parametrize("name", RECIPES)
def test_model_equals_integers_on_lattice(name: str) -> None:
    case = lattice_case()
    for clamp in (None, 64.0):
        y = model_y(RECIPES[name].replace(clamp=clamp), case)
        assert torch.equal(y.view(torch.int16), lattice_y(*case, *everything(case), clamp))


def test_silu_is_the_identity_on_lattice_gates() -> None:
    gates = torch.tensor([0.0, *(32.0 * 2**s for s in range(20)), 33.0, 100.0])
    for fast in (True, False):
        assert torch.equal(atoms.silu(gates, fast), gates)


@pytest.mark.parametrize("fault", ["row", "expert", "weight", "mask", "slot", "scale", "w1_scale", "w2_scale"])
def test_lattice_tells_faults_apart(fault: str) -> None:
    case = lattice_case()
    expected = lattice_y(*case, *everything(case), None)
    x, x_sf, idx, topk_weights, weights = case
    if fault == "row":
        x, x_sf = x.roll(1, 0), x_sf.roll(1, 0)
    elif fault == "expert":
        idx = torch.where(idx >= 0, (idx + 1) % EXPERTS, idx)
    elif fault == "weight":
        topk_weights = topk_weights.roll(1, 1)
    elif fault == "mask":
        idx = torch.where(idx < 0, 0, idx)
    elif fault == "slot":
        idx = torch.cat([idx[:, :-1], torch.full_like(idx[:, :1], -1)], dim=1)
    elif fault == "scale":
        x_sf = x_sf[:, :1].expand_as(x_sf).clone()
    else:
        at = 1 if fault == "w1_scale" else 3
        broken = [tuple(t.flip(1) if i == at else t for i, t in enumerate(weights(e))) for e in range(EXPERTS)]
        weights = broken.__getitem__
    y = model_y(RECIPES["no_clamp"], [x, x_sf, idx, topk_weights, weights]).view(torch.int16)
    wrong = (y != expected).double().mean(1)
    assert wrong[1] > 0.9 if fault == "mask" else wrong.mean() > 0.9


def unpair(case: list) -> list:
    """One column of x no longer cancels its twin."""
    return replaced(case, 0, (0, int(case[0][0].nonzero()[9])), 0)


REFUSALS = {
    "x is 2": (lambda c: replaced(c, 0, (0, 0), 0x40), "x holds other values than -1, 0 and 1"),
    "x is NaN": (lambda c: replaced(c, 0, (0, 0), 0x7F), "x holds a NaN code"),
    "pair broken": (unpair, "neither 0 nor >= 32"),
    "x_sf is 3": (lambda c: replaced(c, 1, (0, 0), 3.0), "x_sf holds a value that is not a positive power of two"),
    "x_sf is inf": (lambda c: replaced(c, 1, (0, 0), math.inf), "x_sf holds a NaN or an infinity"),
    "x_sf is huge": (lambda c: replaced(c, 1, (0, 0), 2.0**60), "x_sf has an exponent outside"),
    "weight is 0.3": (lambda c: replaced(c, 3, (0, 0), 0.3), "topk_weights of token 0, slot 0, expert 0 holds a value"),
    "expert is -2": (lambda c: replaced(c, 2, (0, 0), -2), r"topk_idx\[0, 0\] = -2"),
    "w1 is 1.125": (lambda c: with_weights(c, 0, 0x39), "w1 of expert 0 holds other values"),
    "w1_sf is 1.5": (lambda c: with_weights(c, 1, 1.5), "w1_sf of expert 0 holds a value that is not a positive power"),
    "w2 is 1.125": (lambda c: with_weights(c, 2, 0x39), "w2 of expert 0 holds other values"),
    "w2_sf is far off": (lambda c: with_weights(c, 3, 2.0**24), "GEMM 2 of token 0, slot 0, .*more than 24"),
    "w2_sf is absurd": (lambda c: with_weights(c, 3, 2.0**45), "GEMM 2 of token 0, slot 0, .*too far apart"),
    "x_sf is short": (lambda c: [c[0], c[1][:, :1], *c[2:]], "x_sf has shape"),
    "x is float": (lambda c: [c[0].float(), *c[1:]], "x has dtype torch.float32"),
}


@pytest.mark.parametrize("change, message", REFUSALS.values(), ids=REFUSALS)
def test_lattice_refuses(change: Callable[[list], list], message: str) -> None:
    case = change(lattice_case())
    with pytest.raises(Refused, match=message):
        lattice_y(*case, *everything(case), None)


def test_lattice_refuses_clamps_and_long_chains() -> None:
    case = lattice_case()
    for clamp, message in ((10.0, "clamp = 10.0 must be"), (48.0, "an amax is not 0 or 448")):
        with pytest.raises(NotLattice, match=message):
            lattice_y(*case, *everything(case), clamp)
    codes = torch.full((2, 64), 448 * 512).numpy()
    codes[0, 0] = 1  # one unit beside 63 of 448: far more than 2^13 units
    with pytest.raises(NotLattice, match="chain reaches 2"):
        _gemm2(codes, codes[:, 0] * 0, codes.reshape(1, -1) * 0 + 1, codes[:1, :1] * 0, 64, "row")


def test_bf16_rounding_of_integers() -> None:
    n = Draw(0).words(20000) % (1 << 25) - (1 << 24)
    n = torch.cat([n, n >> 12, torch.arange(-600, 600)])  # ties and short numbers
    expected = (n.float() * 2.0**-5).to(torch.bfloat16).view(torch.int16)
    assert bf16_bits(round_bf16(Scaled(n.numpy(), -5))).tolist() == expected.tolist()
