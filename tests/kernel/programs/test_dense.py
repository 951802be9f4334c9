"""The kernel's main loop on silicon: the dense promoted GEMM against the model, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaproof.cases.inputs.draws import code_lut, scales
from megaproof.kernel.programs import dense
from megaproof.quant import philox, twin
from megaproof.reference import gemm
from megaproof.reference.operands import Operand

SHAPES = [(128, 128, 128), (128, 256, 512), (384, 1152, 1024), (1024, 4096, 4096), (640, 4096, 2048)]
"""M, N, K: half a tile, one stage; a tile, as many stages as the ring has; a half tile last; both GEMMs of a layer."""


def operands(m: int, n: int, k: int, group: int, kind: str, device: str) -> tuple[Tensor, ...]:
    lut = code_lut("gaussian" if kind == "nan" else kind).to(device)
    a = twin.codes(1, m, m * k, lut).reshape(m, k).clone()
    b = twin.codes(2, n, n * k, lut).reshape(n, k).clone()
    if kind == "nan":
        a[m // 3, k // 2], b[n // 2, 0] = 0x7F, 0xFF
    a_sf = scales(3, k, m * (k // group), -7).reshape(m, k // group).to(device)
    b_sf = scales(4, k, (n // 128) * (k // 128), -9).reshape(n // 128, k // 128).to(device)
    return a, a_sf, b, b_sf


def test_the_cubin_passes_the_gate() -> None:
    report = dense.PROGRAM.compile().report
    assert set(report.entries) == set(dense.PROGRAM.entries)
    assert not report.messages


@pytest.mark.parametrize("bad", [(127, 128, 128), (128, 192, 128), (128, 128, 64), (0, 128, 128)], ids=str)
def test_sizes_are_refused_by_name(bad: tuple[int, int, int]) -> None:
    m, n, k = bad
    a, b = torch.zeros(m, k, dtype=torch.uint8), torch.zeros(n, k, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must be a positive multiple of 128"):
        dense.dense(a, torch.ones(k // 128, m), b, torch.ones(n // 128, k // 128), 128)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [128, 64])
@pytest.mark.parametrize("kind", ["gaussian", "spread", "subnormal", "nan"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tensor_core_gemm_equals_the_model(shape: tuple[int, int, int], kind: str, group: int) -> None:
    a, a_sf, b, b_sf = operands(*shape, group, kind, "cuda")
    expected = gemm.promoted(a, a_sf, Operand(b, b_sf), group, twin.arith("cuda"))
    out = torch.full_like(expected, float("nan"))
    actual = dense.dense(a, a_sf.t().contiguous(), b, b_sf, group, out)
    wrong = expected.view(torch.int32) != actual.view(torch.int32)
    assert int(wrong.sum()) == 0, f"{int(wrong.sum())} of {wrong.numel()} outputs differ, first {wrong.nonzero()[0]}"


@pytest.mark.gpu
@pytest.mark.parametrize("group", [128, 64])
def test_repeats_are_equal(group: int) -> None:
    a, a_sf, b, b_sf = operands(1024, 1024, 4096, group, "gaussian", "cuda")
    a_sf = a_sf.t().contiguous()
    first = dense.dense(a, a_sf, b, b_sf, group).view(torch.int32)
    differing = sum(int((dense.dense(a, a_sf, b, b_sf, group).view(torch.int32) != first).any()) for _ in range(200))
    assert differing == 0


def test_the_generator_is_the_readable_one() -> None:
    lut = code_lut("gaussian")
    assert torch.equal(twin.codes(1, 128, 1000, lut), philox.codes(1, 128, 1000, lut))
