"""The parts that `proof/explain/derive.py` prints: each agrees with its atom, and says so where it does not."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from megaproof.proof.explain import anatomy
from megaproof.quant import atoms
from megaproof.quant.formats import f32_from_bits


def e4m3(*values: float) -> Tensor:
    """Codes of some values, padded with zeros to 32."""
    return atoms.encode_e4m3(torch.tensor([*values, *[0.0] * (32 - len(values))]))


def test_a_step_worked_by_hand() -> None:
    """2 * 2 + 1 * 2^-9 and c = 2^-12: emax is 2, units 2^-11; 2^-9 is 4 of them, 2^-12 less than one and lost."""
    taken = anatomy.step(e4m3(2, 1), e4m3(2, 2.0**-9), torch.tensor(2.0**-12))
    assert (taken.emax, taken.terms, taken.cut, taken.total, taken.dropped) == (2, 2, 1, 8196, 0)
    assert float(taken.result) == 4 + 2.0**-9
    assert taken.text() == "emax 2, 2 products, 1 cut, sum 8196 * 2^-11"


def test_a_step_keeps_14_bits() -> None:
    """3 * (1 + 2^-13 units): a sum of 15 bits loses its lowest one."""
    taken = anatomy.step(e4m3(2, 2, 2, 1), e4m3(2, 2, 2, 2.0**-9), torch.tensor(2.0**-11))
    assert (taken.total, taken.dropped) == (3 * 8192 + 4 + 1, 1)
    assert float(taken.result) == (3 * 8192 + 4) * 2.0**-11


@pytest.mark.parametrize("seed", range(6))
def test_steps_of_any_bits_agree_with_the_atom(seed: int) -> None:
    """`step` raises where its integers and the atom differ: NaN codes, subnormals, any accumulator."""
    chance = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 256, (20, 32), dtype=torch.uint8, generator=chance) for _ in "ab")
    if seed % 2:  # all NaN codes out, so that sums are compared
        a, b = (torch.where(t & 0x7F == 0x7F, 0, t) for t in (a, b))
    c = f32_from_bits(torch.randint(0, 1 << 32, (20,), generator=chance))
    if seed % 3 == 1:
        c = torch.randn(20, generator=chance) * 2**17
    steps = [anatomy.step(*operands) for operands in zip(a, b, c, strict=True)]
    assert any(taken.emax is not None for taken in steps) or seed % 2 == 0


def test_a_wrong_atom_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = atoms.wgmma_e4m3
    monkeypatch.setattr(atoms, "wgmma_e4m3", lambda a, b, c: right(a, b, c) * 2)
    with pytest.raises(anatomy.Disagreement, match="by integers and by the atom"):
        anatomy.step(e4m3(2, 1), e4m3(2, 1), torch.zeros(()))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "gate", [0.0, -0.0, 1.5, -3.25, 30.0, -88.5, -120.0, float("inf"), float("-inf"), float("nan")]
)
def test_the_parts_of_silu_give_silu(gate: float, fast: bool) -> None:
    """`silu` raises where its parts and the atom differ."""
    section = anatomy.Section("", "")
    result = anatomy.silu(section, torch.tensor(gate), fast)
    assert anatomy.hexadecimal(result) == anatomy.hexadecimal(atoms.silu(torch.tensor(gate), fast))
    assert ("1 + ex2" if fast else "1 + expf") in [line.what for line in section.lines]
    json.dumps(section.as_dict(), allow_nan=False)
