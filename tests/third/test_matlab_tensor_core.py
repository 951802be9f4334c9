"""The tensor-core atom against published H100 and H200 silicon: 5,000 dot products measured by other people.

Source, licence and changes: NOTICE. Which instruction ran: `convert_matlab_tensor_core.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from megaproof.quant import atoms
from megaproof.tests.third import make_mmasim_vectors
from megaproof.tests.third.bits import assert_same_bits, to_bits
from megaproof.tests.third.convert_matlab_tensor_core import COMMIT, DATA

VECTORS = load_file(DATA)


def test_provenance_is_in_the_file() -> None:
    with safe_open(DATA, "numpy") as file:
        metadata = file.metadata()
    assert (metadata["commit"], metadata["licence"]) == (COMMIT, "BSD-2-Clause")
    assert {key: array.shape for key, array in VECTORS.items()} == {"a": (5000, 32), "b": (5000, 32), "d": (5000,)}


def test_wgmma_from_zero_equals_silicon() -> None:
    a, b = (torch.from_numpy(VECTORS[key]).unsqueeze(1) for key in "ab")  # [n, 1, 32]
    d = atoms.wgmma_e4m3(a, b, torch.zeros(len(a), 1, 1))
    assert_same_bits(to_bits(d)[:, 0, 0], VECTORS["d"], "H100 and H200 silicon")


def test_mmasim_says_which_instruction_ran() -> None:
    """mmasim's wgmma from zero gives every output, its FP16 mma.sync (an FP8 mma.sync on sm_90) two in five."""
    try:
        make_mmasim_vectors.instruction()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"mmasim cannot run here: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    from mmasim.nv_ptx import MMA, WGMMA

    a, b = (torch.from_numpy(VECTORS[key]).view(torch.float8_e4m3fn) for key in "ab")
    zero = torch.zeros(len(a))
    wgmma = WGMMA("Hopper", make_mmasim_vectors.INSTRUCTION)
    assert_same_bits(to_bits(wgmma.dpa(a, b, zero)), VECTORS["d"], "mmasim's wgmma")
    other = MMA("Hopper", "m16n8k16.f32.f16.f16.f32").dpa(a.half(), b.half(), zero)
    assert (to_bits(other) == VECTORS["d"]).sum() == 2011


def test_vectors_tell_the_model_from_a_float32_sum() -> None:
    """Most of these sums lose bits in the tensor core; a correctly rounded dot product fails on them."""
    a, b = (atoms.decode_e4m3(torch.from_numpy(VECTORS[key])).double() for key in "ab")
    assert (to_bits((a * b).sum(-1).float()) != VECTORS["d"]).mean() > 0.5
    assert not np.any(VECTORS["d"] & 0x3FF)  # 13 fraction bits, as E8M13 has
