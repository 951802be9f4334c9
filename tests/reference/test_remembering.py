"""Weights that remember: no bit changes, and nothing new is taken for something known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megaproof.reference.layer import LayerResult, moe_layer
from megaproof.reference.operands import ExpertWeights
from megaproof.reference.ranks import run_ranks
from megaproof.reference.remembering import Remembering
from megaproof.tests.support import tiny

ACTS = torch.arange(6, dtype=torch.uint8).reshape(3, 2)
SF = torch.tensor([[1.0], [2.0], [4.0]])
WEIGHT = torch.tensor([0.5, 0.25, 1.0])


def weights(e: int) -> ExpertWeights:
    raise LookupError("these tests make their own rows")


class Counted:
    """compute, and how many rows it was given each time."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, acts: Tensor, sf: Tensor, weight: Tensor) -> dict[str, Tensor]:
        self.rows.append(len(acts))
        return {"twice": acts * 2, "scaled": sf * weight[:, None]}


def once(memory: Remembering, compute: Counted, of: object = 0, rows: object = slice(None), **other: Tensor) -> None:
    """The result is what compute makes of these rows."""
    own = [other.get(name, tensor)[rows] for name, tensor in (("acts", ACTS), ("sf", SF), ("weight", WEIGHT))]
    found, made = memory.once(of, compute, *own), Counted()(*own)
    assert found.keys() == made.keys()
    assert all(torch.equal(found[name], made[name]) for name in made)


def test_known_rows_are_not_computed_again_in_any_order() -> None:
    memory, compute = Remembering(weights), Counted()
    once(memory, compute, rows=[2, 0])
    once(memory, compute, rows=[0, 2, 0])
    assert compute.rows == [2]
    once(memory, compute)
    assert compute.rows == [2, 1], "the one row that was new"


@pytest.mark.parametrize("changed", ["of", "acts", "sf", "weight"])
def test_whatever_a_row_depends_on_makes_it_new(changed: str) -> None:
    memory, compute = Remembering(weights), Counted()
    once(memory, compute)
    tensors = {"acts": ACTS, "sf": SF, "weight": WEIGHT}
    if changed == "of":
        once(memory, compute, of=1)
        assert compute.rows == [3, 3]
        return
    bits = tensors[changed].clone()
    bits[1:2].view(torch.uint8).flatten()[0] ^= 1
    once(memory, compute, **{changed: bits})
    assert compute.rows == [3, 1], "a flipped bit of one row"


def layer() -> tiny.Layer:
    return tiny.layer([[[0, 1], [1, 3]], [[2, 0]]], [[[0.5, 1.0], [0.25, 1.0]], [[1.0, 0.5]]])


def equal(a: LayerResult, b: LayerResult) -> bool:
    assert a.trace is not None
    assert b.trace is not None
    return a.trace.keys() == b.trace.keys() and all(torch.equal(a.trace[name], b.trace[name]) for name in a.trace)


def test_the_layer_and_its_ranks_make_the_same_bits_and_ask_for_no_expert_twice() -> None:
    made, asked = layer(), []

    def counted(e: int) -> ExpertWeights:
        asked.append(e)
        return made.weights(e)

    expected = moe_layer(tiny.RECIPE, *made.arguments(), trace=True, experts=4)
    arguments = dataclasses.replace(made, weights=Remembering(counted)).arguments()
    assert equal(expected, moe_layer(tiny.RECIPE, *arguments, trace=True, experts=4))
    assert sorted(asked) == [0, 1, 2, 3]
    assert equal(expected, run_ranks(tiny.RECIPE, *arguments, trace=True, experts=4))
    assert sorted(asked) == [0, 1, 2, 3]
    other = dataclasses.replace(tiny.RECIPE, clamp=1.0)
    changed = moe_layer(other, *arguments, trace=True, experts=4)
    assert equal(moe_layer(other, *made.arguments(), trace=True, experts=4), changed)
    assert not equal(expected, changed)
    assert len(asked) == 8, "another recipe is another layer"
