"""The tensor-core atom against mmasim's Hopper wgmma: its committed answers always, the simulator itself where it runs.

Known differences: none. mmasim's rules, in other words than ours, give the same bits for every NaN operand,
a NaN or infinite accumulator, both zeros and subnormals; `nan_and_inf` and `signed_zeros` hold it to that.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from megaproof.quant import atoms
from megaproof.tests.third import make_mmasim_vectors as maker
from megaproof.tests.third.bits import assert_same_bits, to_bits, to_float

VECTORS = load_file(maker.DATA)
FAMILIES = sorted({name.split("/")[0] for name in VECTORS})


def ours(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """uint8 [M,k], uint8 [N,k], uint32 [M,N] -> uint32 [M,N]."""
    return to_bits(atoms.wgmma_chain(torch.from_numpy(a), torch.from_numpy(b), to_float(c)))


def test_every_family_is_committed() -> None:
    assert set(FAMILIES) == {*maker.FAMILIES, "chain"}
    assert sum(VECTORS[f"{family}/d"].size for family in FAMILIES) == 9728


@pytest.mark.parametrize("family", FAMILIES)
def test_committed_vectors(family: str) -> None:
    for tile, (a, b, c, d) in enumerate(zip(*(VECTORS[f"{family}/{key}"] for key in "abcd"), strict=True)):
        assert_same_bits(ours(a, b, c), d, f"{family}, tile {tile}")


def test_committed_vectors_reach_the_truncation() -> None:
    """The vectors would be worthless if most sums were exact: a plain float32 product must fail on them."""
    for family in ("narrow", "near_c", "wide_c", "cancelling", "chain"):
        a, b = (atoms.decode_e4m3(torch.from_numpy(VECTORS[f"{family}/{key}"][0])) for key in "ab")
        plain = to_bits((a.double() @ b.double().T + to_float(VECTORS[f"{family}/c"][0]).double()).float())
        assert (plain != VECTORS[f"{family}/d"][0]).mean() > 0.5, family
    special = VECTORS["nan_and_inf/d"]
    magnitude = special & np.uint32(0x7FFFFFFF)
    for kind in (magnitude > maker.INF, magnitude == maker.INF, magnitude < maker.INF):
        assert kind.any()


def test_live_simulator() -> None:
    """Four tiles of each family from another seed, and the committed file once more."""
    try:
        op = maker.instruction()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"mmasim cannot run here: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    again = maker.tensors(op)
    assert again.keys() == VECTORS.keys()
    for name, array in again.items():
        assert_same_bits(array, VECTORS[name], f"committed {name}")
    made = maker.tensors(op, seed=7, tiles=4)
    for family in FAMILIES:
        for a, b, c, d in zip(*(made[f"{family}/{key}"] for key in "abcd"), strict=True):
            assert_same_bits(ours(a, b, c), d, f"{family}, live")
